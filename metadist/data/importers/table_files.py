"""Streaming rows out of Parquet, CSV, TSV and Arrow files, with one type per column over all files."""

import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa

from metadist.core.errors import InputError
from metadist.data.files import files_below, open_regular, require_regular, within
from metadist.data.importers.arrays import common_type, plain, plain_type, types
from metadist.data.importers.delimited import (
    LINE_BYTES,
    Dialect,
    TextColumn,
    limited_lines,
    open_text,
    packed,
    sniff,
    suffix,
)  # fmt: skip
from metadist.data.importers.names import clean, lacking
from metadist.data.notes import Notes, shown

FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "ipc", ".feather": "ipc", ".ipc": "ipc"}
BATCH_ROWS = 8192
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
DAMAGE = (pa.ArrowException, OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError)


@dataclass
class _File:
    """One file; `constants` are the columns that its folders name (user=1, country=unknown)."""

    path: Path
    constants: dict[str, str | None]
    names: list[str] = field(default_factory=list)  # as they are asked for: without spaces around them in text files
    types: dict[str, pa.DataType] = field(default_factory=dict)  # none in text files
    dialect: Dialect | None = None

    def __contains__(self, column: str) -> bool:
        return column in self.names or column in self.constants

    def has_text(self, column: str) -> bool:
        """Whether the file has the column, as texts of no type."""
        return column in self and column not in self.types

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Those of the columns that the file has."""
        stored = [column for column in columns if column in self.names]
        for batch in _text_batches(self, stored) if self.dialect else typed_batches(self.path, stored):
            for column in columns:
                if column in self.constants and column not in stored:
                    batch = batch.append_column(column, self.constant(column, batch.num_rows))
            if batch.num_rows:
                yield batch

    def constant(self, column: str, rows: int) -> pa.Array:
        return pa.array([self.constants[column]] * rows, pa.string())


class Rows:
    """Some columns of a file, or of all files of one format in a folder in the order of their names; re-readable.

    Construct it, ask for the `column`s by the names that people give, then `choose` them. Files need not agree: types
    are unified (int and float to float, say), absent columns are null, folders named "column=value" are columns, and
    all of it is noted. Texts of CSV files are names where they are labels, else numbers, read by `TextColumn`.
    Raises InputError when files cannot be read, or a column is not there or has types without a common one.
    """

    def __init__(self, source: Path, wanted: Sequence[str], notes: Notes) -> None:
        self.source, self.notes = source, notes
        self._files = [self._opened(path, wanted) for path in _files(source, notes)]
        if len(self._files) > 1:
            self._files = [file for file in self._files if file.names] or self._files[:1]
        self.names = list(dict.fromkeys(name for file in self._files for name in (*file.names, *file.constants)))
        self._columns: list[str] = []
        self._types: dict[str, pa.DataType] = {}  # of all columns but those that are labels alone
        self._texts: dict[str, TextColumn] = {}

    @property
    def paths(self) -> list[Path]:
        """The files, in order."""
        return [file.path for file in self._files]

    def column(self, asked: str) -> str:
        """The column that is meant by a name, spaces around it or not. Raises InputError when there is none."""
        near = [name for name in self.names if name == asked] or [n for n in self.names if clean(n) == clean(asked)]
        if len(near) != 1:
            raise InputError(f"{shown(self.source)} {lacking(asked, self.names)}")
        for file in self._files:
            if file.names.count(near[0]) > 1:
                raise InputError(f"{shown(file.path)} has two columns named {near[0]!r}; rename one of them")
        return near[0]

    def choose(self, labels: Sequence[str], values: Sequence[str]) -> None:
        """Settle which columns `batches` yields. Labels stay as they are in each file; so do texts that are both."""
        self._columns = list(dict.fromkeys([*labels, *values]))
        for column in self._columns:
            self._note_absent(column)
            text = any(file.has_text(column) for file in self._files)
            if column not in labels or (column in values and not text):
                self._types[column] = pa.null()
        self._look_at_texts()
        self._types = {column: self._unified(column) for column in self._types}

    def type(self, column: str) -> pa.DataType:
        """The type of a column over all files."""
        return self._types.get(column, pa.string())

    def instant_type(self, column: str) -> np.dtype:
        """The type that holds the instants of a column of times (`arrays.instants`)."""
        return np.dtype(np.float64 if types.is_floating(self.type(column)) else np.int64)

    def example(self, column: str) -> str:
        """A value of a column of texts, or nothing."""
        return self._texts[column].example if column in self._texts else ""

    def number_example(self, column: str) -> str:
        """A value of a column of texts that is a number, or nothing."""
        return self._texts[column].number_example if column in self._texts else ""

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows, in order, a few thousand at a time."""
        for file in self._files:
            for batch in self._read(file):
                arrays = [self._typed(file, batch, column) for column in self._columns]
                yield pa.record_batch(arrays, names=self._columns)

    def _typed(self, file: _File, batch: pa.RecordBatch, column: str) -> pa.Array:
        kind = self._types.get(column)
        if column not in batch.schema.names:
            return pa.nulls(batch.num_rows, kind or pa.string())
        values = batch.column(column)
        try:
            if kind is None:  # a label: decimals stay, they have exact names
                return values if types.is_decimal(values.type) else plain(values)
            if file.has_text(column):
                values = self._texts[column].read(values, kind)
            return plain(values).cast(kind, safe=types.is_integer(kind))
        except pa.ArrowException as error:
            raise _unreadable(file.path, error) from error

    def _read(self, file: _File) -> Iterator[pa.RecordBatch]:
        try:
            yield from file.batches(self._columns)
        except DAMAGE as error:
            raise _unreadable(file.path, error) from error

    def _opened(self, path: Path, wanted: Sequence[str]) -> _File:
        file = _File(path, _partition(path, self.source))
        try:
            if FORMATS[suffix(path)] == "csv":
                file.dialect = sniff(path, wanted, self.notes)
                file.names = [clean(name) for name in file.dialect.header]
            else:
                schema = schema_of(path)
                file.names, file.types = schema.names, {f.name: plain_type(f.type) for f in schema}
        except DAMAGE as error:
            raise _unreadable(path, error) from error
        if file.dialect and not file.names:
            if path == self.source:
                raise InputError(f"{shown(path)} cannot be read as {suffix(path)[1:]} (it is empty); export it again")
            self.notes.add("files left out", "they are empty", within(path, self.source), "remove them")
        for name in file.constants.keys() & set(file.names):
            why = f"the files have the column {shown(name)!r} themselves"
            self.notes.add("folder names not used as columns", why, within(path, self.source), "rename the folders")
        return file

    def _look_at_texts(self) -> None:
        """Read the texts once, to see what they are; those of labels too: a broken line is found before anything is
        written."""
        for file in self._files:
            texts = [column for column in self._types if file.has_text(column)]
            row = {column: file.constant(column, 1) for column in texts if column in file.constants}
            for batch in self._read(file) if file.dialect else [pa.record_batch(row)] if row else ():
                for column in texts:
                    known = self._texts.setdefault(column, TextColumn(column, self.source, self.notes))
                    known.look(batch.column(column), file.dialect.delimiter if file.dialect else "")

    def _unified(self, column: str) -> pa.DataType:
        """One type for a column over all files, noted where they differ."""
        found: dict[pa.DataType, Path] = {}
        for file in self._files:
            if column in file.types:
                found.setdefault(file.types[column], file.path)
        if column in self._texts:
            found.setdefault(self._texts[column].settle(), self.source)
        kinds = list(found) or [pa.null()]
        unified = kinds[0]
        for kind in kinds[1:]:
            wider = common_type(unified, kind)
            if wider is None:
                raise InputError(
                    f"column {column!r} is {unified} in {shown(found[kinds[0]])} and {kind} in {shown(found[kind])}; "
                    "make it one type"
                )
            unified = wider
        several = [kind for kind in kinds if not types.is_null(kind)]
        if len(several) > 1:
            why = f"column {shown(column)!r} is {' and '.join(map(str, several))} and is read as {unified}"
            example = within(found[several[1]], self.source)
            self.notes.add("columns of several types unified", why, example, "write it as one type in all files")
        return unified

    def _note_absent(self, column: str) -> None:
        lacking = [file.path for file in self._files if column not in file]
        if lacking:
            why = f"column {shown(column)!r} is absent, so that its values are missing in all their rows"
            example, remedy = within(lacking[0], self.source), "add the column there or leave the files out"
            self.notes.add("files without a column", why, example, remedy, len(lacking))


