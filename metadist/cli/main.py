"""The `metadist` command: reads arguments, presents results and errors, and turns both into an exit code."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from types import FrameType

import click

from metadist.cli.bench import bench
from metadist.cli.cluster import doctor, status, stop, submit
from metadist.cli.config import config_group, learners
from metadist.cli.data import data
from metadist.cli.runs import compare, evaluate, replay, scale
from metadist.cli.train import train
from metadist.cli.use import demo, predict
from metadist.core.errors import Diverged, EvaluationFailed, HeadLost, InputError, Interrupted, StorageFailed
from metadist.core.redaction import to_stderr

KNOWN_ERRORS = (InputError, Diverged, StorageFailed, EvaluationFailed, HeadLost)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(metadata.version("metadist"), message="metadist %(version)s")
def commands() -> None:
    """Distributed meta-training: few-shot learners on Ray.

    \b
    metadist train jobs/digits.yaml
    metadist train jobs/digits.yaml num_workers=4 learner.inner_lr=0.2
    metadist evaluate runs/digits evaluation.inner_steps=10

    -v anywhere shows the traceback of an error.
    """


for command in (
    train, evaluate, compare, predict, demo, scale, replay, submit, status, stop, doctor, data, bench, config_group,
    learners,
):  # fmt: skip
    commands.add_command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, by default this process's, and return the exit code: 0 done, 1 failure, 2 bad input,
    3 diverged, 130 and 143 stopped by a signal. Raises HeadLost, printed already: that process cannot exit as usual."""
    try:
        with _terminable():
            return _run_command(list(sys.argv[1:] if argv is None else argv))
    except Interrupted as error:
        return 128 + error.signal_number
    except (click.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGINT and SIGTERM raise meanwhile, so that what is half done is cleaned up; a second one exits at once."""
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        del frame
        if received or isinstance(sys.exc_info()[1], KeyboardInterrupt | Interrupted):  # the first was a run's to take
            os._exit(128 + number)
        received.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else Interrupted(number)

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # jobs in a shell's background ignore it
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_command(arguments: list[str]) -> int:
    """Run a command; print an error as one sentence, its traceback with -v."""
    plain = [argument for argument in arguments if argument not in ("-v", "--verbose")]
    verbose = plain != arguments
    if "" in arguments:
        to_stderr("metadist: one of the arguments is empty, as of a variable that is not set: give it, or leave it out")
        return 2
    try:
        return commands.main(plain, prog_name="metadist", standalone_mode=False) or 0
    except (Interrupted, click.Abort):
        raise
    except click.ClickException as error:
        error.show()
        return 2
    except SystemExit as error:
        to_stderr(f"metadist: code that the command called, as of a model, ended it by sys.exit({error.code!r})")
        return 1
    except Exception as error:  # noqa: BLE001 - the last resort
        if verbose:
            to_stderr(traceback.format_exc())
        known = isinstance(error, KNOWN_ERRORS)
        hint = "" if known or verbose else " (-v shows the traceback)"
        to_stderr(f"metadist: {'' if known else type(error).__name__ + ': '}{error}{hint}")
        if isinstance(error, HeadLost):
            raise
        return 2 if isinstance(error, InputError) else 3 if isinstance(error, Diverged) else 1
