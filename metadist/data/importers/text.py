"""Labelled text (CSV, TSV or JSON lines), tokenized and padded."""

import csv
import json
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metadist.core.errors import InputError, did_you_mean
from metadist.core.task import Split
from metadist.data.importers.delimited import LINE_BYTES, limited_lines, open_text, sniff, suffix
from metadist.data.names import clean, note_cleaned, note_lookalikes
from metadist.data.notes import Notes, shown
from metadist.data.splits import FRACTIONS, divide, split_named
from metadist.data.table import Field
from metadist.data.tokenizer import PAD, UNKNOWN, Tokenizer, words
from metadist.data.writer import VOCABULARY, About, DatasetWriter, Group, Progress, staging

BLOCK_ROWS = 4096
TOLD = 5  # lines named per fault in one message
DIGITS = 4300  # of a whole number, as Python reads them


class Columns(NamedTuple):
    text: str
    label: str
    parent: str | None
    split: str | None


class Row(NamedTuple):
    line: int
    text: str
    label: str
    parent: str | None
    split: str | None


@dataclass
class Faults:
    """The lines that cannot be used, by what is wrong with them."""

    lines: dict[str, list[int]] = field(default_factory=dict)

    def add(self, line: int, why: str) -> None:
        self.lines.setdefault(why, []).append(line)

    def refuse(self, source: Path) -> None:
        """Raise InputError for all of them, where there are any."""
        told = []
        for why, lines in self.lines.items():
            more = f" and {len(lines) - TOLD} more" if len(lines) > TOLD else ""
            named = f"line {lines[0]}" if len(lines) == 1 else f"lines {', '.join(map(str, lines[:TOLD]))}{more}"
            told.append(f"{named} of {source} {'each ' * (len(lines) > 1)}{why}")
        if told:
            raise InputError(f"{', '.join(told)}; complete or remove them, or leave them out with --skip-bad")

    def note(self, notes: Notes) -> None:
        for why, lines in self.lines.items():
            notes.add("rows left out", f"each {why}", f"line {lines[0]}", "complete them", len(lines))


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
    """Import a .csv, .tsv, .jsonl, .ndjson or .json (one object per line) file; the arguments name its columns.

    Fields `tokens`: int32 (length,) and `tokens_mask`: bool (length,), True where there is a token. The groups are the
    labels; they are split by `split_column`, else by `fractions` and `seed`. The vocabulary (0 pad, 1 unknown) comes
    from the train split alone and is saved as `vocabulary.json`. Texts are cut at `length` tokens, and noted. Rows
    without a text or label are refused, all in one message, or with `skip_bad` left out and noted.
    """
    source, columns, notes = Path(source), Columns(text, label, parent, split_column), Notes()
    if length < 1 or vocabulary_size < 3:
        raise InputError(f"text takes length >= 1 and vocabulary_size >= 3; not {length} and {vocabulary_size}")
    with staging(out, overwrite) as directory:
        groups = _groups(source, columns, fractions, seed, skip_bad, notes)

        def train_texts() -> Iterator[str]:
            return (row.text for row in _rows(source, columns, Notes()) if groups[row.label].split == "train")

        tokenizer = Tokenizer.build(train_texts, vocabulary_size)
        tokenizer.save(directory / VOCABULARY)
        options = {"importer": "text", "text": text, "label": label, "parent": parent, "length": length}
        options |= {"vocabulary_size": vocabulary_size, "split_column": split_column}
        options |= {"fractions": list(fractions), "seed": seed, "skip_bad": skip_bad}
        extra = {"vocabulary_size": len(tokenizer.pieces)}
        about = About("classes", str(source), "as its source says", options, extra, notes)
        fields = [Field("tokens", "input", "int32", (length,)), Field("tokens_mask", "input", "bool", (length,))]
        lines = [array("q") for _ in groups]
        writer = DatasetWriter(
            directory, fields, list(groups.values()), about, progress=progress,
            name_row=lambda group, row: f"line {lines[group][row]}",
        )  # fmt: skip
        _write(writer, _rows(source, columns, Notes()), tokenizer, length, lines)
        writer.finish()
    return Path(out)


def _write(
    writer: DatasetWriter, rows: Iterator[Row], tokenizer: Tokenizer, length: int, lines: Sequence[array]
) -> None:
    """The last pass. `lines` gets the line of each row of each group."""
    numbers = {group.name: number for number, group in enumerate(writer.groups)}
    codes: list[int] = []
    block: list[np.ndarray] = []
    cut: list[int] = []  # tokens of the texts that are too long
    example = ""

    def flush() -> None:
        tokens = np.stack(block)
        writer.add(np.array(codes), {"tokens": tokens, "tokens_mask": tokens != PAD})
        codes.clear()
        block.clear()

    for row in rows:
        ids = tokenizer.encode(row.text)
        if len(ids) > length:
            example = example or f"line {row.line} with {len(ids)}"
            cut.append(len(ids))
        unknown = int((ids[:length] == UNKNOWN).sum())
        why, remedy = (
            "their characters are not in the vocabulary of the train texts",
            "raise --vocabulary-size or put texts with them in train",
        )
        writer.about.notes.add("tokens unknown", why, f"in line {row.line}", remedy, unknown)
        codes.append(numbers[row.label])
        lines[codes[-1]].append(row.line)
        block.append(np.pad(ids[:length], (0, max(0, length - len(ids))), constant_values=PAD))
        if len(block) == BLOCK_ROWS:
            flush()
    if block:
        flush()
    if cut:
        remedy = f"--length {max(cut)} keeps them whole"
        writer.about.notes.add("texts cut", f"they have more than {length} tokens", example, remedy, len(cut))


