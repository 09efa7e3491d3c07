"""`metadist data ...`: from raw data to a dataset directory."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from metadist.core.redaction import to_stderr


def _out(command: Callable[..., None]) -> Callable[..., None]:
    """The options every importer has."""
    command = click.option("--overwrite", is_flag=True, help="Replace a dataset that is there.")(command)
    command = click.option("--seed", default=0, show_default=True, help="Of the random split.")(command)
    return click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to write.")(command)


def _source(help_text: str) -> Callable[..., Any]:
    return click.option("--source", required=True, type=click.Path(path_type=Path), help=help_text)


def _skip_bad(command: Callable[..., None]) -> Callable[..., None]:
    text = "Leave out what cannot be used, and say how much."
    return click.option("--skip-bad", is_flag=True, help=text)(command)


def _fractions(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--fractions", nargs=3, type=float, default=(0.64, 0.16, 0.20), show_default=True,
        help="Of the groups, for train, validation and test.",
    )(command)  # fmt: skip


class _Progress:
    """Rows done, on stderr: a live line on a terminal, else a line every few seconds."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._told < (0.2 if self._live else 5):
            return
        self._told = now
        text = f"{done} of {total} rows"
        print(f"\r{text}" if self._live else text, end="" if self._live and done < total else "\n", file=sys.stderr)


def _import(importer: str, **options: Any) -> None:
    from metadist.data import describe, importers
    from metadist.data.notes import sentence

    path = getattr(importers, importer)(**options, progress=_Progress())
    found = describe(path)
    for note in found["notes"]:
        to_stderr(f"note: {sentence(note)}")
    splits = found["splits"].items()
    told = ", ".join(f"{split} {part['groups']} groups with {part['rows']} rows" for split, part in splits)
    count = len(found["notes"])
    kept = f" ({count} note{'s' * (count > 1)} above, kept in `metadist data describe`)" if count else ""
    click.echo(f"{path}: {told}{kept}")


@click.group()
def data() -> None:
    """Make a dataset directory, or look at one.

    \b
    metadist data digits --out data/digits
    metadist data describe data/digits
    """


@data.command()
@_source("Folder with the official images_background.zip and images_evaluation.zip, or the folders in them.")
@_out
@click.option("--split", type=click.Choice(["paper", "lake"]), default="paper", show_default=True,
              help="1200 random characters to train and validate on, or the official two halves.")  # fmt: skip
@click.option("--rotations", type=click.Choice(["none", "train", "all"]), default="none", show_default=True,
              help="Characters turned by 90, 180 and 270 degrees as further classes.")  # fmt: skip
@click.option("--size", default=28, show_default=True, help="Pixels.")
def omniglot(**options: Any) -> None:
    """Handwritten characters of 50 alphabets (Lake et al. 2015).

    \b
    metadist data omniglot --source DOWNLOADS --out data/omniglot
    """
    _import("omniglot", **options)


@data.command()
@_source("Folder with a folder per class, or train/, validation/ and test/ with a folder per class each.")
@_out
@_fractions
@_skip_bad
@click.option("--size", nargs=2, type=int, default=(84, 84), show_default=True, help="Height and width, pixels.")
@click.option("--mode", type=click.Choice(["color", "gray"]), default="color", show_default=True)
def images(**options: Any) -> None:
    """Your own images, a folder per class.

    \b
    metadist data images --source birds --size 84 84 --out data/birds
    """
    _import("images", **options)


@data.command()
@_source("Parquet, CSV, TSV or Arrow file, or a folder of them.")
@_out
@_fractions
@_skip_bad
@click.option("--group", required=True, help="Column that says which rows belong together (class, user, target).")
@click.option("--input", "inputs", multiple=True, required=True,
              help="Feature column, or NAME=COL,COL,... for a vector; repeat it for several inputs.")  # fmt: skip
@click.option("--target", "targets", multiple=True, help="Target column(s); without one the group is the class.")
@click.option("--parent", help="Column with the group's superclass.")
@click.option("--split-column", help="Column that says train, validation or test.")
@click.option("--kind", type=click.Choice(["classes", "labelled", "values"]), help="Default: by the target's type.")
@click.option("--share", help="Column whose equal values share their inputs, stored once.")
@click.option(
    "--standardize",
    is_flag=True,
    help="Shift and scale every number by its mean and deviation in train; integers become floats.",
)
def table(**options: Any) -> None:
    """Your own table.

    \b
    metadist data table --source visits.parquet --group user --input x=age,income --target clicked --out data/visits
    """
    _import("table", **options)


@data.command()
@_source("CSV or JSON lines file.")
@_out
@_fractions
@_skip_bad
@click.option("--text", default="text", show_default=True, help="Column with the text.")
@click.option("--label", default="label", show_default=True, help="Column with the class.")
@click.option("--parent", help="Column with the class's superclass.")
@click.option("--split-column", help="Column that says train, validation or test.")
@click.option("--length", default=32, show_default=True, help="Tokens kept of each text.")
@click.option("--vocabulary-size", default=4000, show_default=True)
def text(**options: Any) -> None:
    """Your own texts with labels.

    \b
    metadist data text --source intents.jsonl --label intent --out data/intents
    """
    _import("text", **options)


@data.command()
@_out
@click.option("--groups", nargs=3, type=int, default=(20000, 500, 1000), show_default=True,
              help="Functions for train, validation and test.")  # fmt: skip
@click.option("--points", default=50, show_default=True, help="Points of each.")
def sinusoid(**options: Any) -> None:
    """Sine curves of random amplitude and phase (Finn et al. 2017).

    \b
    metadist data sinusoid --out data/sinusoid
    """
    _import("sinusoid", **options)


@data.command()
@_out
@click.option("--turned/--upright", default=True, show_default=True,
              help="Training digits in their seven other orientations as further classes.")  # fmt: skip
def digits(**options: Any) -> None:
    """scikit-learn's 8x8 handwritten digits; works offline.

    \b
    metadist data digits --out data/digits
    """
    _import("digits", **options)


@data.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read everything and recompute the digests.")
def describe(directory: Path, verify: bool) -> None:
    """What a dataset directory holds, as JSON."""
    from metadist.data import describe as describe_data
    from metadist.data import open_dataset

    if verify:
        open_dataset(directory, verify=True)
    click.echo(json.dumps(describe_data(directory), indent=2))
