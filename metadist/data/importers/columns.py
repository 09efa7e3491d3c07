"""Streaming rows out of Parquet, CSV, TSV and Arrow files, with one type per column over all files."""

import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute

from metadist.core.errors import InputError, did_you_mean
from metadist.data.files import files_below, open_regular, require_regular, within
from metadist.data.importers.delimited import LINE_BYTES, Dialect, TextColumn, packed, sniff, suffix
from metadist.data.names import clean
from metadist.data.notes import Notes, shown

pc: Any = pyarrow.compute  # its functions are made at run time, which type checkers do not see
FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "ipc", ".feather": "ipc", ".ipc": "ipc"}
BATCH_ROWS = 8192
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
DAMAGE = (pa.ArrowException, OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError)


@dataclass
class _File:
    path: Path
    names: list[str]  # as they are asked for: without spaces around them in text files
    types: dict[str, pa.DataType] = field(default_factory=dict)  # none in text files
    dialect: Dialect | None = None
    partition: dict[str, str | None] = field(default_factory=dict)  # columns that folders like user=1 name


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
        self.names = list(dict.fromkeys(name for file in self._files for name in (*file.names, *file.partition)))
        self._columns: list[str] = []
        self._types: dict[str, pa.DataType] = {}
        self._texts: dict[str, TextColumn] = {}

    def column(self, asked: str) -> str:
        """The column that is meant by a name, spaces around it or not. Raises InputError when there is none."""
        near = [name for name in self.names if name == asked] or [n for n in self.names if clean(n) == clean(asked)]
        if len(near) != 1:
            hint = did_you_mean(asked, self.names)
            listed = ", ".join(map(shown, self.names[:50])) + (", ..." if len(self.names) > 50 else "")
            raise InputError(f"{shown(self.source)} has no column {asked!r}; it has {listed}{hint}")
        twice = next((file for file in self._files if file.names.count(near[0]) > 1), None)
        if twice is not None:
            raise InputError(f"{shown(twice.path)} has two columns named {near[0]!r}; rename one of them")
        return near[0]

    def choose(self, labels: Sequence[str], values: Sequence[str]) -> None:
        """Settle which columns `batches` yields. Labels stay as they are in each file; so do texts that are both."""
        self._columns = list(dict.fromkeys([*labels, *values]))
        texts = {name for file in self._files for name in (*file.names, *file.partition) if name not in file.types}
        typed = [
            column for column in self._columns if column not in labels or (column in values and column not in texts)
        ]
        self._note_absent()
        if any(file.dialect or file.partition for file in self._files):
            self._look_at_texts(typed)
        self._types = {column: self._unified(column) for column in typed}

    def type(self, column: str) -> pa.DataType:
        """The type of a column over all files."""
        return self._types.get(column, pa.string())

    def example(self, column: str) -> str:
        """A value of a column of texts, or nothing."""
        return self._texts[column].example if column in self._texts else ""

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows, in order, a few thousand at a time."""
        for file in self._files:
            for batch in self._read(file):
                arrays = [self._as_settled(file, batch, column) for column in self._columns]
                yield pa.record_batch(arrays, names=self._columns)

    def _as_settled(self, file: _File, batch: pa.RecordBatch, column: str) -> pa.Array:
        kind = self._types.get(column)
        if column not in batch.schema.names:
            return pa.nulls(batch.num_rows, kind or pa.string())
        values = batch.column(column)
        try:
            if kind is None:  # a label: decimals stay, they have exact names
                return values if pa.types.is_decimal(values.type) else plain(values)
            if column not in file.types:
                values = self._texts[column].read(values, kind)
            return plain(values).cast(kind, safe=pa.types.is_integer(kind))
        except pa.ArrowException as error:
            raise self._unreadable(file, error) from error

    def _read(self, file: _File) -> Iterator[pa.RecordBatch]:
        """The columns that a file has, and those that its folders name."""
        own = [column for column in self._columns if column in file.names]
        named = [column for column in self._columns if column in file.partition and column not in own]
        try:
            for batch in _text_batches(file, own) if file.dialect else _typed_batches(file, own):
                for column in named:
                    batch = batch.append_column(column, _constant(file.partition[column], batch.num_rows))
                if batch.num_rows:
                    yield batch
        except DAMAGE as error:
            raise self._unreadable(file, error) from error

    def _opened(self, path: Path, wanted: Sequence[str]) -> _File:
        file = self._described(path, wanted)
        for name in file.partition.keys() & set(file.names):
            why = f"the files have the column {shown(name)!r} themselves"
            self.notes.add("folder names not used as columns", why, within(path, self.source), "rename the folders")
        return file

    def _described(self, path: Path, wanted: Sequence[str]) -> _File:
        file = _File(path, [], partition=_partition(path, self.source))
        if FORMATS[suffix(path)] == "csv":
            try:
                file.dialect = sniff(path, wanted, self.notes)
            except DAMAGE as error:
                raise self._unreadable(file, error) from error
            file.names = [clean(name) for name in file.dialect.header]
            if not file.names and path == self.source:
                raise InputError(f"{shown(path)} cannot be read as {suffix(path)[1:]} (it is empty); export it again")
            if not file.names:
                self.notes.add("files left out", "they are empty", within(path, self.source), "remove them")
            return file
        try:
            schema = _schema(path)
        except DAMAGE as error:
            raise self._unreadable(file, error) from error
        file.names, file.types = schema.names, {f.name: plain_type(f.type) for f in schema}
        return file

    def _look_at_texts(self, typed: Sequence[str]) -> None:
        """Read the texts once, to see what they are."""
        for file in self._files:
            texts = [
                column for column in typed if column not in file.types and column in (*file.names, *file.partition)
            ]
            if file.dialect:  # the labels are read too: a broken line is found before anything is written
                for batch in self._read(file):
                    self._look(file, batch, texts)
            elif texts:
                row = pa.record_batch([_constant(file.partition[column], 1) for column in texts], names=texts)
                self._look(file, row, texts)

    def _look(self, file: _File, batch: pa.RecordBatch, texts: Iterable[str]) -> None:
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
        settled = kinds[0]
        for kind in kinds[1:]:
            wider = common_type(settled, kind)
            if wider is None:
                raise InputError(
                    f"column {column!r} is {settled} in {shown(found[kinds[0]])} and {kind} in {shown(found[kind])}; "
                    "make it one type"
                )
            settled = wider
        told = [kind for kind in kinds if not pa.types.is_null(kind)]
        if len(told) > 1:
            why = f"column {shown(column)!r} is {' and '.join(map(str, told))} and is read as {settled}"
            example = within(found[told[1]], self.source)
            self.notes.add("columns of several types unified", why, example, "write it as one type in all files")
        return settled

    def _note_absent(self) -> None:
        for column in self._columns:
            lacking = [file for file in self._files if column not in file.names and column not in file.partition]
            if lacking:
                why = f"column {shown(column)!r} is absent, so that its values are missing in all their rows"
                example = within(lacking[0].path, self.source)
                remedy = "add the column there or leave the files out"
                self.notes.add("files without a column", why, example, remedy, len(lacking))

    def _unreadable(self, file: _File, error: Exception) -> InputError:
        if isinstance(error, UnicodeDecodeError):
            return InputError(f"{shown(file.path)} cannot be read as csv (it is not UTF-8 text); convert it to UTF-8")
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        if "straddl" in why:
            why = f"a row is longer than {LINE_BYTES >> 20} MiB"
        form = FORMATS[suffix(file.path)]
        name = suffix(file.path)[1:] if form == "csv" else form
        return InputError(f"{shown(file.path)} cannot be read as {name} ({shown(why)}); mend or export it again")


def plain(values: pa.Array) -> pa.Array:
    """An array without dictionaries, views and extension types."""
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    types: Any = pa.types
    if types.is_run_end_encoded(values.type):
        values = pc.run_end_decode(values)
    if types.is_list_view(values.type) or types.is_large_list_view(values.type):  # whose cast of a slice is wrong
        lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy()
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        values = pa.ListArray.from_arrays(pa.array(offsets), pc.list_flatten(values), mask=values.is_null())
    kind = plain_type(values.type)
    return values if kind == values.type else values.cast(kind, safe=False)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """What `plain` makes of a type: decimals become int64 where they are whole and fit, else float64."""
    types: Any = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_decimal(kind):
        return pa.int64() if kind.scale == 0 and kind.precision <= 18 else pa.float64()
    if types.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type), kind.list_size)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_list_view(kind) or types.is_large_list_view(kind):
        return pa.list_(plain_type(kind.value_type))
    return kind


def common_type(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both, or None: null gives way, integers widen, integer and float are float."""
    types: Any = pa.types
    if one == two or types.is_null(two):
        return one
    if types.is_null(one):
        return two
    lists = [types.is_list(kind) or types.is_fixed_size_list(kind) for kind in (one, two)]
    if any(lists):
        inner = common_type(one.value_type, two.value_type) if all(lists) else None
        return None if inner is None else pa.list_(inner)
    numbers = [types.is_boolean(k) or types.is_integer(k) or types.is_floating(k) for k in (one, two)]
    if not all(numbers):
        return None
    if types.is_floating(one) and types.is_floating(two):
        return one if one.bit_width > two.bit_width else two
    return pa.float64() if types.is_floating(one) or types.is_floating(two) else pa.int64()


