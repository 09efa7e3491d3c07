"""Streaming rows out of Parquet, CSV, TSV and Arrow files, and Arrow columns as numpy arrays."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from metadist.data.splits import did_you_mean
from metadist.errors import InputError

FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".arrow": "ipc", ".feather": "ipc", ".ipc": "ipc"}
BATCH_ROWS = 8192
_WIDER = {"null": pa.int64(), "int64": pa.float64()} | dict.fromkeys(
    ("double", "bool", "timestamp", "date32", "time32"), pa.string()
)
_CONVERSION = re.compile(r"CSV column #(\d+): (?:Row #\d+: )?CSV conversion error to (\w+)")


class Rows:
    """Some columns of a file, or of all files of one format in a folder in the order of their names; re-readable.

    The `labels` among them are read as strings where the format has no types (CSV), so that "007" stays a name. Other
    CSV types are guessed from the first block; where a later value does not fit, the column is widened and the files
    are read again, all in the constructor. Raises InputError when the files cannot be read or a column is not there.
    """

    def __init__(self, source: Path, columns: Sequence[str], labels: Sequence[str]) -> None:
        self.source, self.columns = source, list(columns)
        self._files = _files(source)
        self._format = FORMATS[_suffix(self._files[0])]
        self._types: dict[str, pa.DataType] = dict.fromkeys(labels, pa.string())
        self._dataset = self._open()
        for column in columns:
            self._require(column)
        while self._format in ("csv", "tsv") and not self._types_fit():
            self._dataset = self._open()

    @property
    def schema(self) -> pa.Schema:
        return self._dataset.schema

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows, in order, a few thousand at a time."""
        try:
            yield from self._scan()
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from error

    def _scan(self) -> Iterator[pa.RecordBatch]:
        scanner = self._dataset.scanner(self.columns, batch_size=BATCH_ROWS, batch_readahead=2, fragment_readahead=1)
        return (batch for batch in scanner.to_batches() if batch.num_rows)

    def _require(self, column: str) -> None:
        names = self.schema.names
        if column not in names:
            hint = did_you_mean(column, names)
            raise InputError(f"{self.source} has no column {column!r}{hint}; it has {', '.join(names)}")

    def _open(self) -> Any:
        import pyarrow.csv as csv
        import pyarrow.dataset as ds
        from pyarrow.fs import LocalFileSystem

        form: Any = self._format
        if form in ("csv", "tsv"):
            parse = csv.ParseOptions(delimiter="\t" if form == "tsv" else ",", newlines_in_values=True)
            convert = csv.ConvertOptions(column_types=self._types)
            form = ds.CsvFileFormat(parse_options=parse, convert_options=convert)
        try:
            files = LocalFileSystem(use_mmap=True)
            return ds.dataset([str(file.absolute()) for file in self._files], format=form, filesystem=files)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from error

    def _types_fit(self) -> bool:
        """Read everything once; False when a column had to be widened."""
        try:
            for _ in self._scan():
                pass
        except pa.ArrowInvalid as error:
            found = _CONVERSION.search(str(error))
            wider = _WIDER.get(found[2]) if found else None
            column = self.schema.names[int(found[1])] if found else ""
            if wider is None or self._types.get(column) == wider:
                raise self._unreadable(error) from error
            self._types[column] = wider
            return False
        return True

    def _unreadable(self, error: Exception) -> InputError:
        why = str(error).splitlines()[0].rstrip(".")
        return InputError(f"{self.source} cannot be read as {self._format} ({why}); mend or export it again")


def _suffix(file: Path) -> str:
    return (file.with_suffix("") if file.suffix.lower() == ".gz" else file).suffix.lower()


def _files(source: Path) -> list[Path]:
    if not source.exists():
        raise InputError(f"{source} does not exist; give a file or a folder of {', '.join(FORMATS)} files")
    inside = source.rglob("*") if source.is_dir() else [source]
    files = sorted(file for file in inside if _suffix(file) in FORMATS and file.is_file() and file.name[0] not in "._")
    if not files:
        raise InputError(f"{source} holds no {', '.join(FORMATS)} file; convert the data to one of them")
    if len({FORMATS[_suffix(file)] for file in files}) > 1:
        raise InputError(f"{source} mixes file formats; keep one of {', '.join(FORMATS)} in it")
    return files


def strings(batch: pa.RecordBatch, column: str, source: Path) -> tuple[list[str], np.ndarray, int]:
    """A column as names and codes: distinct names, int64 [n] into them, and how many rows have no name ("")."""
    values = batch.column(column)
    if pa.types.is_floating(values.type) or pa.types.is_nested(values.type):
        raise InputError(f"column {column!r} of {source} is {values.type}, not names; give it text or integers")
    try:
        names = pc.fill_null(values.cast(pa.string()), "")
    except pa.ArrowException as error:
        raise InputError(f"column {column!r} of {source} ({values.type}) holds no names; give it text") from error
    encoded = names.dictionary_encode()
    known = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy().astype(np.int64)
    return known, codes, int((codes == known.index("")).sum()) if "" in known else 0


def numbers(batch: pa.RecordBatch, column: str, source: Path) -> tuple[np.ndarray, np.ndarray]:
    """A column of numbers or of equally long lists of numbers: values and which are present (neither null nor NaN),
    [n] or [n, width]. Absent values are 0."""
    values = batch.column(column)
    kind = values.type
    if not is_list(kind):
        return _scalars(values, column, source)
    present = values.is_valid().to_numpy(zero_copy_only=False)
    lists = values.drop_null()
    width = kind.list_size if pa.types.is_fixed_size_list(kind) else None
    if width is None:
        lengths = pc.call_function("list_value_length", [lists]).unique().to_pylist()
        if len(lengths) > 1 or lengths == [0]:
            raise InputError(f"column {column!r} of {source} has lists of several lengths; make them equally long")
        width = lengths[0] if lengths else 0
    flat, inner = _scalars(lists.flatten(), column, source)
    out = np.zeros((len(values), width), dtype=flat.dtype)
    known = np.zeros((len(values), width), dtype=bool)
    if width:
        out[present], known[present] = flat.reshape(-1, width), inner.reshape(-1, width)
    return out, known


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def is_text(kind: pa.DataType) -> bool:
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(inner) or pa.types.is_large_string(inner)


def _scalars(values: pa.Array, column: str, source: Path) -> tuple[np.ndarray, np.ndarray]:
    kind = values.type
    if pa.types.is_null(kind):
        return np.zeros(len(values), np.float32), np.zeros(len(values), bool)
    if not (pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise InputError(f"column {column!r} of {source} is {kind}, not numbers; encode it as numbers first")
    present = values.is_valid().to_numpy(zero_copy_only=False)
    data = np.zeros(len(values), dtype=kind.to_pandas_dtype())
    data[present] = values.drop_null().to_numpy(zero_copy_only=False)
    if data.dtype.kind == "f":
        present = present & ~np.isnan(data)
        data[~present] = 0
    return data, present
