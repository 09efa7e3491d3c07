"""Labelled texts, tokenized and padded: .csv, .tsv, .parquet, .arrow, or .jsonl, .ndjson and .json with one object per
line; folders of these; folders of .txt files, one per class.

Fields `tokens`: int32 (length,) and `tokens_mask`: bool (length,), True where there is a token. The groups are the
labels. The vocabulary (0 pad, 1 unknown) comes from the train split alone and is saved as `vocabulary.json`. Rows
without a text or label are refused, all in one message.
"""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metadist.core.errors import InputError
from metadist.core.task import Split
from metadist.data.importers.names import clean, lacking, note_cleaned, note_lookalikes
from metadist.data.importers.text_files import Record, TextFiles, Unusable
from metadist.data.notes import Faults, Notes, Progress, shown
from metadist.data.splits import FRACTIONS, divide, merged_or_refused, split_named
from metadist.data.table import Field
from metadist.data.tokenizer import PAD, UNKNOWN, Tokenizer, padded, words
from metadist.data.writer import VOCABULARY, About, DatasetWriter, Group, options_of, staging

MOST = 0.99  # share of texts that a length should keep whole
LINES = 1 << 40  # of a file, at most


class Columns(NamedTuple):
    """The names of the columns."""

    text: str
    label: str | None
    parent: str | None
    split: str | None


class _Division(NamedTuple):
    """How labels are given to splits where nothing says it, or where splits that share labels are merged."""

    fractions: Sequence[float]
    seed: int
    merge: bool


class Row(NamedTuple):
    """A row that can be used, and where it is: the number of its file, and its (last) line. Its label is "" where none
    is asked for."""

    file: int
    line: int
    text: str
    label: str
    parent: str | None
    split: str | None


