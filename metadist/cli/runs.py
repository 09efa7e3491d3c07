"""`metadist evaluate`, `predict`, `scale` and `replay`: what is done with a run that is there."""

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


@click.command(context_settings=ANY_ARGUMENTS)
@click.argument("run_directory", metavar="RUN")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--support", help="Labelled examples: a folder of pictures per class, or a file or folder of rows, texts."
)
@click.option("--query", "queries", multiple=True, help="What to predict: a picture, text, table, or folder; several.")
@click.option("--label", help="Column of the labels, by default that of the run's own data.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the predictions to a .csv or .jsonl file.")
@click.option("--save", help="Save the adapted learner to a new folder, a RUN that needs no --support.")
@click.option("--checkpoint", default="best", show_default=True, help="best, latest or step_...")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each prediction.")
@TRUST
def predict(
    run_directory: str, arguments: tuple[str, ...], support: str | None, queries: tuple[str, ...], label: str | None,
    out: Path | None, save: str | None, checkpoint: str, as_json: bool, trust_code: bool,
) -> None:  # fmt: skip
    """Adapt a RUN to a few labelled examples and predict others, all as files.

    \b
    metadist predict runs/birds --support garden --query new.jpg --query more_pictures
    metadist predict runs/visits --support ann.csv --query bob.csv --label clicked --out bob_clicks.csv
    metadist predict runs/intents --support few.jsonl --query "what is my balance"

    garden has a folder of pictures for each class; ann.csv the columns that the run's data had, and the labels. Where
    the query has labels too, its accuracy is printed. Behind the options: more to predict, evaluation.inner_steps=10,
    evaluation.inner_lr=0.1, or evaluation.transductive=false, by which each prediction is made by itself.
    """
    from metadist.cli import predict as predicting

    settings, more = predicting.split_words(arguments)
    asked = [*queries, *more]
    if not asked and not save:
        raise click.UsageError("name what to predict with --query (or keep the adapted learner with --save)")
    predicting.check_out(out)
    adapted = predicting.learner_for(run_directory, checkpoint, support, label, settings, trust_code)
    if save:
        adapted.save(save)
        to_stderr(f"saved {save}")
    if not asked:
        return
    rows = predicting.predictions(adapted, predicting.read(adapted.learner, asked, label, labelled=False))
    if out:
        predicting.write(rows, out)
        to_stderr(f"{len(rows)} predictions in {out}")
    elif as_json:
        click.echo(predicting.as_json_lines(rows))
    else:
        click.echo(predicting.as_table(rows))
    if found := predicting.summary(rows, adapted.classes):
        (to_stderr if as_json else click.echo)(found if as_json or out else f"\n{found}")


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