def _unreadable(path: Path, error: Exception) -> InputError:
    form = FORMATS[suffix(path)]
    if form == "csv":
        form = suffix(path)[1:]
        try:
            with open_text(path) as file:
                for _ in limited_lines(file, path):  # raises where a line is what is too long
                    pass
        except UnicodeError:
            return InputError(f"{shown(path)} cannot be read as csv (it is not UTF-8 text); convert it to UTF-8")
        except DAMAGE:
            pass
    why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return InputError(f"{shown(path)} cannot be read as {form} ({shown(why)}); mend or export it again")


def _dataset(path: Path) -> Any:
    import pyarrow.dataset as ds
    from pyarrow.fs import LocalFileSystem

    form = FORMATS[suffix(path)]
    return ds.dataset(str(path.absolute()), format=form, filesystem=LocalFileSystem(use_mmap=True))


def _is_stream(path: Path) -> bool:
    """Whether an Arrow file is in the streaming form, which has no index at its end."""
    with open_regular(path) as file:
        return FORMATS[suffix(path)] == "ipc" and file.read(4) == b"\xff\xff\xff\xff"


def schema_of(path: Path) -> pa.Schema:
    """The schema of a Parquet or Arrow file."""
    return pa.ipc.open_stream(pa.memory_map(str(path))).schema if _is_stream(path) else _dataset(path).schema


