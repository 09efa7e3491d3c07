"""The errors that end a run with a meaning of their own; the command line turns them into exit codes."""

import difflib
import os
from collections.abc import Iterable

from metadist.core.redaction import redact

SUBMITTED_BY = "METADIST_SUBMITTED_BY"
"""Environment of a submitted job: the version of metadist that the client has, which the cluster's must be equal to."""


def doing_it_again() -> str:
    """What has a run go on from its newest checkpoint, to begin or end a sentence with: of a submitted job, which
    always does, another thing than of a command that its user typed where it runs."""
    return "submitting the job again" if is_submitted() else "the same command with --resume auto"


def is_submitted() -> bool:
    """Whether this process runs a job for `metadist submit`."""
    return SUBMITTED_BY in os.environ


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message: "; did you mean ...?" with the nearest known word, or nothing where none is near."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


class InputError(ValueError):
    """Something the user gave (a job, a file, a folder, a model) cannot be used.

    The message is one sentence that says what is wrong, where, and what to do; the command line prints it alone and
    exits with code 2. Passwords and keys in it are taken out.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))


class Diverged(ArithmeticError):
    """Training produced a loss, gradient or theta that is not finite; the command line exits with code 3.

    The message names the task and the command that replays it. `task` is its name; or, where all tasks were finite but
    not what the step along their mean led to, `element` is the first place in theta.
    """

    def __init__(self, message: str, task: str | None = None, element: int | None = None):
        super().__init__(message)
        self.task, self.element = task, element

    def __reduce__(self) -> tuple[type["Diverged"], tuple[str, str | None, int | None]]:
        return type(self), (str(self), self.task, self.element)


class Interrupted(BaseException):
    """A signal asked the command to stop; a run under way has saved. The command line exits with 128 + its number.

    As KeyboardInterrupt it is no Exception: nothing that makes the best of a failure takes it for one.
    """

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by signal {signal_number}")
        self.signal_number = signal_number


class HeadLost(ConnectionError):
    """The head of the Ray cluster does not answer any more, without which Ray ends every driver.

    The message is one sentence; the command line prints it alone and exits with code 1.
    """


class StorageFailed(OSError):
    """A place that a run must write to (a full disk, a directory that became read-only, an object store that is gone).

    The message is one sentence; the command line prints it alone and exits with code 1. Passwords and keys in it are
    taken out.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))


class PlaceLost(StorageFailed):
    """A directory that a run writes to was removed, replaced or moved, or another run has taken it over."""


class EvaluationFailed(RuntimeError):
    """A run is trained and saved, but evaluating it failed. The message is one sentence; the command line prints it
    alone and exits with code 1. Passwords and keys in it are taken out.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))
