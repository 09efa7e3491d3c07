"""The `metadist` command: reads arguments, presents results and errors, and is the only file that exits."""

import json
import os
import shlex
import signal
import sys
import traceback
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import click

from metadist.cli.arguments import quoted, split_arguments
from metadist.cli.bench import bench
from metadist.cli.data import data
from metadist.core.errors import Diverged, EvaluationFailed, HeadLost, InputError, Interrupted, StorageFailed
from metadist.core.files import finite
from metadist.core.redaction import to_stderr

ANY_ARGUMENTS = {"ignore_unknown_options": True}
TRUST = click.option("--trust-code", is_flag=True, help="Follow the code, address and places that a saved run names.")


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


commands.add_command(data)
commands.add_command(bench)


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
    from metadist import config as configuration
    from metadist.run import api as run
    from metadist.run.trust import trust_flag

    files, overrides = split_arguments(arguments)
    if not files and not overrides:
        raise click.UsageError("name a job file, such as jobs/digits.yaml (`metadist config new` writes one)")
    if address:
        overrides.append(f"fleet.address={address}")
    config = configuration.load_config(files, overrides)
    if config.run_dir is None:
        name = Path(files[-1]).stem if files else "run"
        config = config.model_copy(update={"run_dir": str(Path("runs", name).absolute())})
    if dry_run:
        click.echo(json.dumps(run.dry_run(config), indent=2))
        return
    told = run.train(config, resume=resume, quiet=quiet, trust_code=trust_code)
    click.echo(json.dumps(finite(told), indent=2) if as_json else report(told))
    if not as_json:
        click.echo(f"\nresults    {quoted(Path(config.run_dir or '', 'results.json'))}")
        other = "evaluation.inner_steps=10" if told["protocol"]["inner_steps"] else "evaluation.test_tasks=1000"
        click.echo(f"evaluate   metadist evaluate {quoted(config.run_dir or '')} {other}{trust_flag(config)}")
        if config.tracking.mlflow and not (config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")):
            assert config.run_dir
            database = Path(config.run_dir).absolute().parent / "mlflow.db"
            click.echo(f"watch      mlflow ui --backend-store-uri {shlex.quote(f'sqlite:///{database}')}")


@commands.command(context_settings=ANY_ARGUMENTS)
@click.argument("run_directory", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--checkpoint", default="best", show_default=True, help="best, latest or step_...")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@TRUST
def evaluate(run_directory: Path, arguments: tuple[str, ...], checkpoint: str, as_json: bool, trust_code: bool) -> None:
    """Evaluate a RUN again, with what FILE.yaml or key=value say changed.

    \b
    metadist evaluate runs/digits evaluation.inner_steps=10 evaluation.transductive=false
    """
    from metadist import config as configuration
    from metadist.config.load import given_settings
    from metadist.run import api as run
    from metadist.run.predictor import config_file

    files, overrides = split_arguments(arguments)
    config = configuration.load_config([config_file(run_directory), *files], overrides)
    own = given_settings(files, overrides)
    told = run.evaluate(config, run_directory, checkpoint=checkpoint, say=to_stderr, trust_code=trust_code, own=own)
    click.echo(json.dumps(finite(told), indent=2) if as_json else f"{report(told)}\n\nresults    {told['folder']}")


@commands.command(context_settings={"ignore_unknown_options": True})  # so that -1 is a number
@click.argument("run_directory", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("workers", type=int)
def scale(run_directory: Path, workers: int) -> None:
    """Have a running job use another number of WORKERS from its next meta-step."""
    from metadist.run import directory as run_dir

    run_dir.scale(run_directory, workers)
    ended = (run_directory / "results.json").exists()
    click.echo(f"{run_directory} {'has ended; resumed, it' if ended else 'will'} use{'s' * ended} {workers} workers")


@commands.command()
@click.argument("run_directory", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--verify", is_flag=True, help="Compare theta with every hash in the journal (the default without --task)."
)
@click.option("--task", "task_name", help="Compute one task, such as train:120:7, step by step instead.")
@TRUST
def replay(run_directory: Path, verify: bool, task_name: str | None, trust_code: bool) -> None:
    """Compute a run again from its journal, on one worker, and compare the bits; or look at one task.

    \b
    metadist replay runs/digits --verify
    metadist replay runs/digits --task train:120:7
    """
    del verify
    from metadist.core.task import TaskId
    from metadist.run import replay as replaying

    if task_name is None:
        click.echo(json.dumps(replaying.replay(run_directory, to_stderr, trust_code=trust_code), indent=2))
        return
    try:
        task_id = TaskId.parse(task_name)
    except ValueError as error:
        raise InputError(f"--task {task_name}: write it as train:STEP:INDEX ({error})") from None
    for row in replaying.replay_task(run_directory, task_id, trust_code=trust_code):
        click.echo(json.dumps(row))


@commands.command()
def learners() -> None:
    """The algorithms, with their papers, the engines that compute them and their options with defaults.

    Options go into a job as learner.OPTION; learner.inner_optimizer is one of sgd, momentum and adam, with their
    arguments ({name: adam, beta1: 0}), or your own `module:callable`. jobs/learners/ has a job for each.
    """
    from dataclasses import fields

    from metadist.learners import LEARNERS

    for name, (kind, preset, line) in LEARNERS.items():
        own = [
            field
            for field in fields(kind)
            if field.name not in ("model", "loss", "inner_optimizer", *preset, *kind.refused)
        ]
        options = [f"{field.name}={field.default}" for field in own]
        options += ["inner_optimizer=sgd"] if "inner_optimizer" in kind.__dataclass_fields__ else []
        click.echo(
            f"{name:15} {line}\n{'':15} engines: {', '.join(kind.engines)}; {', '.join(options) or 'no options'}"
        )


@commands.group()
def config() -> None:
    """Look at, check or begin a job file."""


@config.command(context_settings=ANY_ARGUMENTS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def show(arguments: tuple[str, ...]) -> None:
    """Print JOB.yaml [key=value ...] with every default filled in."""
    from metadist import config as configuration

    click.echo(configuration.dump_config(configuration.load_config(*split_arguments(arguments))), nl=False)


@config.command(context_settings=ANY_ARGUMENTS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def validate(arguments: tuple[str, ...]) -> None:
    """Say what is wrong with the settings of JOB.yaml [key=value ...], or that nothing is.

    Whether data, model, loss and learner fit together is what `metadist train --dry-run` finds out.
    """
    from metadist import config as configuration

    configuration.load_config(*split_arguments(arguments))
    click.echo("valid")


@config.command()
def schema() -> None:
    """The JSON schema of a job file, for editors."""
    from metadist.config import Config

    click.echo(json.dumps(Config.model_json_schema(), indent=2))


@config.command()
@click.argument("name")
def new(name: str) -> None:
    """Write NAME.yaml, a job that runs as it is."""
    from metadist.config.template import new_job

    path = Path(name).with_suffix(".yaml")
    if path.exists():
        raise InputError(f"{path} exists; choose another name")
    path.write_text(new_job())
    click.echo(f"wrote {path}: metadist train {quoted(path)}")


def report(told: dict[str, Any]) -> str:
    """The results as a table for people."""
    protocol = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in told["protocol"].items())
    metric = "accuracy" if "accuracy" in told else "loss"
    lines = [f"theta      {told['theta_sha256']} after {told['meta_steps']} steps"] if "theta_sha256" in told else []
    lines.append(f"evaluated  {told['evaluated_theta_sha256']} (step {told['evaluated_step']})")
    lines += [f"protocol   {protocol}", "", f"{metric} (mean, 95 % interval)"]
    for k, point in enumerate(told[metric]["by_inner_step"]):
        label = f"after {k} inner steps" if k else told["begun"]
        lines.append(f"  {label:24} {_figure(metric, point)}")
    for name, measured in told["baselines"].items():
        points = measured[metric] if isinstance(measured[metric], list) else [measured[metric]]
        for k, point in enumerate(points):
            label = name.replace("_", " ") + (f", {k} steps" if len(points) > 1 else "")
            some = f" ({measured['tasks']} tasks)" if measured["tasks"] < told["protocol"]["tasks"] else ""
            lines.append(f"  {label:24} {_figure(metric, point)}{some}")
    if "divergence" in told:
        lines += ["", f"diverged   {told['divergence']}"]
    if lost := told.get("online", {}).get("losses"):
        rounds = f"{len(lost)} rounds, loss {lost[0]:.4f} in the first, {lost[-1]:.4f} in the last"
        lines += ["", f"online     {rounds}, regret {told['online']['regret']:.4f}"]
    return "\n".join(lines)


def _figure(metric: str, point: dict[str, float]) -> str:
    if point.get("diverged_tasks"):
        return f"none: {point['diverged_tasks']} tasks diverged"
    if metric == "accuracy":
        return f"{100 * point['mean']:.2f} % ± {100 * point['ci95']:.2f}"
    return f"{point['mean']:.4f} ± {point['ci95']:.4f}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    del frame
    raise Interrupted(number)


def main() -> None:
    """Run a command and exit: 0 done, 1 failure, 2 bad input, 3 diverged, 130 and 143 stopped by a signal."""
    signal.signal(signal.SIGTERM, _interrupt)  # an exception, so that what is half done is cleaned up
    try:
        try:
            code = _run_command()
        finally:  # nothing is left to clean up: from here on a signal ends the process, without a traceback
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
    except (Interrupted, KeyboardInterrupt) as error:
        code = 128 + error.signal_number if isinstance(error, Interrupted) else 130
    sys.exit(code)


def _run_command() -> int:
    """Run what was typed; errors are told, and become exit codes."""
    arguments = [argument for argument in sys.argv[1:] if argument not in ("-v", "--verbose")]
    verbose = len(arguments) < len(sys.argv) - 1
    try:
        return commands.main(arguments, prog_name="metadist", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 130
    except Interrupted as error:
        return 128 + error.signal_number
    except Exception as error:  # noqa: BLE001 - the last resort; its traceback is one -v away
        if verbose:
            to_stderr(traceback.format_exc())
        known = isinstance(error, InputError | Diverged | StorageFailed | EvaluationFailed | HeadLost)
        hint = "" if known or verbose else " (-v shows the traceback)"
        to_stderr(f"metadist: {'' if known else type(error).__name__ + ': '}{error}{hint}")
        code = 2 if isinstance(error, InputError) else 3 if isinstance(error, Diverged) else 1
        if isinstance(error, HeadLost):
            from metadist.fleet.ray.cluster import exit_without_head

            exit_without_head(code)
        return code
