"""Writing a dataset in two passes with bounded memory, all or nothing.

The first pass, the importer's, counts the rows of each group. In the second, each row is scattered to its final place
in memory-mapped scratch files, which are then wrapped, not copied, as the one record batch of each split.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from metadist.core.errors import InputError
from metadist.core.task import SPLITS, Split
from metadist.data.duplicates import note_equal_rows
from metadist.data.mapped import BlockWriter, blocks, give_back, mapped_array
from metadist.data.notes import Notes, Progress, shown
from metadist.data.table import FORMAT_VERSION, KEY, NEEDS, SHARED, Field, digest_of

VOCABULARY = "vocabulary.json"
ORDER = "order of rows"  # the key under which `add` is given it; no field is called like that
KEPT_BYTES = 1 << 26  # written and not yet given back
ADDED_BYTES = 1 << 20  # of single rows, written at once
_OURS = {*(f"{split}.arrow" for split in SPLITS), SHARED, VOCABULARY}
_RESERVED = ("group", "parent", "index")


@dataclass(frozen=True)
class Group:
    """The rows that belong together: a class, a user, a function."""

    name: str
    split: Split
    rows: int
    parent: str | None = None


@dataclass(frozen=True)
class About:
    """What a dataset says of itself. `kind` is "classes", "labelled" or "values"; `options` is how it was imported,
    `extra` what it takes to read its fields, `notes` what the import left out, merged, filled in, cut or scaled."""

    kind: str
    source: str
    licence: str
    options: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)
    notes: Notes = field(default_factory=Notes)


def options_of(importer: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """How a dataset was imported: the arguments of an importer but where from, where to, and what it shows."""
    others = ("source", "out", "overwrite", "progress")
    return {"importer": importer} | {name: value for name, value in arguments.items() if name not in others}


@contextmanager
def staging(out: str | Path, overwrite: bool) -> Iterator[Path]:
    """A scratch directory beside `out` that becomes `out` when the block ends, and vanishes if it raises.

    Raises InputError when `out` is not empty, unless `overwrite` is set and it holds a dataset and nothing else.
    """
    out = Path(os.path.abspath(out))
    _check_free(out, overwrite)
    created = [folder for folder in out.parents if not folder.exists()]
    scratch = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    try:
        try:
            scratch.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{out} cannot be written ({error.strerror}); choose another folder") from error
        yield scratch
        if out.exists() and any(out.iterdir()):
            old = scratch.with_suffix(".old")
            os.rename(out, old)
            try:
                os.rename(scratch, out)
            except BaseException:
                os.rename(old, out)
                raise
            shutil.rmtree(old)
        else:
            os.rename(scratch, out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        for folder in created:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file; choose a folder for the dataset")
    names = {entry.name for entry in out.iterdir()}
    if names and not overwrite:
        raise InputError(f"{out} exists and is not empty; choose another folder, or replace it with --overwrite")
    if names - _OURS:
        raise InputError(f"{out} holds {min(names - _OURS)!r}, which is no part of a dataset; choose another folder")


class DatasetWriter:
    """Fills a directory (see `staging`) with the tables of the given groups.

    Construct it with what the first pass found, add every row once in any order, then `finish`.

    Args:
        directory: where the Arrow files and, until `finish`, scratch files of the same size are written.
        fields: of each row; shared ones have one value per distinct item, which rows point to.
        groups: with their split and number of rows; numbered in this order.
        about: what the dataset says of itself.
        shared_rows: number of distinct items, where there are shared fields.
        ordered: type of the numbers that `add` is given under the key ORDER, by which the rows of each group are
            sorted; equal ones stay as they come.
        progress: called now and then with the rows written so far and in all.
        name_row: what to call row r of group g in a note.

    Raises:
        InputError: groups or fields no dataset can have, too little disk; rows that do not match the first pass.

    Example:
        >>> with staging("data/mine", overwrite=False) as directory:
        ...     groups = [Group("cat", "train", 2), Group("dog", "test", 1)]
        ...     fields = [Field("x", "input", "float32", (3,))]
        ...     writer = DatasetWriter(directory, fields, groups, About("classes", "made up", "none", {}))
        ...     writer.add(np.array([0, 1, 0]), {"x": np.zeros((3, 3))})
        ...     writer.finish()
    """

    def __init__(
        self,
        directory: Path,
        fields: Sequence[Field],
        groups: Sequence[Group],
        about: About,
        *,
        shared_rows: int = 0,
        ordered: np.dtype | None = None,
        progress: Progress | None = None,
        name_row: Callable[[int, int], str] | None = None,
    ) -> None:
        self.directory, self.about, self.progress = directory, about, progress
        self._name_row = name_row or (lambda group, row: f"row {row + 1} of {shown(groups[group].name)!r}")
        self.fields, self.groups = tuple(fields), groups
        self.numbers = {group.name: number for number, group in enumerate(groups)}
        self._check(shared_rows)
        self._order = sorted(range(len(groups)), key=lambda g: (SPLITS.index(groups[g].split), groups[g].name))
        self._counts = [groups[g].rows for g in self._order]
        self.num_rows = sum(self._counts)
        self._ends = np.empty(len(groups), dtype=np.int64)
        self._ends[self._order] = np.cumsum(self._counts)
        self._cursor = self._ends - [group.rows for group in groups]  # next free row of each group, over all splits
        shapes = {f.name: (np.dtype(f.dtype), (shared_rows if f.shared else self.num_rows, *f.shape)) for f in fields}
        if shared_rows:
            shapes["index"] = (np.dtype(np.int64), (self.num_rows,))
        if ordered is not None:
            shapes[ORDER] = (ordered, (self.num_rows,))
        need = 2 * sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in shapes.values())
        if need > (free := shutil.disk_usage(directory).free):
            raise InputError(
                f"{directory.parent} has {free / 1e9:.1f} GB free and this needs {need / 1e9:.1f} GB there"
            )
        self._raw = {name: self._scratch(*shape) for name, shape in shapes.items()}
        self._seen = np.zeros(shared_rows, dtype=bool)
        self._block: list[tuple[int, Mapping[str, np.ndarray]]] = []
        self._done = 0
        self._written = 0  # bytes, since the last that were given back

    def add(self, groups: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Write rows: `groups` int [n] numbers their groups as given; `values` has [n, *shape] per field not shared,
        and `index` int64 [n] where there are shared rows."""
        order = np.argsort(groups, kind="stable")
        numbers, first, counts = np.unique(groups[order], return_index=True, return_counts=True)
        positions = np.empty(len(groups), dtype=np.int64)
        rank = np.arange(len(groups)) - np.repeat(first, counts)
        positions[order] = np.repeat(self._cursor[numbers], counts) + rank
        self._cursor[numbers] += counts
        if np.any(self._cursor[numbers] > self._ends[numbers]):
            raise InputError(f"{self.about.source} changed while it was being read; import it again")
        for name, data in values.items():
            self._raw[name][positions] = data
        self._done += len(groups)
        self._written += sum(data.nbytes for data in values.values())
        if self._written > KEPT_BYTES:
            self._give_back()
        if self.progress is not None:
            self.progress(self._done, self.num_rows)

    def _give_back(self) -> None:
        self._written = 0
        for data in self._raw.values():
            give_back(data)

    def add_row(self, group: str, values: Mapping[str, np.ndarray]) -> None:
        """Write one row of a group, [*shape] per field; many are written at once."""
        self._block.append((self.numbers[group], values))
        if len(self._block) * sum(value.nbytes for value in values.values()) >= ADDED_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._block:
            numbers, rows = zip(*self._block, strict=True)
            self._block = []
            self.add(np.array(numbers), {name: np.stack([row[name] for row in rows]) for name in rows[0]})

    def add_shared(self, items: np.ndarray, values: Mapping[str, np.ndarray]) -> int | None:
        """Write the shared fields of `items` (int64 [n], repeats allowed). Returns the place in `items` of one whose
        values contradict what was written for the same item, or None."""
        known = self._seen[items]
        for name, data in values.items():
            raw = self._raw[name]
            data = data.astype(raw.dtype, copy=False)
            wrong = np.flatnonzero(known)[_differ(raw[items[known]], data[known])]
            raw[items] = data
            wrong = np.concatenate([wrong, np.flatnonzero(_differ(raw[items], data))])
            if len(wrong):
                return int(wrong[0])
        self._seen[items] = True
        return None

    def finish(self) -> None:
        """Write the Arrow files and drop the scratch files. Raises InputError when rows are missing.

        Equal rows of a group and, where groups are classes, of two groups are noted."""
        self._flush()
        if not np.array_equal(self._cursor, self._ends) or not self._seen.all():
            raise InputError(f"{self.about.source} changed while it was being read; import it again")
        if ORDER in self._raw:
            self._sort(self._raw.pop(ORDER))
        self._note_equal_rows()
        shared = tuple(f for f in self.fields if f.shared)
        if shared:
            arrays = {f.name: self._raw[f.name] for f in shared}
            header = {"split": "shared", "counts": {"rows": len(self._seen)}}
            header["digest"] = digest_of(shared, (), arrays.values())
            self._write(SHARED, header, shared, {}, arrays)
        start = 0
        for split in SPLITS:
            groups = [self.groups[g] for g in self._order if self.groups[g].split == split]
            rows = sum(group.rows for group in groups)
            if rows:
                self._write_split(split, groups, slice(start, start + rows))
            start += rows
        self._raw.clear()
        for file in self.directory.glob("*.raw"):
            file.unlink()

    def _sort(self, order: np.ndarray) -> None:
        shared = {f.name for f in self.fields if f.shared}
        columns = [data for name, data in self._raw.items() if name not in shared]
        start = 0
        for count in self._counts:
            rows = slice(start, start + count)
            places = np.argsort(order[rows], kind="stable")
            for data in columns:
                data[rows] = data[rows][places]
                self._written += data[rows].nbytes
            if self._written > KEPT_BYTES:
                self._give_back()
            start += count

    def _note_equal_rows(self) -> None:
        shared = {f.name for f in self.fields if f.shared}
        columns = [data for name, data in self._raw.items() if name not in shared]
        prints, scratch = (self._scratch(np.dtype(np.uint64), (self.num_rows,)) for _ in range(2))
        splits = [self.groups[g].split for g in self._order] if self.about.kind == "classes" else None
        name_row = lambda place, row: self._name_row(self._order[place], row)  # noqa: E731
        note_equal_rows(columns, prints, scratch, self._counts, splits, name_row, self.about.notes)

    def _check(self, shared_rows: int) -> None:
        names = [f.name for f in self.fields]
        source = self.about.source
        for name in names:
            if name in _RESERVED or names.count(name) > 1:
                raise InputError(f"field {name!r} of {source} is reserved or given twice; rename it")
        if not self.groups or any(group.rows < 1 for group in self.groups):
            raise InputError(f"{source} holds no rows, or a group without rows; nothing can be imported")
        if len(self.numbers) < len(self.groups):
            raise InputError(f"{source} has a group in two splits; splits must not share groups")
        if any(f.shared for f in self.fields) != bool(shared_rows):
            raise ValueError("shared fields need shared_rows, and shared_rows a shared field")

    def _scratch(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        number = len(list(self.directory.glob("*.raw")))
        return mapped_array(self.directory / f"{number}.raw", dtype, shape)

    def _write_split(self, split: Split, groups: list[Group], rows: slice) -> None:
        counts = [group.rows for group in groups]
        stored = tuple(f for f in self.fields if not f.shared)
        arrays = {name: self._raw[name][rows] for name in (*(f.name for f in stored), "index") if name in self._raw}
        names = [group.name for group in groups]
        codes = {"group": self._codes(names, range(len(names)), counts)}
        parents = [group.parent for group in groups if group.parent is not None] or None
        if parents is not None:
            if len(parents) < len(groups):
                raise InputError(f"{self.about.source} names a parent for some groups only; name each one or none")
            known = {parent: number for number, parent in enumerate(sorted(set(parents)))}
            codes["parent"] = self._codes(list(known), [known[parent] for parent in parents], counts)
        digest = digest_of(self.fields, (self.about.kind, names, counts, parents), arrays.values())
        header = {"split": split, "counts": {"rows": sum(counts), "groups": len(groups)}, "digest": digest}
        self._write(f"{split}.arrow", header, stored, codes, arrays)

    def _codes(self, names: Sequence[str], numbers: Sequence[int], counts: Sequence[int]) -> pa.DictionaryArray:
        codes = self._scratch(np.dtype(np.int32), (sum(counts),))
        start = 0
        for number, count in zip(numbers, counts, strict=True):
            codes[start : start + count] = number
            start += count
        return pa.DictionaryArray.from_arrays(_arrow(pa.int32(), codes), pa.array(names, pa.string()))

    def _write(
        self,
        name: str,
        header: dict[str, Any],
        fields: Sequence[Field],
        codes: Mapping[str, pa.DictionaryArray],
        arrays: Mapping[str, np.ndarray],
    ) -> None:
        types = {**{f.name: f.arrow_type for f in fields}, "index": pa.int64()}
        columns = {**codes, **{column: _arrow(types[column], data) for column, data in arrays.items()}}
        header = {
            "version": FORMAT_VERSION,
            "needs": NEEDS,
            **header,
            **vars(self.about),
            "notes": self.about.notes.as_list(),
            "fields": [asdict(f) for f in (fields if name == SHARED else self.fields)],
            "ranges": {f.name: _range(arrays[f.name]) for f in fields},
        }
        schema = pa.schema(
            [pa.field(column, data.type, nullable=False) for column, data in columns.items()],
            metadata={KEY: json.dumps(header).encode()},
        )
        sink = pa.PythonFile(BlockWriter(self.directory / name, [*arrays.values()]), "w")
        with sink, pa.ipc.new_file(sink, schema) as file:
            file.write_batch(pa.record_batch(list(columns.values()), schema=schema))


def _arrow(kind: pa.DataType, data: np.ndarray) -> pa.Array:
    return pa.Array.from_buffers(kind, len(data), [None, pa.py_buffer(data)])


def _differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which rows differ, bool [n]."""
    return (a != b).any(axis=tuple(range(1, a.ndim)))


def _range(data: np.ndarray) -> list[float]:
    """Smallest and largest stored value, found block by block."""
    lows, highs = zip(*((data[rows].min(), data[rows].max()) for rows in blocks(data)), strict=True)
    return [min(lows).item(), max(highs).item()]
