"""Reading a dataset: one memory-mapped Arrow table per split, its rows sorted by group.

A dataset is a directory of Arrow IPC files: `train.arrow`, `validation.arrow`, `test.arrow` and, where groups share
rows, `shared.arrow`. Each holds one uncompressed record batch, so that every column is one contiguous range of the
memory map and a numpy view of it costs nothing.
"""

import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from metadist.core.errors import InputError
from metadist.core.task import SPLITS, Examples, Split
from metadist.data.files import require_regular
from metadist.data.mapped import blocks

FORMAT_VERSION = 1
NEEDS = "0.1.0"  # the first metadist that reads FORMAT_VERSION
KEY = b"metadist"
SHARED = "shared.arrow"
HEADER_BYTES = 1 << 28
KINDS = ("classes", "labelled", "values")
KEPT_OPEN = 4  # datasets that `open_dataset` remembers
SETTLED_NS = 200_000_000  # a file changed more recently may change again within one tick of the file system's clock
_HEADER = {
    "version": int, "needs": str, "kind": str, "source": str, "licence": str, "options": dict, "extra": dict,
    "fields": list, "ranges": dict, "counts": dict, "digest": str,
}  # fmt: skip
_NOTE = {"what": str, "count": int, "why": str, "example": str, "remedy": str}


@dataclass(frozen=True)
class Field:
    """One column: an array of `shape` per row, stored as `dtype`.

    `gather` returns uint8 and float fields as float32 `(stored - offset) * scale`; the inverse is
    `value / scale + offset`. Other integers and booleans come out as stored, and ignore both. The values of a `shared`
    field lie in `shared.arrow`, one row per distinct item, and rows point to them.
    """

    name: str
    role: Literal["input", "target"]
    dtype: str
    shape: tuple[int, ...]
    offset: float = 0.0
    scale: float = 1.0
    shared: bool = False

    @property
    def arrow_type(self) -> pa.DataType:
        """How a row is stored. A lone bool takes a byte: Arrow's own are bits, which numpy cannot view."""
        if self.shape:
            return pa.binary(int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize)
        return pa.uint8() if self.dtype == "bool" else pa.from_numpy_dtype(np.dtype(self.dtype))


class Column:
    """The view of one field's rows, and how they become model inputs."""

    def __init__(self, field: Field, view: np.ndarray) -> None:
        self.view, self.shared = view, field.shared
        self._float = view.dtype == np.uint8 or view.dtype.kind == "f"
        # float64 is shifted before it is rounded: large offsets (times, say) would lose their digits otherwise
        self._work = np.float64 if view.dtype == np.float64 else np.float32
        self._offset, self._scale = self._work(field.offset), self._work(field.scale)
        self._shifts, self._scales = field.offset != 0.0, field.scale != 1.0

    def take(self, rows: np.ndarray) -> np.ndarray:
        values = np.take(self.view, rows, axis=0)
        if not self._float:
            return values
        values = values.astype(self._work, copy=False)
        if self._shifts:
            values -= self._offset
        if self._scales:
            values *= self._scale
        return values.astype(np.float32, copy=False)


