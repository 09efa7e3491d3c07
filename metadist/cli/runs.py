"""`metadist evaluate`, `compare`, `scale` and `replay`: what is done with runs that are there."""

import json

import click

from metadist.cli.config import ANY_ARGUMENTS
from metadist.cli.report import compared, report
from metadist.core.files import finite
from metadist.core.redaction import redact, to_stderr

TRUST = click.option("--trust-code", is_flag=True, help="Follow the code, address and places that a saved run names.")
OF_TRAINING = {
    "run_dir", "meta_steps", "max_time_s", "evaluation.every", "evaluation.patience", "evaluation.tasks",
    "checkpoint.every", "checkpoint.every_s", "checkpoint.keep_last",
}  # fmt: skip
"""Settings that say nothing to an evaluation, and may have changed since."""


@click.command(context_settings=ANY_ARGUMENTS)
@click.argument("run_directory", metavar="RUN")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--checkpoint", default="best", show_default=True, help="best, latest or step_...")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@TRUST
def evaluate(run_directory: str, arguments: tuple[str, ...], checkpoint: str, as_json: bool, trust_code: bool) -> None:
    """Evaluate a RUN again, with what FILE.yaml or key=value say changed.

    \b
    metadist evaluate runs/digits evaluation.inner_steps=10 evaluation.transductive=false
    """
    from metadist.config import given_settings
    from metadist.run import evaluate as evaluation
    from metadist.run.job_file import load_config, split_arguments
    from metadist.run.saved import config_file
    from metadist.tracking.console import ConsoleTracker

    files, overrides = split_arguments(arguments)
    config = load_config([config_file(run_directory), *files], overrides)
    typed = given_settings(files, overrides)
    of_training = sorted(given_settings([], overrides) & OF_TRAINING)
    console = ConsoleTracker(0)
    try:
        if of_training:
            console.say(f"{', '.join(of_training)}: of training alone, which an evaluation does not look at")
        results = evaluation.evaluate(
            config, run_directory, checkpoint=checkpoint, say=console.say, doing=console.doing, trust_code=trust_code,
            own=typed,
        )  # fmt: skip
    finally:
        console.finish("FINISHED")
    click.echo(
        json.dumps(finite(results), indent=2) if as_json else f"{report(results)}\n\nresults    {results['folder']}"
    )


@click.command()
@click.argument("runs", metavar="RUN RUN...", nargs=-1, required=True)
@click.option("--figure", type=click.Path(), help="Write a PNG of the comparison.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def compare(runs: tuple[str, ...], figure: str | None, as_json: bool) -> None:
    """How much better finished RUNs are than the first of them, with 95 % intervals.

    \b
    metadist compare runs/maml runs/protonet --figure compared.png

    Where the tasks of evaluation are the same (data, seed, split, ways, shots, queries), differences are paired over
    tasks, which makes their intervals narrow. Runs on other data are shown beside it, without a word on which is
    better. A RUN may also be the folder that `metadist evaluate` prints. An interval
    is of one run each: how much another seed's training would change it is not in it.
    """
    from metadist.run import compare as comparing

    if len(runs) < 2:
        raise click.UsageError("name two runs or more, the first of which the others are compared with")
    rows = comparing.compare(runs, figure)
    click.echo(json.dumps(finite(rows), indent=2) if as_json else compared(rows))
    if figure:
        to_stderr(f"wrote {figure}")


@click.command(context_settings={"ignore_unknown_options": True})  # so that -1 is a number
@click.argument("run_directory", metavar="RUN")
@click.argument("workers", type=int)
def scale(run_directory: str, workers: int) -> None:
    """Have a running job use another number of WORKERS from its next meta-step.

    \b
    metadist scale runs/digits 8
    """
    from metadist.run import saved

    ended, name = saved.scale(run_directory, workers), redact(run_directory)
    click.echo(f"{name} {'has ended; resumed, it' if ended else 'will'} use{'s' * ended} {workers} workers")


@click.command()
@click.argument("run_directory", metavar="RUN")
@click.option(
    "--verify", is_flag=True, help="Compare theta with every hash in the journal (the default without --task)."
)
@click.option("--task", "task_name", help="Compute one task, such as train:120:7, step by step instead.")
@TRUST
def replay(run_directory: str, verify: bool, task_name: str | None, trust_code: bool) -> None:
    """Compute a run again from its journal, on one worker, and compare the bits; or look at one task.

    \b
    metadist replay runs/digits --verify
    metadist replay runs/digits --task train:120:7
    """
    del verify
    from metadist.run import replay as replaying

    if task_name is None:
        click.echo(json.dumps(replaying.replay(run_directory, to_stderr, trust_code=trust_code), indent=2))
        return
    for row in replaying.replay_task(run_directory, task_name, trust_code=trust_code):
        click.echo(json.dumps(row))