def _dataset(path: Path) -> Any:
    import pyarrow.dataset as ds
    from pyarrow.fs import LocalFileSystem

    form = FORMATS[suffix(path)]
    return ds.dataset(str(path.absolute()), format=form, filesystem=LocalFileSystem(use_mmap=True))


def _is_stream(path: Path) -> bool:
    """Whether an Arrow file is in the streaming form, which has no index at its end."""
    with open_regular(path) as file:
        return FORMATS[suffix(path)] == "ipc" and file.read(4) == b"\xff\xff\xff\xff"


def _schema(path: Path) -> pa.Schema:
    if _is_stream(path):
        return pa.ipc.open_stream(pa.memory_map(str(path))).schema
    return _dataset(path).schema


def _typed_batches(file: _File, columns: list[str]) -> Iterator[pa.RecordBatch]:
    if _is_stream(file.path):
        for batch in pa.ipc.open_stream(pa.memory_map(str(file.path))):
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield batch.select(columns).slice(start, BATCH_ROWS)
        return
    scanner = _dataset(file.path).scanner(columns, batch_size=BATCH_ROWS, batch_readahead=2, fragment_readahead=1)
    yield from scanner.to_batches()


def _text_batches(file: _File, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Everything as strings."""
    import pyarrow.csv as csv

    assert file.dialect is not None
    raw = {name: file.dialect.header[file.names.index(name)] for name in columns}
    encoding = "utf8" if file.dialect.encoding == "utf-8-sig" else file.dialect.encoding
    names = list(raw.values())
    reader = csv.open_csv(
        pa.input_stream(str(file.path.absolute()), compression="gzip" if packed(file.path) else None),
        csv.ReadOptions(block_size=LINE_BYTES, encoding=encoding),
        csv.ParseOptions(delimiter=file.dialect.delimiter, newlines_in_values=True),
        csv.ConvertOptions(include_columns=names or None, column_types=dict.fromkeys(names, pa.string())),
    )
    for block in reader:
        batch = block.rename_columns(columns) if columns else block.select([])
        for start in range(0, block.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)


def _constant(value: str | None, rows: int) -> pa.Array:
    return pa.array([value] * rows, pa.string())


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
