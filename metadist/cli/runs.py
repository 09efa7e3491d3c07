"""`metadist evaluate`, `scale`, `replay` and `demo`: what is done with a run that is there."""

import json
from pathlib import Path

import click

from metadist.cli.config import ANY_ARGUMENTS
from metadist.cli.report import report
from metadist.core.files import finite
from metadist.core.redaction import redact, to_stderr

TRUST = click.option("--trust-code", is_flag=True, help="Follow the code, address and places that a saved run names.")


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
    from metadist.config import given_settings, load_config, split_arguments
    from metadist.run import evaluate as evaluation
    from metadist.run.saved import config_file

    files, overrides = split_arguments(arguments)
    config = load_config([config_file(run_directory), *files], overrides)
    typed = given_settings(files, overrides)
    results = evaluation.evaluate(
        config, run_directory, checkpoint=checkpoint, say=to_stderr, trust_code=trust_code, own=typed
    )
    click.echo(
        json.dumps(finite(results), indent=2) if as_json else f"{report(results)}\n\nresults    {results['folder']}"
    )


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


@click.command()
@click.argument("run_directory", metavar="RUN")
@click.option("--port", type=click.IntRange(1, 65535), help="Of the page, on this machine only; default: a free one.")
@click.option("--browser/--no-browser", default=True, show_default=True, help="Open it in the browser.")
@click.option("--checkpoint", default="best", show_default=True, help="best, latest or step_...")
@TRUST
def demo(run_directory: str, port: int | None, browser: bool, checkpoint: str, trust_code: bool) -> None:
    """Show a RUN in the browser: draw or type a few examples of each class, then ask it.

    \b
    metadist demo runs/letters
    """
    from metadist.run import demo as page
    from metadist.run.predictor import load

    learner = load(run_directory, checkpoint, trust_code=trust_code)
    page.serve(learner, redact(Path(run_directory).name), port, browser)