class Table:
    """One split: rows sorted by group, memory-mapped, zero copy. Pickles as its path.

    `starts[g]` and `counts[g]` (int64 [G]) say which rows group `g` has; `parents` (int32 [G], or None) numbers each
    group's parent within `parent_names`; `index` (int64 [rows], or None) points into the shared rows.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises InputError when the file is missing, damaged, of a later format, or not a dataset's."""
        self.path = Path(path)
        self.metadata, batch = read_batch(self.path)
        self.fields = _read_fields(self.path, self.metadata)
        self.kind: str = self.metadata["kind"]
        self.digest: str = self.metadata["digest"]
        self.num_rows: int = batch.num_rows
        self.group_names, codes = _categories(self.path, batch, "group")
        self.starts, self.counts = _runs(self.path, codes, len(self.group_names))
        self.parents, self.parent_names = self._read_parents(batch)
        self.index: np.ndarray | None = None
        shared = batch
        if any(field.shared for field in self.fields):
            self.index = _view(self.path, batch, Field("index", "input", "int64", ()))
            _, shared = read_batch(self.path.parent / SHARED)
        files = {False: (self.path, batch), True: (self.path.parent / SHARED, shared)}
        self._columns = {f.name: Column(f, _view(*files[f.shared], f)) for f in self.fields}
        self._inputs = tuple(self._columns[field.name] for field in self.fields if field.role == "input")
        self._targets = tuple(self._columns[field.name] for field in self.fields if field.role == "target")

    def __reduce__(self):
        return Table, (str(self.path),)

    def column(self, name: str) -> np.ndarray:
        """A read-only view [rows, *shape] of a field as stored; of a shared field, all shared rows."""
        return self._columns[name].view

    def gather(self, rows: np.ndarray) -> Examples:
        """A copy of the inputs and targets of `rows` (int64 [n]): uint8 and float fields as float32
        `(stored - offset) * scale`, other integers and booleans as stored."""
        items = rows if self.index is None else np.take(self.index, rows)
        inputs = tuple([column.take(items if column.shared else rows) for column in self._inputs])
        return Examples(inputs, tuple([column.take(items if column.shared else rows) for column in self._targets]))

    @cached_property
    def labels(self) -> np.ndarray:
        """The different labels (values of the first target field), sorted."""
        return np.unique(self.labels_of_rows())

    @cached_property
    def label_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """For each pair of a group and a label that rows have: the group, and how many rows; int64 [pairs] each."""
        codes = np.searchsorted(self.labels, self.labels_of_rows())
        groups = np.arange(len(self.counts)).repeat(self.counts)
        pairs, rows = np.unique(groups * len(self.labels) + codes, return_counts=True)
        return pairs // len(self.labels), rows

    def labels_of_rows(self) -> np.ndarray:
        """The label of each row, [rows]."""
        return self.column(next(field.name for field in self.fields if field.role == "target"))

    def verify(self) -> None:
        """Read everything: raises InputError when an index points nowhere or the content does not match its digest."""
        if self.index is not None:
            items = len(next(column.view for column in self._columns.values() if column.shared))
            if self.num_rows and not 0 <= int(self.index.min()) <= int(self.index.max()) < items:
                raise _damaged(self.path, "its index points outside the shared rows")
        stored = [self._columns[field.name].view for field in self.fields if not field.shared]
        if self.index is not None:
            stored.append(self.index)
        parents = None if self.parents is None else [self.parent_names[p] for p in self.parents]
        if digest_of(self.fields, (self.kind, self.group_names, self.counts.tolist(), parents), stored) != self.digest:
            raise _damaged(self.path, "its content does not match its digest")

    def _read_parents(self, batch: pa.RecordBatch) -> tuple[np.ndarray | None, list[str]]:
        if "parent" not in batch.schema.names:
            return None, []
        names, codes = _categories(self.path, batch, "parent")
        parents = np.array(codes[self.starts], dtype=np.int32)
        if len(parents) and not 0 <= parents.min() <= parents.max() < len(names):
            raise _damaged(self.path, "a group's parent has no name")
        return parents, names