def typed_batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a Parquet or Arrow file, a few thousand rows at a time."""
    if _is_stream(path):
        for batch in pa.ipc.open_stream(pa.memory_map(str(path))):
            yield from _cut(batch.select(columns))
        return
    scanner = _dataset(path).scanner(columns, batch_size=BATCH_ROWS, batch_readahead=2, fragment_readahead=1)
    yield from scanner.to_batches()


def _text_batches(file: _File, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Everything as strings."""
    import pyarrow.csv as csv

    assert file.dialect is not None
    names = [file.dialect.header[file.names.index(name)] for name in columns]
    encoding = "utf8" if file.dialect.encoding == "utf-8-sig" else file.dialect.encoding
    reader = csv.open_csv(
        pa.input_stream(str(file.path.absolute()), compression="gzip" if packed(file.path) else None),
        csv.ReadOptions(block_size=LINE_BYTES, encoding=encoding),
        csv.ParseOptions(delimiter=file.dialect.delimiter, newlines_in_values=True),
        csv.ConvertOptions(include_columns=names or None, column_types=dict.fromkeys(names, pa.string())),
    )
    for block in reader:
        yield from _cut(block.rename_columns(columns) if columns else block.select([]))


def _cut(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    for start in range(0, batch.num_rows, BATCH_ROWS):
        yield batch.slice(start, BATCH_ROWS)


def _partition(path: Path, source: Path) -> dict[str, str | None]:
    """The columns that the folders between the source and a file name: user=1, country=unknown."""
    folders = path.relative_to(source).parts[:-1] if source != path else ()
    pairs = [folder.split("=", 1) for folder in folders if "=" in folder]
    return {unquote(key): None if value == HIVE_NULL else unquote(value) for key, value in pairs}


def _files(source: Path, notes: Notes) -> list[Path]:
    if not source.exists():
        raise InputError(f"{shown(source)} does not exist; give a file or a folder of {', '.join(FORMATS)} files")
    files, listed = [], files_below(source, source, notes) if source.is_dir() else [source]
    for file in listed:
        if suffix(file) not in FORMATS or any(part.startswith("_") for part in file.relative_to(source).parts):
            if source.is_dir():
                why = f"no {', '.join(FORMATS)} files, or named with an underscore like those of tools"
                notes.add("files left out", why, within(file, source), "convert or rename them to have them imported")
            continue
        require_regular(file)
        if str(file) != str(file).encode(errors="replace").decode():
            raise InputError(f"the name of {shown(file)} is not UTF-8; rename it")
        files.append(file)
    if not files:
        raise InputError(f"{shown(source)} holds no {', '.join(FORMATS)} file; convert the data to one of them")
    if len({suffix(file) if suffix(file) == ".tsv" else FORMATS[suffix(file)] for file in files}) > 1:
        raise InputError(f"{shown(source)} mixes file formats; keep one of {', '.join(FORMATS)} in it")
    return sorted(files)
