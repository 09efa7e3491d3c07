"""Labelled text (.csv, .tsv, or .jsonl, .ndjson and .json with one object per line), tokenized and padded.

Fields `tokens`: int32 (length,) and `tokens_mask`: bool (length,), True where there is a token. The groups are the
labels. The vocabulary (0 pad, 1 unknown) comes from the train split alone and is saved as `vocabulary.json`. Rows
without a text or label are refused, all in one message.
"""

import csv
import json
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metadist.core.errors import InputError
from metadist.data.importers.delimited import limited_lines, open_text, sniff, suffix
from metadist.data.importers.names import clean, lacking, note_cleaned, note_lookalikes
from metadist.data.notes import Faults, Notes, shown
from metadist.data.splits import FRACTIONS, divide, split_named
from metadist.data.table import Field
from metadist.data.tokenizer import PAD, UNKNOWN, Tokenizer, padded, words
from metadist.data.writer import VOCABULARY, About, DatasetWriter, Group, Progress, options_of, staging

DIGITS = 4300  # of a whole number, as Python reads them


class Columns(NamedTuple):
    """The names of the columns."""

    text: str
    label: str
    parent: str | None
    split: str | None


class Row(NamedTuple):
    """A row that can be used, and its (last) line."""

    line: int
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
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Import your own texts with labels (CSV or JSON lines).

    Args:
        source: CSV or JSON lines file.
        out: directory to write.
        text: column with the text.
        label: column with the class.
        parent: column with the class's superclass.
        length: tokens kept of each text.
        vocabulary_size: the most pieces of words that are told apart.
        split_column: column that says train, validation or test.
        fractions: of the labels, for train, validation and test, where no column says it.
        seed: of the random split.
        skip_bad: leave out what cannot be used, and say how much.
        overwrite: replace a dataset that is there.
        progress: called now and then with the rows written so far and in all.

    Example:
        metadist data text --source intents.jsonl --label intent --out data/intents
    """
    options = options_of("text", locals())
    source, columns, notes = Path(source), Columns(text, label, parent, split_column), Notes()
    if length < 1 or vocabulary_size < 3:
        raise InputError(f"text takes length >= 1 and vocabulary_size >= 3; not {length} and {vocabulary_size}")
    with staging(out, overwrite) as directory:
        groups = _groups(source, columns, fractions, seed, skip_bad, notes)

        def train_texts() -> Iterator[str]:
            return (row.text for row in _rows(source, columns) if groups[row.label].split == "train")

        tokenizer = Tokenizer.build(train_texts, vocabulary_size)
        tokenizer.save(directory / VOCABULARY)
        preprocessing = {"texts": {"column": text, "length": length}, "label": label}
        known = {"vocabulary_size": len(tokenizer.pieces), "preprocessing": preprocessing}
        about = About("classes", str(source), "as its source says", options, known, notes)
        fields = [Field("tokens", "input", "int32", (length,)), Field("tokens_mask", "input", "bool", (length,))]
        lines = [array("q") for _ in groups]  # of each row of each group
        name_row = lambda group, row: f"line {lines[group][row]}"  # noqa: E731
        writer = DatasetWriter(directory, fields, list(groups.values()), about, progress=progress, name_row=name_row)
        for row, tokens in _tokenized(_rows(source, columns), tokenizer, length, notes):
            lines[writer.numbers[row.label]].append(row.line)
            writer.add_row(row.label, {"tokens": tokens, "tokens_mask": tokens != PAD})
        writer.finish()
    return Path(out)


def _tokenized(
    rows: Iterator[Row], tokenizer: Tokenizer, length: int, notes: Notes
) -> Iterator[tuple[Row, np.ndarray]]:
    """Each row with its tokens, int32 [length]; what is cut or unknown is noted."""
    longest, cut, example = 0, 0, ""
    for row in rows:
        ids = tokenizer.encode(row.text)
        if len(ids) > length:
            longest, cut, example = max(longest, len(ids)), cut + 1, example or f"line {row.line} with {len(ids)}"
        ids = ids[:length]
        why = "their characters are not in the vocabulary of the train texts"
        remedy = "raise --vocabulary-size or put texts with them in train"
        notes.add("tokens unknown", why, f"in line {row.line}", remedy, int((ids == UNKNOWN).sum()))
        yield row, padded(ids, length)
    why, remedy = f"they have more than {length} tokens", f"--length {longest} keeps them whole"
    notes.add("texts cut", why, example, remedy, cut)


def _groups(
    source: Path, columns: Columns, fractions: Sequence[float], seed: int, skip_bad: bool, notes: Notes
) -> dict[str, Group]:
    """The labels with their rows, parents and splits."""
    groups: dict[str, Group] = {}
    faults = Faults("rows", f" of {source}")
    for row in _rows(source, columns, notes, faults):
        where, split = f"line {row.line} of {source}", split_named(row.split or "train")
        if split is None:
            raise InputError(f"{where} says split {row.split!r}; write train, validation or test")
        group = groups.get(row.label, Group(row.label, split, 0, row.parent))
        if group.split != split:
            raise InputError(f"{where}: label {row.label!r} is in two splits; splits must not share labels")
        if group.parent != row.parent:
            raise InputError(f"{where}: label {row.label!r} has two parents; give each label one")
        groups[row.label] = replace(group, rows=group.rows + 1)
    if not skip_bad:
        total = faults.count + sum(group.rows for group in groups.values())
        faults.refuse(source, total, "complete or remove them, or leave them out with --skip-bad")
    faults.note(notes, "complete them")
    if not groups:
        raise InputError(f"{source} holds no rows that can be used; give a file with one text per row")
    note_lookalikes("labels", groups, notes)
    if columns.split is None:
        splits = divide(groups, fractions, seed)
        groups = {name: replace(group, split=splits[name]) for name, group in groups.items()}
    if not any(group.split == "train" for group in groups.values()):
        raise InputError(f"no label of {source} is in train, from which the vocabulary is made; put some there")
    return groups


class _Unusable(Exception):
    """What is wrong with a row."""


def _rows(source: Path, columns: Columns, notes: Notes | None = None, faults: Faults | None = None) -> Iterator[Row]:
    """The rows that can be used; the others go to the `faults`."""
    notes, faults = notes or Notes(), faults or Faults("rows")
    for line, record in _records(source, columns, notes):
        try:
            yield _row(line, record, columns, notes)
        except _Unusable as error:
            faults.add(f"line {line}", str(error))


def _row(line: int, record: dict[str, Any] | _Unusable, columns: Columns, notes: Notes) -> Row:
    if isinstance(record, _Unusable):
        raise record
    values: list[str | None] = []
    for column in columns:
        if column is not None and column not in record:
            raise _Unusable(lacking(column, [shown(name) for name in record]))
        value = None if column is None else _as_text(record[column])
        if column is not None and (value is None or not value.strip()):
            raise _Unusable(f"has no usable value for {column!r}")
        values.append(value)
    said, *names = values
    if not words(said or ""):
        raise _Unusable(f"has no word in {columns.text!r}")
    for name, what in zip(names, ("labels", "parents", "splits"), strict=True):
        if name is not None and clean(name) != name:
            note_cleaned(what, name, notes)
    label, parent, split = (None if name is None else clean(name) for name in names)
    if not label:
        raise _Unusable(f"has no usable value for {columns.label!r}")
    return Row(line, said or "", label, parent, split)


def _as_text(value: Any) -> str | None:
    """A text or whole number as text; None where there is none or where it has half characters (lone surrogates)."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        value = int(value)
    if not isinstance(value, str | int) or str(value) != str(value).encode(errors="ignore").decode():
        return None
    return str(value)