def _groups(
    source: Path, columns: Columns, fractions: Sequence[float], seed: int, skip_bad: bool, notes: Notes
) -> dict[str, Group]:
    """The labels with their rows, parents and splits."""
    groups: dict[str, Group] = {}
    faults = Faults()
    for row in _rows(source, columns, notes, faults):
        where = f"line {row.line} of {source}"
        split: Split | None = "train" if row.split is None else split_named(row.split)
        if split is None:
            raise InputError(f"{where} says split {row.split!r}; write train, validation or test")
        group = groups.get(row.label, Group(row.label, split, 0, row.parent))
        if group.split != split:
            raise InputError(f"{where}: label {row.label!r} is in two splits; splits must not share labels")
        if group.parent != row.parent:
            raise InputError(f"{where}: label {row.label!r} has two parents; give each label one")
        groups[row.label] = replace(group, rows=group.rows + 1)
    if not skip_bad:
        faults.refuse(source)
    faults.note(notes)
    if not groups:
        raise InputError(f"{source} holds no rows that can be used; give a file with one text per row")
    note_lookalikes("labels", groups, notes)
    if columns.split is None:
        splits = divide(groups, fractions, seed)
        groups = {name: replace(group, split=splits[name]) for name, group in groups.items()}
    if not any(group.split == "train" for group in groups.values()):
        raise InputError(f"no label of {source} is in train, from which the vocabulary is made; put some there")
    return groups


def _rows(source: Path, columns: Columns, notes: Notes, faults: Faults | None = None) -> Iterator[Row]:
    """The rows that can be used; the others go to the `faults`."""
    faults = Faults() if faults is None else faults
    for line, record in _records(source, columns, notes, faults):
        values: list[str | None] = []
        for column in columns:
            if column is not None and column not in record:
                faults.add(line, _lacking(column, list(record)))
                break
            value = None if column is None else _named(record[column])
            if column is not None and (value is None or not value.strip()):
                faults.add(line, f"has no usable value for {column!r}")
                break
            values.append(value)
        if len(values) < len(columns):
            continue
        said, *names = values
        if not words(said or ""):
            faults.add(line, f"has no word in {columns.text!r}")
            continue
        for name, what in zip(names, ("labels", "parents", "splits"), strict=True):
            if name is not None and clean(name) != name:
                note_cleaned(what, name, notes)
        label, parent, split = (None if name is None else clean(name) for name in names)
        if not label:
            faults.add(line, f"has no usable value for {columns.label!r}")
            continue
        yield Row(line, said or "", label, parent, split)


def _named(value: Any) -> str | None:
    """A text or whole number as text; None where there is none or where it has half characters (lone surrogates)."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        value = int(value)
    if not isinstance(value, str | int) or str(value) != str(value).encode(errors="ignore").decode():
        return None
    return str(value)


def _lacking(column: str, names: Sequence[Any]) -> str:
    known = [shown(name) for name in names]
    return f"has no column {column!r}; it has {', '.join(known[:50])}{did_you_mean(column, known)}"


def _records(source: Path, columns: Columns, notes: Notes, faults: Faults) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each record with the number of its (last) line."""
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json_lines}
    if suffix(source) not in readers:
        raise InputError(f"{source} is no {', '.join(readers)} file; convert it to one of them")
    try:
        yield from readers[suffix(source)](source, columns, notes, faults)
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{source} cannot be read ({why}); check the path and the file") from error
    except UnicodeError as error:
        place = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        raise InputError(f"{source} is not UTF-8 text{place}; convert it to UTF-8") from error


def _csv(source: Path, columns: Columns, notes: Notes, faults: Faults) -> Iterator[tuple[int, dict[str, Any]]]:
    wanted = [column for column in columns if column is not None]
    dialect = sniff(source, wanted, notes)
    header = [clean(name) for name in dialect.header]
    if not header:
        raise InputError(f"{source} is empty; give a file with one text per row")
    for column in wanted:
        if header.count(clean(column)) > 1:
            raise InputError(f"{source} has two columns named {column!r}; rename one of them")
        if clean(column) not in header:
            raise InputError(f"{source} {_lacking(column, header)}")
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
                    faults.add(reader.line_num, "has more or fewer fields than the header")
        except csv.Error as error:
            why = f"a field is longer than {LINE_BYTES >> 20} MiB" if "limit" in str(error) else error
            raise InputError(f"line {reader.line_num} of {source} is no CSV ({why}); mend it") from error


def _json_lines(source: Path, columns: Columns, notes: Notes, faults: Faults) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_text(source) as file:
        for number, line in enumerate(limited_lines(file, source), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                faults.add(number, "is not JSON: write one object per line")
            except ValueError:
                faults.add(number, f"has a number of more than {DIGITS} digits")
            except RecursionError:
                faults.add(number, "is nested too deep")
            else:
                if isinstance(record, dict):
                    yield number, record
                else:
                    faults.add(number, "is not a JSON object: write one object per line")
