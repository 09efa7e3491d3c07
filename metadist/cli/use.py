"""`metadist predict` and `demo`: a trained run is used."""

from pathlib import Path

import click

from metadist.cli.config import ANY_ARGUMENTS
from metadist.cli.runs import TRUST
from metadist.core.redaction import redact, to_stderr


@click.command(context_settings=ANY_ARGUMENTS)
@click.argument("run_directory", metavar="RUN")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--support", help="Labelled examples: a folder of pictures per class, or a file or folder of rows, texts."
)
@click.option("--query", "queries", multiple=True, help="What to predict: a picture, text, table, or folder; several.")
@click.option("--label", help="Column of the labels, by default that of the run's own data.")
@click.option("--skip-bad", is_flag=True, help="Leave out pictures, texts, JSON lines that cannot be used, and say so.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the predictions to a .csv or .jsonl file.")
@click.option("--save", help="Save the adapted learner to a new folder, a RUN that needs no --support.")
@click.option("--checkpoint", default="best", show_default=True, help="best, latest or step_...")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each prediction.")
@TRUST
def predict(
    run_directory: str, arguments: tuple[str, ...], support: str | None, queries: tuple[str, ...], label: str | None,
    skip_bad: bool, out: Path | None, save: str | None, checkpoint: str, as_json: bool, trust_code: bool,
) -> None:  # fmt: skip
    """Adapt a RUN to a few labelled examples and predict others, all as files.

    \b
    metadist predict runs/birds --support garden --query new.jpg --query more_pictures
    metadist predict runs/visits --support ann.csv --query bob.csv --label clicked --out bob_clicks.csv
    metadist predict runs/intents --support few.jsonl --query "what is my balance"

    garden has a folder of pictures for each class; ann.csv the columns that the run's data had, and the labels, of
    which it may lack some where they mean the same in every task. Where the query has labels too, its accuracy is
    printed. Behind the options: more to predict, evaluation.inner_steps=10, evaluation.inner_lr=0.1, or
    evaluation.transductive=false, by which each prediction is made by itself.
    """
    from metadist.cli import predictions as predicting

    settings, more = predicting.split_words(arguments)
    asked = [*queries, *more]
    if not asked and not save:
        raise click.UsageError("name what to predict with --query (or keep the adapted learner with --save)")
    predicting.check_out(out)
    adapted = predicting.learner_for(run_directory, checkpoint, support, label, settings, trust_code, skip_bad)
    if save:
        adapted.save(save)
        to_stderr(f"saved {save}")
    if not asked:
        return
    rows = predicting.predictions(
        adapted, predicting.read(adapted.learner, asked, label, labelled=False, skip_bad=skip_bad)
    )
    if out:
        predicting.write(rows, out)
        to_stderr(f"{len(rows)} predictions in {out}")
    elif as_json:
        click.echo(predicting.as_json_lines(rows))
    else:
        click.echo(predicting.as_table(rows))
    if found := predicting.summary(rows, adapted.classes):
        (to_stderr if as_json else click.echo)(found if as_json or out else f"\n{found}")


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
    page.serve(learner, redact(Path(run_directory).name), port, browser, click.echo)