def text(
    source: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    text: str = "text",
    label: str = "label",
    parent: str | None = None,
    length: int = 32,
    vocabulary_size: int = 4000,
    split_column: str | None = None,
    classes_only: bool = False,
    merge: bool = False,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Import your own texts with labels: CSV, JSON lines, Parquet, or a folder of .txt files per class.

    Several files whose names begin with train, validation or test (train.csv and test.csv, or the
    train-00000-of-00001.parquet of a Hugging Face data set) are these splits; labels that it numbers get their names.

    Args:
        source: file, or folder of files, or folder with a folder of .txt files per class; repeat it for several.
        out: directory to write.
        text: column with the text.
        label: column with the class.
        parent: column with the class's superclass.
        length: tokens kept of each text.
        vocabulary_size: the most pieces of words that are told apart.
        split_column: column that says train, validation or test, whatever the files are called.
        classes_only: take class folders called train, validation or test as classes like the others.
        merge: put splits with the same labels in each together, and divide the labels anew.
        fractions: of the labels, for train, validation and test, where no column says it.
        seed: of the random split.
        skip_bad: leave out what cannot be used, and say how much.
        overwrite: replace a dataset that is there.
        progress: called now and then with the rows written so far and in all.

    Example:
        metadist data text --source intents.jsonl --label intent --out data/intents
    """
    options = options_of("text", locals())
    sources = [Path(each) for each in ([source] if isinstance(source, str | Path) else source)]
    columns, notes = Columns(text, label, parent, split_column), Notes()
    if length < 1 or vocabulary_size < 3:
        raise InputError(f"text takes length >= 1 and vocabulary_size >= 3; not {length} and {vocabulary_size}")
    with staging(out, overwrite) as directory:
        files = TextFiles(sources, notes, classes_only, merge)
        groups = _groups(files, columns, _Division(fractions, seed, merge), skip_bad, notes)

        def train_texts() -> Iterator[str]:
            return (row.text for row in rows_in(files, columns) if groups[row.label].split == "train")

        tokenizer = Tokenizer.build(train_texts, vocabulary_size)
        tokenizer.save(directory / VOCABULARY)
        preprocessing = {"texts": {"column": text, "length": length}, "label": label}
        known: dict[str, Any] = {"vocabulary_size": len(tokenizer.pieces), "texts_cut": Counter()}
        known["preprocessing"] = preprocessing
        about = About("classes", files.name, "as its source says", options, known, notes)
        fields = [Field("tokens", "input", "int32", (length,)), Field("tokens_mask", "input", "bool", (length,))]
        places = [array("q") for _ in groups]  # of each row of each group
        name_row = lambda group, row: files.place(*divmod(places[group][row], LINES))  # noqa: E731
        writer = DatasetWriter(directory, fields, list(groups.values()), about, progress=progress, name_row=name_row)
        for row, tokens, cut in _tokenized(rows_in(files, columns), files, tokenizer, length, notes):
            known["texts_cut"][groups[row.label].split] += cut
            places[writer.numbers[row.label]].append(row.file * LINES + row.line)
            writer.add_row(row.label, {"tokens": tokens, "tokens_mask": tokens != PAD})
        writer.finish()
    return Path(out)


def _tokenized(
    rows: Iterator[Row], files: TextFiles, tokenizer: Tokenizer, length: int, notes: Notes
) -> Iterator[tuple[Row, np.ndarray, bool]]:
    """Each row with its tokens, int32 [length], and whether it was cut; what is cut or unknown is noted."""
    lengths, cut, example = Counter[int](), 0, ""
    for row in rows:
        ids = tokenizer.encode(row.text)
        too_long = len(ids) > length
        lengths[len(ids)] += 1
        if too_long:
            cut, example = cut + 1, example or f"{files.place(row.file, row.line)} with {len(ids)}"
        ids = ids[:length]
        why = "their characters are not in the vocabulary of the train texts"
        remedy = "raise --vocabulary-size or put texts with them in train"
        example_of_unknown = f"in {files.place(row.file, row.line)}"
        notes.add("tokens unknown", why, example_of_unknown, remedy, int((ids == UNKNOWN).sum()))
        yield row, padded(ids, length), too_long
    notes.add("texts cut", f"they have more than {length} tokens", example, _longer(lengths, length), cut)


def _longer(lengths: Counter[int], length: int) -> str:
    """What to do about texts that are cut: the length that keeps nearly all of them whole, or all where it is no more
    than what there is; `lengths` are those of all texts, in tokens."""
    known = sorted(lengths)
    if not known:
        return ""
    whole = np.cumsum([lengths[each] for each in known]) / lengths.total()
    place = int(np.argmax(whole >= MOST))
    place = place if known[place] > length else len(known) - 1
    share = "all texts" if whole[place] == 1 else f"{np.floor(1000 * whole[place]) / 10:g}% of all texts"
    return f"--length {known[place]} keeps {share} whole"


def _groups(files: TextFiles, columns: Columns, division: _Division, skip_bad: bool, notes: Notes) -> dict[str, Group]:
    """The labels with their rows, parents and splits."""
    rows: Counter[str] = Counter()
    parents: dict[str, str | None] = {}
    found: dict[str, set[Split]] = {}
    faults = Faults("rows", f" of {files.name}" if len(files.files) == 1 else "")
    for row in rows_in(files, columns, notes, faults):
        where = f"{files.place(row.file, row.line)} of {files.name}"
        split = split_named(row.split) if row.split is not None else files.files[row.file].split
        if split is not None:
            found.setdefault(row.label, set()).add(split)
        elif row.split is not None:
            raise InputError(f"{where} says split {row.split!r}; write train, validation or test")
        if parents.setdefault(row.label, row.parent) != row.parent:
            raise InputError(f"{where}: label {row.label!r} has two parents; give each label one")
        rows[row.label] += 1
    if not skip_bad:
        remedy = "complete or remove them, or leave them out with --skip-bad"
        faults.refuse(Path(files.name), faults.count + rows.total(), remedy)
    faults.note(notes, "complete them")
    if not rows:
        raise InputError(f"{files.name} holds no rows that can be used; give a file with one text per row")
    note_lookalikes("labels", rows, notes)
    splits = merged_or_refused(found, "labels", files.name, division.merge, notes)
    splits = splits or divide(rows, division.fractions, division.seed)
    if "train" not in splits.values():
        raise InputError(f"no label of {files.name} is in train, from which the vocabulary is made; put some there")
    return {label: Group(label, splits[label], count, parents[label]) for label, count in rows.items()}


def rows_in(
    files: TextFiles, columns: Columns, notes: Notes | None = None, faults: Faults | None = None
) -> Iterator[Row]:
    """The rows that can be used; the others go to the `faults`."""
    notes, faults = notes or Notes(), faults or Faults("rows")
    wanted = [column for column in columns if column is not None]
    for file, line, record in files.records(wanted, columns.text, columns.label or "", notes):
        try:
            yield _row(file, line, record, columns, notes)
        except Unusable as error:
            faults.add(files.place(file, line), str(error))


def _row(file: int, line: int, record: Record, columns: Columns, notes: Notes) -> Row:
    if isinstance(record, Unusable):
        raise record
    values: list[str | None] = []
    for column in columns:
        if column is not None and column not in record:
            raise Unusable(lacking(column, [shown(name) for name in record]))
        value = None if column is None else _as_text(record[column])
        if column is not None and (value is None or not value.strip()):
            raise Unusable(f"has no usable value for {column!r}")
        values.append(value)
    said, *names = values
    if not words(said or ""):
        raise Unusable(f"has no word in {columns.text!r}")
    for name, what in zip(names, ("labels", "parents", "splits"), strict=True):
        if name is not None and clean(name) != name:
            note_cleaned(what, name, notes)
    label, parent, split = (None if name is None else clean(name) for name in names)
    if columns.label is not None and not label:
        raise Unusable(f"has no usable value for {columns.label!r}")
    return Row(file, line, said or "", label or "", parent, split)


def _as_text(value: Any) -> str | None:
    """A text or whole number as text; None where there is none or where it has half characters (lone surrogates)."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        value = int(value)
    if not isinstance(value, str | int) or str(value) != str(value).encode(errors="ignore").decode():
        return None
    return str(value)
