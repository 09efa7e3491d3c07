"""`metadist demo`: a trained run in the browser."""

from pathlib import Path

import click

from metadist.cli.runs import TRUST
from metadist.core.redaction import redact


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
