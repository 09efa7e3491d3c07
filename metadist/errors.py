"""The errors that end a run with a meaning of their own; the command line turns them into exit codes."""


class InputError(ValueError):
    """Something the user gave (a job, a file, a folder, a model) cannot be used.

    The message is one sentence that says what is wrong, where, and what to do; the command line prints it alone and
    exits with code 2.
    """


class Diverged(ArithmeticError):
    """Training produced a loss or gradient that is not finite; the command line exits with code 3.

    The message names the task and the command that replays it.
    """


class Interrupted(Exception):
    """A signal asked the command to stop; a run under way has saved. The command line exits with 128 + its number."""

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by signal {signal_number}")
        self.signal_number = signal_number


class HeadLost(ConnectionError):
    """The head of the Ray cluster does not answer any more, without which Ray ends every driver.

    The message is one sentence; the command line prints it alone and exits with code 1.
    """


class StorageFailed(OSError):
    """A place that a run must write to (a full disk, a directory that became read-only, an object store that is gone).

    The message is one sentence; the command line prints it alone and exits with code 1.
    """
