"""What a dataset holds, for people and for programs: classes by split, ranges, texts cut, duplicates, warnings."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from metadist.core.task import SPLITS
from metadist.data.mapped import blocks
from metadist.data.notes import printable, sentence, shown
from metadist.data.table import Dataset, Field, Table, open_dataset
from metadist.data.tokenizer import UNKNOWN

FIRST = 5  # names shown of each split
MUCH = 0.1  # share of texts cut or tokens unknown from which a warning is given
LARGE = 30.0  # absolute value from which training is in danger
GROUPS = {"classes": "classes", "labelled": "groups", "values": "groups"}


def describe(path: str | Path, ways: int = 2, shots: int = 1, queries: int = 1) -> dict[str, Any]:
    """Kind, fields, splits (groups and parents with their first names, rows, smallest and largest group), stored value
    ranges, source, licence, digest, size in bytes, import options, notes of the import, in JSON-able terms. Of texts
    also the share of tokens unknown and of texts cut, by split, for which all tokens are read. `warnings` are for tasks
    of that many ways, shots and queries, by default the smallest there are. Raises InputError as `open_dataset` does.

    Example:
        >>> describe("data/digits", ways=3)["splits"]["test"]["groups"]
        3
    """
    dataset = open_dataset(path)
    found = {
        "path": str(path),
        "kind": dataset.kind,
        "fields": [asdict(field) | {"shape": list(field.shape)} for field in dataset.fields],
        "splits": {split: _split(dataset, table) for split, table in dataset.splits.items()},
        "ranges": _ranges(dataset),
        **{key: dataset.metadata[key] for key in ("source", "licence", "options", "extra", "notes")},
        "format_version": dataset.metadata["version"],
        "digest": dataset.digest,
        "size_bytes": sum(file.stat().st_size for file in dataset.path.iterdir() if file.is_file()),
    }
    return found | {"warnings": _warnings(dataset, found, ways, shots, queries)}


def _split(dataset: Dataset, table: Table) -> dict[str, Any]:
    names, counts = table.group_names, table.counts
    sizes = {"smallest": int(counts.argmin()), "largest": int(counts.argmax())} if len(counts) else {}
    told: dict[str, Any] = {
        "groups": len(names),
        "rows": table.num_rows,
        "rows_per_group": {"min": int(counts.min()), "max": int(counts.max())},
        "parents": len(table.parent_names),
        "first_groups": names[:FIRST],
        "first_parents": table.parent_names[:FIRST],
        **{size: {"group": names[group], "rows": int(counts[group])} for size, group in sizes.items()},
    }
    if _is_text(dataset):
        tokens, mask = (table.column(field.name) for field in dataset.fields[:2])
        unknown = sum(int(((tokens[rows] == UNKNOWN) & mask[rows]).sum()) for rows in blocks(tokens))
        told["tokens_unknown"] = unknown / max(1, sum(int(mask[rows].sum()) for rows in blocks(mask)))
        if "texts_cut" in dataset.metadata["extra"]:
            split = next(split for split, each in dataset.splits.items() if each is table)
            told["texts_cut"] = dataset.metadata["extra"]["texts_cut"].get(split, 0) / max(1, table.num_rows)
    return told


def _is_text(dataset: Dataset) -> bool:
    return "vocabulary_size" in dataset.metadata["extra"]


def _ranges(dataset: Dataset) -> dict[str, list[float]]:
    """Smallest and largest stored value of each field over all splits."""
    found: dict[str, list[float]] = {}
    for ranges in [table.metadata["ranges"] for table in dataset.splits.values()] + [dataset.shared_ranges]:
        for name, (low, high) in ranges.items():
            known = found.get(name, [low, high])
            found[name] = [min(low, known[0]), max(high, known[1])]
    return found


def _warnings(dataset: Dataset, found: dict[str, Any], ways: int, shots: int, queries: int) -> list[str]:
    """What will be in the way of training on tasks of these sizes, a sentence each."""
    warned = [
        f"there is no {split} split: {use}; import with a larger share in --fractions"
        for split, use in zip(
            SPLITS, ("nothing can be trained", "the best weights cannot be told", "nothing is left to test on"),
            strict=True,
        )
        if split not in dataset.splits
    ]  # fmt: skip
    for split, table in dataset.splits.items():
        warned += _warnings_of_split(split, table, ways, shots, queries)
    for field in dataset.fields:
        low, high = (_used(field, value) for value in found["ranges"][field.name])
        if low == high and field.role == "input" and field.dtype != "bool":
            warned.append(f"input {field.name!r} is {low:g} in all rows and says nothing: leave it out")
    warned += far_from_zero(dataset)
    for split, part in found["splits"].items():
        for key, what, remedy in (
            ("texts_cut", "texts are cut", "--length"), ("tokens_unknown", "tokens are unknown", "--vocabulary-size")
        ):  # fmt: skip
            if part.get(key, 0) > MUCH:
                warned.append(f"{part[key]:.0%} of the {what} in {split}: import with a larger {remedy}")
    return warned


def too_few_classes(found: dict[str, Any]) -> list[str]:
    """A sentence on each split of what `describe` found that has too few classes for any task."""
    if found["kind"] != "classes":
        return []
    splits = {split: part["groups"] for split, part in found["splits"].items()}
    remedy = more_classes(len(splits), sum(splits.values()))
    return [
        f"{split} has {count} class{'es' * (count != 1)}, and a task takes 2 or more: {remedy}"
        for split, count in splits.items()
        if count < 2
    ]


def more_classes(splits: int, classes: int) -> str:
    """What to do where so many splits have too few of so many classes."""
    if classes >= 2 * splits:
        return "divide the classes otherwise (--fractions, such as 0.5 0.2 0.3), or import more of them"
    need = f"import more classes: {splits} splits need at least {2 * splits}, 2 each, and there are {classes}"
    without = splits > 2 and classes >= 4  # of train and test
    return need + ("; or do without validation (--fractions 0.5 0 0.5)" if without else "")


def _warnings_of_split(split: str, table: Table, ways: int, shots: int, queries: int) -> list[str]:
    needed, size = shots + queries, f"{shots} shots and {queries} queries"
    what, total = GROUPS[table.kind], len(table.counts)
    if table.kind == "labelled":
        groups, rows = table.label_counts
        labels = np.bincount(groups[rows >= needed], minlength=total)
        fit, why = labels >= ways, f"{ways} labels with {needed} rows each ({size})"
    else:
        fit, why = table.counts >= needed, f"the {needed} rows that {size} take"
    usable, warned = int(fit.sum()), []
    if usable < total:
        example = shown(table.group_names[int(np.argmin(fit))])
        said = f"{total - usable:,} of {total:,} {what} of {split} have not {why} ({example!r} for example)"
        warned.append(f"{said}, and tasks pass over them: lower shots or queries, or give them more rows")
    if table.kind == "classes" and usable < ways:
        warned.append(f"{split} has {usable} classes to draw from and {ways} ways need {ways}: lower task.ways")
    elif table.kind == "classes" and usable < 2 * ways:
        warned.append(
            f"{split} has {usable} classes to draw from, so that its tasks of {ways} ways are nearly all the same "
            "classes: figures on them say little about new classes"
        )
    elif table.kind != "classes" and not usable:
        warned.append(f"{split} has no group to draw a task from")
    return warned


def far_from_zero(dataset: Dataset) -> list[str]:
    """A sentence for each input, and each target that is a value, whose numbers are large and were not scaled; those of
    identifiers are no sizes."""
    ranges, extra = _ranges(dataset), dataset.metadata["extra"]
    standardized, identifiers = extra.get("standardized", {}), extra.get("vocabularies", {})
    warned = []
    for field in () if _is_text(dataset) else dataset.fields:
        low, high = (_used(field, value) for value in ranges[field.name])
        scaled = field.offset != 0 or field.scale != 1 or field.name in standardized
        value = dataset.kind == "values" and "float" in field.dtype
        given = field.name not in identifiers if field.role == "input" else value
        if given and not scaled and max(abs(low), abs(high)) > LARGE:
            but = "" if "float" in field.dtype else ", unless they number things, for an embedding"
            warned.append(
                f"{field.role} {field.name!r} goes from {low:g} to {high:g}, and models learn badly from numbers so "
                f"far from 0: import with --standardize{but}"
            )
    return warned


def _used(field: Field, value: float) -> float:
    """A stored value as models get it."""
    scaled = field.dtype == "uint8" or "float" in field.dtype
    return (value - field.offset) * field.scale if scaled else value


def as_text(found: dict[str, Any]) -> str:
    """What `describe` found, for people."""
    what = GROUPS[found["kind"]]
    parts = found["splits"].values()
    total = f"{sum(part['groups'] for part in parts):,} {what}, {sum(part['rows'] for part in parts):,} rows"
    how = {name: value for name, value in found["options"].items() if name != "importer"}
    asked = ", ".join(f"{name} {_plain(value)}" for name, value in how.items() if value not in (None, False, [], ()))
    lines = [
        f"{found['path']}: {total}, {found['size_bytes'] / 1e6:,.1f} MB",
        f"source     {shown(found['source'])}; licence {shown(found['licence'])}",
        f"imported   {found['options'].get('importer', '')}{f' with {asked}' if asked else ''}",
        f"digest     {found['digest']}",
        "",
        "fields",
        *(f"  {line}" for field in found["fields"] for line in _field_lines(found, Field(**field))),
    ]
    for split, part in found["splits"].items():
        lines += ["", *_split_lines(split, part, what)]
    for title, told in (("notes of the import", list(map(sentence, found["notes"]))), ("warnings", found["warnings"])):
        lines += ["", title, *(f"  {line}" for line in told or ["none"])]
    return "\n".join(map(printable, lines))


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else shown(value)


def _field_lines(found: dict[str, Any], field: Field) -> list[str]:
    stored = found["ranges"][field.name]
    low, high = (_used(field, value) for value in stored)
    shape = f" {tuple(field.shape)}" if field.shape else ""
    text = f"{field.name:12} {field.role:7} {field.dtype}{shape}, {stored[0]:g} to {stored[1]:g}"
    used = f"; models get {low:.3g} to {high:.3g}" if [low, high] != stored else ""
    return [text + used + (", shared by rows" if field.shared else "")]


def _split_lines(split: str, part: dict[str, Any], what: str) -> list[str]:
    low, high = part["rows_per_group"].values()
    sizes = f"{low:,} each" if low == high else (
        f"from {low:,} ({shown(part['smallest']['group'])}) to {high:,} ({shown(part['largest']['group'])})"
    )  # fmt: skip
    parents = f" of {part['parents']:,} parents" if part["parents"] else ""
    lines = [f"{split}: {part['groups']:,} {what}{parents}, {part['rows']:,} rows, {sizes}"]
    lines.append(f"  {what:8} {_named(part['first_groups'], part['groups'])}")
    if part["parents"]:
        lines.append(f"  parents  {_named(part['first_parents'], part['parents'])}")
    texts = [(key, name) for key, name in (("tokens_unknown", "tokens unknown"), ("texts_cut", "cut")) if key in part]
    if texts:
        lines.append(f"  texts    {', '.join(f'{part[key]:.1%} {name}' for key, name in texts)}")
    return lines


def _named(names: list[str], total: int) -> str:
    more = f" and {total - len(names):,} more" if total > len(names) else ""
    return ", ".join(map(shown, names)) + more