class Dataset:
    """A dataset directory. `splits` holds the tables there are; `digest` (32 hex digits) stands for all their content;
    `metadata` says where it came from (source, licence, options, extra) and what the import left out, merged, filled
    in, cut or scaled (notes: what, count, why, example, remedy each). Pickles as its path."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(f"{self.path} is not a dataset folder; `metadist data` writes one")
        files: dict[Split, Path] = {split: self.path / f"{split}.arrow" for split in SPLITS}
        self.splits: dict[Split, Table] = {split: Table(file) for split, file in files.items() if file.exists()}
        if not self.splits:
            raise InputError(f"{self.path} holds no train.arrow, validation.arrow or test.arrow; `metadist data` does")
        first, *others = self.splits.values()
        for table in others:
            if (table.fields, table.kind) != (first.fields, first.kind):
                raise InputError(f"{table.path} and {first.path} have different fields; import them together")
        self.kind, self.fields = first.kind, first.fields
        self.metadata: dict[str, Any] = {k: first.metadata[k] for k in ("version", "source", "licence", "options")}
        self.metadata |= {"extra": first.metadata["extra"], "notes": _read_notes(first)}
        digests: dict[str, str] = {split: table.digest for split, table in self.splits.items()}
        self.shared_ranges: dict[str, list[float]] = {}
        if any(field.shared for field in self.fields):
            header, _ = read_batch(self.path / SHARED)
            self.shared_ranges = header["ranges"]
            digests["shared"] = header["digest"]
        self.digest: str = digest_of_all(digests)

    def __reduce__(self):
        return open_dataset, (str(self.path),)

    def verify(self) -> None:
        """Read everything: raises InputError where the content of a file does not match its digest."""
        for table in self.splits.values():
            table.verify()
        fields = tuple(field for field in self.fields if field.shared)
        if fields:
            header, batch = read_batch(self.path / SHARED)
            views = [_view(self.path / SHARED, batch, field) for field in fields]
            if digest_of(fields, (), views) != header["digest"]:
                raise _damaged(self.path / SHARED, "its content does not match its digest")


_opened: dict[str, tuple[list[Any], Dataset]] = {}
_opening = threading.Lock()


def open_dataset(path: str | Path, *, verify: bool = False) -> Dataset:
    """Open a dataset directory, as `metadist data ...` or a `DatasetWriter` wrote it. Nothing is read but headers and
    group names: columns are views of the memory map.

    The same path gives the same object for as long as its files are the same (by size, time of change and inode), so
    that a process scans the groups once.

    Args:
        path: the directory.
        verify: also read everything and recompute the digests.

    Raises:
        InputError: a file is damaged, cut short, of a later format, or not a dataset's.

    Example:
        >>> train = open_dataset("data/digits").splits["train"]
        >>> train.group_names[0], train.counts[0]                   # rows starts[0] ... starts[0] + counts[0]
        ('3', 183)
        >>> train.gather(np.arange(5)).inputs[0].shape              # float32 [n, *field shape]
        (5, 1, 8, 8)
    """
    place = os.path.abspath(path)
    with _opening:
        stamp = _stamp(place)
        known = _opened.pop(place, None)
        dataset = known[1] if known and known[0] == stamp else Dataset(path)
        if stamp and time.time_ns() - max(changed for _, changed, *_ in stamp) > SETTLED_NS:
            _opened[place] = stamp, dataset
        while len(_opened) > KEPT_OPEN:
            del _opened[next(iter(_opened))]
    if verify:
        dataset.verify()
    return dataset


def _stamp(folder: str) -> list[Any]:
    """Stands for the files of a dataset, as far as can be seen without reading them."""
    stamp = []
    for name in (*(f"{split}.arrow" for split in SPLITS), SHARED):
        try:
            found = os.stat(os.path.join(folder, name))
        except (OSError, ValueError):
            continue
        stamp.append((name, found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev))
    return stamp


def digest_of(fields: Iterable[Field], labels: tuple[Any, ...], columns: Iterable[np.ndarray]) -> str:
    """sha256 (hex) of what the rows mean (fields, group names and sizes) and of every byte of the columns."""
    content = hashlib.sha256(json.dumps([[asdict(field) for field in fields], labels], sort_keys=True).encode())
    for column in columns:
        data = column.reshape(-1).view(np.uint8)
        for block in blocks(data):
            content.update(data[block].data)
    return content.hexdigest()


def digest_of_all(digests: Mapping[str, str]) -> str:
    """The digest of a dataset, of those of its splits in their order and of its shared rows."""
    return hashlib.sha256("\n".join(f"{name} {digest}" for name, digest in digests.items()).encode()).hexdigest()[:32]


def read_batch(path: Path) -> tuple[dict[str, Any], pa.RecordBatch]:
    """The header (schema metadata) and the one record batch of a file, memory-mapped."""
    try:
        if path.exists():
            require_regular(path)
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        header = read_header(path, (reader.schema.metadata or {})[KEY])
        if reader.num_record_batches != 1:
            raise _damaged(path, f"it has {reader.num_record_batches} record batches instead of 1")
        batch = reader.get_batch(0)
        batch.validate()
        if len(set(batch.schema.names)) < batch.num_columns:  # the names are read here: they may be no UTF-8
            raise _damaged(path, "it has two columns of one name")
        if header["counts"]["rows"] != batch.num_rows:
            raise _damaged(path, f"it has {batch.num_rows} rows instead of {header['counts']['rows']}")
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; import the dataset again") from error
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, str(error).splitlines()[0].rstrip(".")) from error
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, a huge number
        raise _damaged(path, "its header is not a dataset's") from error
    return header, batch


def read_header(path: str | Path, text: bytes) -> dict[str, Any]:
    """What the schema metadata of a dataset's file says. Raises InputError that names `path`, or ValueError."""
    if len(text) > HEADER_BYTES:
        raise ValueError("longer than any header")
    header = json.loads(text)
    version = header["version"]
    if type(version) is not int or version < 1:
        raise _damaged(path, f"its header has version {version!r}")
    if version > FORMAT_VERSION:
        raise InputError(
            f"{path} has dataset format {version} and this metadist reads {FORMAT_VERSION}; "
            f"install metadist >= {header['needs']}"
        )
    if absent := _HEADER.keys() - header.keys():
        raise _damaged(path, f"its header lacks {min(absent)!r}")
    wrong = [key for key, kind in _HEADER.items() if not isinstance(header[key], kind)]
    if wrong or header["kind"] not in KINDS:
        raise _damaged(path, f"its header has another kind of {(wrong or ['kind'])[0]}")
    return header


