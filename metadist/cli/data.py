"""`metadist data ...`: from raw data to a dataset directory. Each importer's command is made from its signature."""

import inspect
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from metadist.core.redaction import to_stderr
from metadist.data.progress import RowProgress

FLAGS = {
    "inputs": "--input",
    "targets": "--target",
    "categories": "--category",
    "identifiers": "--identifier",
    "integers": "--integer",
    "turned": "--turned/--upright",
}  # where not --NAME


def _import(importer: Callable[..., Path], **options: Any) -> None:
    from metadist.data import describe
    from metadist.data.description import too_few_classes
    from metadist.data.notes import sentence

    path = importer(**options, progress=RowProgress(importer.__name__))
    found = describe(path)
    for note in found["notes"]:
        to_stderr(f"note: {sentence(note)}")
    for warning in too_few_classes(found):
        to_stderr(f"note: {warning}")
    splits = found["splits"].items()
    sizes = ", ".join(f"{split} {part['groups']} groups with {part['rows']} rows" for split, part in splits)
    count = len(found["notes"])
    more = f" ({count} note{'s' * (count > 1)} above, kept in `metadist data describe`)" if count else ""
    click.echo(f"{path}: {sizes}{more}")


class _Importers(click.Group):
    """The commands of the group, and one per importer, imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from metadist.data import importers

        return sorted([*super().list_commands(ctx), *(name.replace("_", "-") for name in importers.__all__)])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from metadist.data import importers

        name = cmd_name.replace("-", "_")
        if name not in importers.__all__:
            return super().get_command(ctx, cmd_name)
        importer = getattr(importers, name)
        text, _, rest = inspect.cleandoc(importer.__doc__).partition("\nArgs:\n")
        arguments, _, example = rest.partition("\nExample:\n")
        said = dict(re.findall(r"^    (\w+): ((?:.|\n      )+)", arguments, re.MULTILINE))
        helps = {name: " ".join((words[0].upper() + words[1:]).split()) for name, words in said.items()}
        hints = get_type_hints(importer)
        parameters = inspect.signature(importer).parameters.values()
        options: list[click.Parameter] = [
            _option(p, hints[p.name], helps[p.name]) for p in parameters if p.name != "progress"
        ]
        help_text = f"{text}\n\b\n{inspect.cleandoc(example)}"
        return click.Command(cmd_name, params=options, callback=partial(_import, importer), help=help_text)


def _option(parameter: inspect.Parameter, hint: Any, help_text: str) -> click.Option:
    name, default = parameter.name, parameter.default
    optional = get_origin(hint) in (Union, UnionType)  # "str | None" or "str | Path"
    kind = get_args(hint)[0] if optional else hint
    required = default is parameter.empty and type(None) not in get_args(hint)
    chosen: dict[str, Any] = {"required": required, "help": help_text}
    if get_origin(kind) is Literal:
        chosen["type"] = click.Choice(get_args(kind))
    elif name in ("source", "out"):
        chosen["type"] = click.Path(path_type=Path)
        chosen["multiple"] = any(get_origin(each) is Sequence for each in get_args(hint))
    elif kind is bool:
        chosen["is_flag"] = True
    elif isinstance(default, tuple) and default:
        chosen |= {"nargs": len(default), "type": type(default[0])}
    elif get_origin(kind) is not None:  # a sequence of texts: the option is repeated
        chosen["multiple"] = True
    else:
        chosen["type"] = kind
    if default is not parameter.empty:
        chosen |= {"default": default, "show_default": default is not None and default is not False and default != ()}
    return click.Option([FLAGS.get(name, f"--{name.replace('_', '-')}"), name], **chosen)


@click.group(cls=_Importers)
def data() -> None:
    """Make a dataset directory, or look at one.

    \b
    metadist data digits --out data/digits
    metadist data describe data/digits
    """


@data.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--ways", default=2, show_default=True, help="Of the tasks that the warnings are about: classes.")
@click.option("--shots", default=1, show_default=True, help="Likewise: support examples of each class.")
@click.option("--queries", default=1, show_default=True, help="Likewise: query examples of each class.")
@click.option("--figure", type=click.Path(path_type=Path), help="Draw some pictures of each split into this PNG file.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@click.option("--verify", is_flag=True, help="Read everything and recompute the digests.")
def describe(
    directory: Path, ways: int, shots: int, queries: int, figure: Path | None, as_json: bool, verify: bool
) -> None:
    """What a dataset directory holds: classes by split, ranges, notes of the import, and what to beware of.

    \b
    metadist data describe data/digits --ways 3
    metadist data describe data/digits --figure digits.png
    """
    from metadist.data import open_dataset
    from metadist.data.contact_sheet import contact_sheet
    from metadist.data.description import as_text
    from metadist.data.description import describe as describe_data

    if verify:
        open_dataset(directory, verify=True)
    found = describe_data(directory, ways, shots, queries)
    if figure is not None:
        contact_sheet(open_dataset(directory), figure)
        to_stderr(f"wrote {figure}")
    click.echo(json.dumps(found, indent=2) if as_json else as_text(found))
