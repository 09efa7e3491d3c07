"""Examples in files, with their labels where they have some, as people ask a run about them: folders of pictures, files
of texts, tables. They are read by what imports read them with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from metadist.core.errors import InputError, did_you_mean
from metadist.data.files import entries, files_below, read_regular, within
from metadist.data.importers.arrays import strings
from metadist.data.importers.class_folders import ClassFolders
from metadist.data.importers.delimited import suffix
from metadist.data.importers.pictures import FILE_BYTES, SUFFIXES, Decoder, Picture, PictureForm
from metadist.data.importers.survey import stacked
from metadist.data.importers.table_files import FORMATS as TABLES
from metadist.data.importers.table_files import Rows
from metadist.data.importers.text import Columns, rows_in
from metadist.data.importers.text_files import FORMATS as TEXT_FILES
from metadist.data.importers.text_files import TextFiles, read_txt, records_in
from metadist.data.notes import Faults, Notes, shown
from metadist.data.preprocessing import Preprocessing, TablePreprocessor

JSON_LINES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class RawExamples:
    """n examples as a learner takes them, `x`; what each is called; and their labels (names) or target values (an array
    for each target), where they have some."""

    names: list[str]
    x: Any
    y: Any = None

    def part(self, start: int, count: int) -> Any:
        """Some of the examples, one after the other."""
        return self.x.slice(start, count) if isinstance(self.x, pa.Table) else self.x[start : start + count]


def read_examples(
    sources: Sequence[str],
    about: Preprocessing,
    label: str | None,
    labelled: bool,
    notes: Notes,
    skip_bad: bool = False,
) -> RawExamples:
    """The examples of some files and folders (or, of texts, these themselves), of the kind that a run takes.

    `label`: the column of labels, by default that of the run's own data. `labelled`: it must be there. What is left out
    is noted: with `skip_bad` also pictures, texts and lines that cannot be used. Raises InputError where a file cannot
    be read or has not what it needs.
    """
    if about.pictures:
        parts = [_pictures(Path(source), labelled, notes) for source in sources]
        parts = [_readable(part, about.pictures, notes) for part in parts] if skip_bad else parts
    elif about.texts:
        parts = [
            _texts(source, about.texts.column, label or about.label or "label", labelled, notes, skip_bad)
            for source in sources
        ]
    elif about.table:
        parts = [_rows(Path(source), about, label or about.label, labelled, notes, skip_bad) for source in sources]
    else:
        raise InputError(
            "this run was trained on arrays that no files are known for: use it in Python, with metadist.load"
        )
    if len(parts) == 1:
        return parts[0]
    try:
        tables = [part.x for part in parts] if about.table else []
        x = pa.concat_tables(tables, promote_options="permissive") if tables else [each for p in parts for each in p.x]
    except pa.ArrowException as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"the tables given have columns of several types ({said}); ask about them apart") from None
    answers = [part.y for part in parts if part.y is not None]
    if 0 < len(answers) < len(parts):
        remedy = "ask about them apart"
        notes.add("labels not used", "some of what was asked about has none", shown(sources[0]), remedy, len(answers))
    y = None
    if len(answers) == len(parts):
        several = isinstance(answers[0], tuple)  # an array for each target
        y = tuple(map(np.concatenate, zip(*answers, strict=True))) if several else [each for a in answers for each in a]
    return RawExamples([name for part in parts for name in part.names], x, y)


def _pictures(source: Path, labelled: bool, notes: Notes) -> RawExamples:
    if not source.is_dir():
        if labelled:
            raise InputError(f"{shown(source)} is no folder; give one that has a folder of pictures per class")
        return RawExamples([shown(source)], [source])
    if labelled or not any(entry.suffix.lower() in SUFFIXES for entry in entries(source)):
        folders = ClassFolders("pictures", "PNG or JPEG", SUFFIXES, classes_only=True)
        classes, _ = folders.read(source, notes)
        pairs = [(file, name) for name, files in classes.items() for file in files]
        return RawExamples([within(file, source) for file, _ in pairs], [f for f, _ in pairs], [n for _, n in pairs])
    files = []
    for file in files_below(source, source, notes):
        if file.suffix.lower() in SUFFIXES:
            files.append(file)
        else:
            notes.add(
                "files left out", "no pictures by their suffix", within(file, source), "convert them to PNG or JPEG"
            )
    files.sort()
    return RawExamples([within(file, source) for file in files], files)


def _readable(examples: RawExamples, form: PictureForm, notes: Notes) -> RawExamples:
    """Those of some pictures that can be used; the others, and classes that are gone with them, are noted."""
    decoder, kept = Decoder(form, Notes()), []
    for number, (name, path) in enumerate(zip(examples.names, examples.x, strict=True)):
        if decoder(Picture(name, partial(read_regular, path, FILE_BYTES))) is not None:
            kept.append(number)
    if not kept:
        decoder.faults.refuse("what was given", len(examples.x), "give at least one that can be read")
    decoder.faults.note(notes, "replace or remove them")
    y = None if examples.y is None else [examples.y[number] for number in kept]
    for name in dict.fromkeys(examples.y or []):
        if name not in (y or []):
            notes.add("classes left out", "all their pictures are left out", shown(name), "give them another picture")
    return RawExamples([examples.names[number] for number in kept], [examples.x[number] for number in kept], y)


def _refuse_or_note(faults: Faults, source: Path | str, good: int, remedy: str, notes: Notes, skip_bad: bool) -> None:
    if not skip_bad:
        faults.refuse(source, faults.count + good, f"{remedy}, or leave it out with --skip-bad")
    faults.note(notes, "mend or remove them")


def _texts(source: str, column: str, label: str, labelled: bool, notes: Notes, skip_bad: bool) -> RawExamples:
    """The records of a file or folder; or a text itself, where a file is not meant."""
    path, is_file = Path(source), suffix(Path(source)) in (*TEXT_FILES, ".txt") and " " not in source
    if not labelled and suffix(path) == ".txt" and path.is_file():
        return RawExamples([shown(source)], [read_txt(path)])
    if not labelled and not is_file and not path.is_dir():
        return RawExamples([source], [source])
    if not path.exists():
        raise InputError(f"{shown(source)} does not exist; give a file of texts, or in quotes a text itself")
    files, faults = TextFiles([path], notes, classes_only=True), Faults("rows", f" of {shown(source)}")
    known = labelled or files.has(label)
    rows = list(rows_in(files, Columns(column, label if known else None, None, None), notes, faults))
    remedy = "mend or remove it, or name the column with --label"
    _refuse_or_note(faults, source, len(rows), remedy, notes, skip_bad)
    if not rows:
        raise InputError(f"{shown(source)} holds no texts; give a file with one in each row")
    texts = [row.text for row in rows]
    return RawExamples(texts, texts, [row.label for row in rows] if known else None)


def _rows(
    source: Path, about: Preprocessing, label: str | None, labelled: bool, notes: Notes, skip_bad: bool
) -> RawExamples:
    """The rows of a table; of a regression with the values of its targets."""
    table = TablePreprocessor(about, [{}] * len(about.inputs))
    targets = [each for each in about.table or () if each.role == "target"] if about.label is None else []
    answers = [column for each in targets for column in each.columns] if about.label is None else [str(label)]
    if suffix(source) in JSON_LINES and source.is_file():
        found, known = _json_rows(source, table, answers, labelled, notes, skip_bad)
    else:
        found, known = _stored_rows(source, table, answers, about.label is None, labelled, notes)
    names, inputs = [f"row {number + 1}" for number in range(len(found))], found.select(table.columns)
    if not known:
        return RawExamples(names, inputs)
    (batch,) = found.combine_chunks().to_batches()
    if about.label is None:
        read = [stacked(batch, each.name, each.columns, each.vector, {}, source, lambda column: "") for each in targets]
        if not all(there.all() for _, there in read):
            raise InputError(f"a row of {shown(source)} has no value in {' or '.join(map(repr, answers))}; fill it in")
        return RawExamples(names, inputs, tuple(values for values, _ in read))
    classes, codes = strings(batch, answers[0], source, notes)
    if "" in classes and (codes == classes.index("")).any():
        row = int(np.argmax(codes == classes.index(""))) + 1
        raise InputError(f"row {row} of {shown(source)} has no value in {answers[0]!r}; fill it in or remove the row")
    return RawExamples(names, inputs, [classes[code] for code in codes])


def _stored_rows(
    source: Path, table: TablePreprocessor, answers: list[str], numbers: bool, labelled: bool, notes: Notes
) -> tuple[pa.Table, bool]:
    """The columns of a Parquet, CSV, TSV or Arrow file or a folder of them, and whether the answers (`numbers`, or
    labels) are there."""
    if source.is_file() and suffix(source) not in TABLES:
        raise InputError(f"{shown(source)} is no {', '.join((*TABLES, *JSON_LINES))} file; convert it to one of them")
    rows = Rows(source, [*table.columns, *answers], notes)
    known = labelled or all(name in rows.names for name in answers)
    stored = {name: rows.column(name) for name in (*table.columns, *(answers if known else ()))}
    labels = [stored[name] for name in answers] if known and not numbers else []
    names = [stored[name] for name in stored if name in table.names]
    values = [column for name, column in stored.items() if name not in table.names and (numbers or name not in answers)]
    rows.choose([*labels, *names], values)
    batches = list(rows.batches())
    if not batches:
        raise InputError(f"{shown(source)} holds no rows; give a table with at least one")
    found = pa.Table.from_batches(batches)
    return pa.table({name: found[column] for name, column in stored.items()}), known


def _json_rows(
    source: Path, table: TablePreprocessor, answers: list[str], labelled: bool, notes: Notes, skip_bad: bool
) -> tuple[pa.Table, bool]:
    """The same of a file with a JSON object in each line."""
    faults, rows = Faults("rows", f" of {shown(source)}"), []
    for line, record in records_in(source, table.columns, notes):
        if isinstance(record, dict):
            rows.append(record)
        else:
            faults.add(f"line {line}", str(record))
    _refuse_or_note(faults, source, len(rows), "mend or remove it", notes, skip_bad)
    if not rows:
        raise InputError(f"{shown(source)} holds no rows; give a table with at least one")
    there = list(dict.fromkeys(name for row in rows for name in row))
    known = labelled or all(name in there for name in answers)
    recognised = table.recognise(rows)
    assert recognised
    found = recognised[0]
    for name in answers if known else ():
        if name not in there:
            raise InputError(f"{shown(source)} has no column {name!r} of labels (--label){did_you_mean(name, there)}")
        if name not in found.column_names:
            found = found.append_column(name, pa.array([row.get(name) for row in rows], from_pandas=True))
    return found, known
