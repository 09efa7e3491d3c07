"""The `metadist` command: reads arguments, presents results and errors, and turns both into an exit code."""

import json
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType

import click

from metadist.cli.bench import bench
from metadist.cli.cluster import doctor, status, stop, submit
from metadist.cli.config import ANY_ARGUMENTS, config_group, learners
from metadist.cli.data import data
from metadist.cli.report import next_commands, report
from metadist.cli.runs import TRUST, evaluate, predict, replay, scale
from metadist.core.errors import Diverged, EvaluationFailed, HeadLost, InputError, Interrupted, StorageFailed
from metadist.core.files import finite
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


@commands.command(context_settings=ANY_ARGUMENTS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--resume", help="auto: continue what is in run_dir, or start; or the path of a run or checkpoint.")
@click.option("--address", help="Ray cluster, such as ray-head:6379; default RAY_ADDRESS, else one is started here.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, train nothing.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@TRUST
def train(
    arguments: tuple[str, ...], resume: str | None, address: str | None, dry_run: bool, quiet: bool, as_json: bool,
    trust_code: bool,
) -> None:  # fmt: skip
    """Train JOB.yaml [key=value ...], then evaluate.

    \b
    metadist train jobs/digits.yaml num_workers=2 --resume auto
    """
    from metadist.config import load_config, split_arguments
    from metadist.run import api
    from metadist.run.package import check_client

    check_client()
    files, overrides = split_arguments(arguments)
    if not files and not overrides:
        raise click.UsageError("name a job file, such as jobs/digits.yaml (`metadist config new` writes one)")
    if address:
        overrides.append(f"fleet.address={address}")
    config = load_config(files, overrides)
    if config.run_dir is None:
        name = Path(files[-1]).stem if files else "run"
        config = config.model_copy(update={"run_dir": str(Path("runs", name).absolute())})
    if dry_run:
        click.echo(json.dumps(api.dry_run(config), indent=2))
        return
    results = api.train(config, resume=resume, quiet=quiet, trust_code=trust_code)
    if as_json:
        click.echo(json.dumps(finite(results), indent=2))
        return
    click.echo(f"{report(results)}\n\n{next_commands(config, results)}")


for command in (evaluate, predict, scale, replay, submit, status, stop, doctor, data, bench, config_group, learners):
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
    """SIGTERM raises Interrupted meanwhile, so that what is half done is cleaned up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        del frame
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_command(arguments: list[str]) -> int:
    """Run a command; print an error as one sentence, its traceback with -v."""
    plain = [argument for argument in arguments if argument not in ("-v", "--verbose")]
    verbose = plain != arguments
    try:
        return commands.main(plain, prog_name="metadist", standalone_mode=False) or 0
    except (Interrupted, click.Abort):
        raise
    except click.ClickException as error:
        error.show()
        return 2
    except Exception as error:  # noqa: BLE001 - the last resort
        if verbose:
            to_stderr(traceback.format_exc())
        known = isinstance(error, KNOWN_ERRORS)
        hint = "" if known or verbose else " (-v shows the traceback)"
        to_stderr(f"metadist: {'' if known else type(error).__name__ + ': '}{error}{hint}")
        if isinstance(error, HeadLost):
            raise
        return 2 if isinstance(error, InputError) else 3 if isinstance(error, Diverged) else 1