def _records(source: Path, columns: Columns, notes: Notes) -> Iterator[tuple[int, dict[str, Any] | _Unusable]]:
    """Each record, or what is wrong with it, with the number of its (last) line."""
    formats = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
    if suffix(source) not in formats:
        raise InputError(f"{source} is no {', '.join(formats)} file; convert it to one of them")
    try:
        if suffix(source) in (".csv", ".tsv"):
            yield from _csv(source, [column for column in columns if column is not None], notes)
        else:
            with open_text(source) as file:
                for number, line in enumerate(limited_lines(file, source), start=1):
                    if line.strip():
                        yield number, _json_object(line)
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{source} cannot be read ({why}); check the path and the file") from error
    except UnicodeError as error:
        place = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        raise InputError(f"{source} is not UTF-8 text{place}; convert it to UTF-8") from error


def _csv(source: Path, wanted: list[str], notes: Notes) -> Iterator[tuple[int, dict[str, Any] | _Unusable]]:
    dialect = sniff(source, wanted, notes)
    header = [clean(name) for name in dialect.header]
    if not header:
        raise InputError(f"{source} is empty; give a file with one text per row")
    for column in wanted:
        if header.count(clean(column)) > 1:
            raise InputError(f"{source} has two columns named {column!r}; rename one of them")
        if clean(column) not in header:
            raise InputError(f"{source} {lacking(column, header)}")
    places = {column: header.index(clean(column)) for column in wanted}
    with open_text(source) as file:
        reader = csv.reader(limited_lines(file, source), delimiter=dialect.delimiter, strict=True)
        try:
            while not next(reader):  # the header, and empty lines before it
                pass
            for record in reader:
                if len(record) == len(header):
                    yield reader.line_num, {column: record[place] for column, place in places.items()}
                elif record:
                    yield reader.line_num, _Unusable("has more or fewer fields than the header")
        except csv.Error as error:
            raise InputError(f"line {reader.line_num} of {source} is no CSV ({error}); mend it") from error


def _json_object(line: str) -> dict[str, Any] | _Unusable:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return _Unusable("is not JSON: write one object per line")
    except ValueError:
        return _Unusable(f"has a number of more than {DIGITS} digits")
    except RecursionError:
        return _Unusable("is nested too deep")
    return record if isinstance(record, dict) else _Unusable("is not a JSON object: write one object per line")
