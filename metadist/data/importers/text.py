"""Labelled text (CSV, TSV or JSON lines), tokenized and padded."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metadist.data.splits import FRACTIONS, did_you_mean, divide, split_named
from metadist.data.table import Field
from metadist.data.tokenizer import PAD, Tokenizer, words
from metadist.data.writer import VOCABULARY, About, DatasetWriter, Group, Progress, staging
from metadist.errors import InputError
from metadist.task import Split

BLOCK_ROWS = 4096


class Columns(NamedTuple):
    text: str
    label: str
    parent: str | None
    split: str | None


class Row(NamedTuple):
    where: str
    text: str
    label: str
    parent: str | None
    split: str | None


def text(
    source: str | Path,
    out: str | Path,
    *,
    text: str = "text",
    label: str = "label",
    parent: str | None = None,
    length: int = 32,
    vocabulary_size: int = 4000,
    split_column: str | None = None,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Import a .csv, .tsv, .jsonl, .ndjson or .json (one object per line) file; the arguments name its columns.

    Fields `tokens`: int32 (length,) and `tokens_mask`: bool (length,), True where there is a token. The groups are the
    labels; they are split by `split_column`, else by `fractions` and `seed`. The vocabulary (0 pad, 1 unknown) comes
    from the train split alone and is saved as `vocabulary.json`.
    """
    source, columns = Path(source), Columns(text, label, parent, split_column)
    if length < 1 or vocabulary_size < 3:
        raise InputError(f"text takes length >= 1 and vocabulary_size >= 3; not {length} and {vocabulary_size}")
    with staging(out, overwrite) as directory:
        groups = _groups(source, columns, fractions, seed)
        tokenizer = _vocabulary(source, columns, groups, vocabulary_size)
        tokenizer.save(directory / VOCABULARY)
        options = {"importer": "text", "text": text, "label": label, "parent": parent, "length": length}
        options |= {"vocabulary_size": vocabulary_size, "split_column": split_column}
        options |= {"fractions": list(fractions), "seed": seed}
        extra = {"vocabulary_size": len(tokenizer.pieces)}
        about = About("classes", str(source), "as its source says", options, extra)
        fields = [Field("tokens", "input", "int32", (length,)), Field("tokens_mask", "input", "bool", (length,))]
        writer = DatasetWriter(directory, fields, list(groups.values()), about, progress=progress)
        _write(writer, _rows(source, columns), tokenizer, length)
        writer.finish()
    return Path(out)


def _write(writer: DatasetWriter, rows: Iterator[Row], tokenizer: Tokenizer, length: int) -> None:
    numbers = {group.name: number for number, group in enumerate(writer.groups)}
    codes: list[int] = []
    block: list[np.ndarray] = []

    def flush() -> None:
        tokens = np.stack(block)
        writer.add(np.array(codes), {"tokens": tokens, "tokens_mask": tokens != PAD})
        codes.clear()
        block.clear()

    for row in rows:
        codes.append(numbers[row.label])
        block.append(tokenizer.encode(row.text, length))
        if len(block) == BLOCK_ROWS:
            flush()
    if block:
        flush()


def _vocabulary(source: Path, columns: Columns, groups: dict[str, Group], size: int) -> Tokenizer:
    counts: Counter[str] = Counter()
    for row in _rows(source, columns):
        if groups[row.label].split == "train":
            counts.update(words(row.text))
    return Tokenizer.build(counts, size)


def _groups(source: Path, columns: Columns, fractions: Sequence[float], seed: int) -> dict[str, Group]:
    """The labels with their rows, parents and splits."""
    groups: dict[str, Group] = {}
    for row in _rows(source, columns):
        split: Split | None = "train" if row.split is None else split_named(row.split)
        if split is None:
            raise InputError(f"{row.where} says split {row.split!r}; write train, validation or test")
        group = groups.get(row.label, Group(row.label, split, 0, row.parent))
        if group.split != split:
            raise InputError(f"{row.where}: label {row.label!r} is in two splits; splits must not share labels")
        if group.parent != row.parent:
            raise InputError(f"{row.where}: label {row.label!r} has two parents; give each label one")
        groups[row.label] = replace(group, rows=group.rows + 1)
    if not groups:
        raise InputError(f"{source} holds no rows; give a file with one text per row")
    if columns.split is None:
        splits = divide(groups, fractions, seed)
        groups = {name: replace(group, split=splits[name]) for name, group in groups.items()}
    if not any(group.split == "train" for group in groups.values()):
        raise InputError(f"no label of {source} is in train, from which the vocabulary is made; put some there")
    return groups


def _rows(source: Path, columns: Columns) -> Iterator[Row]:
    for number, record in _records(source):
        where = f"line {number} of {source}"
        values = []
        for column in columns:
            if column is not None and column not in record:
                names = [str(name) for name in record]
                hint = did_you_mean(column, names)
                raise InputError(f"{where} has no column {column!r}{hint}; it has {', '.join(names)}")
            value = None if column is None else record[column]
            if column is not None and (not isinstance(value, str | int) or not str(value).strip()):
                raise InputError(f"{where} has no usable value for {column!r}; complete or remove it")
            values.append(None if value is None else str(value))
        if not words(values[0]):
            raise InputError(f"{where} has no word in {columns.text!r}; complete or remove it")
        yield Row(where, *values)


def _records(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each record with the number of its (last) line."""
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json_lines}
    if source.suffix.lower() not in readers:
        raise InputError(f"{source} is no {', '.join(readers)} file; convert it to one of them")
    try:
        yield from readers[source.suffix.lower()](source)
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error


def _csv(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with source.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if source.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for record in reader:
                if None in record or None in record.values():
                    raise InputError(
                        f"line {reader.line_num} of {source} has more or fewer fields than the header; mend it"
                    )
                yield reader.line_num, record
        except csv.Error as error:
            raise InputError(f"line {reader.reader.line_num} of {source} is no CSV ({error}); mend it") from error


def _json_lines(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with source.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"line {number} of {source} is not JSON; write one object per line") from error
            if not isinstance(record, dict):
                raise InputError(f"line {number} of {source} is not a JSON object; write one object per line")
            yield number, record