def _read_fields(path: Path, header: dict[str, Any]) -> tuple[Field, ...]:
    try:
        fields = tuple(Field(**{**field, "shape": tuple(field["shape"])}) for field in header["fields"])
        if all(map(_is_sound, fields)) and len({field.name for field in fields}) == len(fields) > 0:
            return fields
    except (KeyError, TypeError, ValueError, OverflowError, pa.ArrowException):
        pass
    raise _damaged(path, "its header does not describe its fields")


def _is_sound(field: Field) -> bool:
    """Whether a header's field is one that the writer could have described."""
    numbers = [isinstance(value, int | float) and math.isfinite(value) for value in (field.offset, field.scale)]
    sizes = [type(size) is int and size > 0 for size in field.shape]
    return (
        isinstance(field.name, str)
        and field.role in ("input", "target")
        and isinstance(field.shared, bool)
        and all(numbers + sizes)
        and field.scale != 0
        and np.dtype(field.dtype).kind in "biuf"
        and np.dtype(field.dtype).name == field.dtype
        and math.prod(field.shape) < 2**31
        and field.arrow_type is not None
    )


def _read_notes(table: Table) -> list[dict[str, Any]]:
    """What the import left out, merged, filled in, cut or scaled; tables of before there were notes have none."""
    notes = table.metadata.get("notes", [])
    sound = isinstance(notes, list) and all(isinstance(note, dict) and note.keys() == _NOTE.keys() for note in notes)
    if not sound or not all(isinstance(note[key], kind) for note in notes for key, kind in _NOTE.items()):
        raise _damaged(table.path, "its header has another kind of notes")
    return notes


def _damaged(path: str | Path, why: str) -> InputError:
    return InputError(f"{path} is damaged or no metadist dataset ({why}); import it again")


def _view(path: Path, batch: pa.RecordBatch, field: Field) -> np.ndarray:
    """A read-only view [rows, *shape] of a column's bytes in the memory map."""
    if field.name not in batch.schema.names:
        raise _damaged(path, f"column {field.name!r} is missing")
    column = batch.column(field.name)
    if column.type != field.arrow_type or column.null_count:
        raise _damaged(path, f"column {field.name!r} is {column.type} instead of {field.arrow_type} without nulls")
    dtype, shape = np.dtype(field.dtype), (batch.num_rows, *field.shape)
    buffer = column.buffers()[1]
    size = int(np.prod(shape))
    if buffer is None or buffer.size < size * dtype.itemsize:
        raise _damaged(path, f"column {field.name!r} is cut short")
    return np.frombuffer(buffer, dtype=dtype, count=size).reshape(shape)


def _categories(path: Path, batch: pa.RecordBatch, name: str) -> tuple[list[str], np.ndarray]:
    """The names of a dictionary column, and its codes, int32 [rows]."""
    kind = pa.dictionary(pa.int32(), pa.string())
    if name not in batch.schema.names or batch.column(name).type != kind:
        raise _damaged(path, f"column {name!r} is missing or not a {kind}")
    column = batch.column(name)
    try:
        column.dictionary.validate(full=True)
    except pa.ArrowException as error:
        raise _damaged(path, f"the names in column {name!r} cannot be read") from error
    codes = pa.record_batch([column.indices], names=[name])
    return column.dictionary.to_pylist(), _view(path, codes, Field(name, "input", "int32", ()))


def _runs(path: Path, codes: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """First row and number of rows of each group, int64 [G] each; the groups must lie one after the other."""
    changes = np.flatnonzero(codes[1:] != codes[:-1]) + 1
    starts = np.concatenate([np.zeros(min(1, len(codes)), np.int64), changes]).astype(np.int64)
    if not np.array_equal(codes[starts], np.arange(groups)):
        raise _damaged(path, "the rows of its groups do not lie together")
    return starts, np.diff(starts, append=len(codes))
