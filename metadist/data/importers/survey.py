"""The first pass over a table: its groups, and what its fields turn out to be."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from metadist.core.errors import InputError
from metadist.data.importers.arrays import numbers, strings
from metadist.data.importers.columns import Rows
from metadist.data.importers.names import note_lookalikes
from metadist.data.notes import Notes, shown

Kind = Literal["classes", "labelled", "values"]
EXACT = 2**24  # the last whole number up to which float32 has all
SKIP = "mend or remove them, or leave them out with --skip-bad"


@dataclass(frozen=True)
class Spec:
    """What the caller asked for as one field: a column as it is, or columns stacked to a `vector` of floats."""

    name: str
    columns: tuple[str, ...]
    role: Literal["input", "target"]
    vector: bool = False

    @classmethod
    def parse(cls, text: str, role: Literal["input", "target"], rows: Rows) -> "Spec":
        """ "age" is a column, "x=age,income" a vector of two; "y=age" renames a target, and makes an input a vector.
        Columns may have commas and equals signs in their names."""
        name, equals, columns = text.partition("=")
        if not equals or text in rows.names:
            return cls(rows.column(text), (rows.column(text),), role)
        parts = _columns(columns.split(","), rows)
        return cls(name.strip(), parts, role, vector=role == "input" or len(parts) > 1)


def _columns(pieces: list[str], rows: Rows) -> tuple[str, ...]:
    """The columns that pieces between commas name; the longest that there is counts."""
    found: list[str] = []
    while pieces:
        stripped = {name.strip(): name for name in rows.names}
        for end in range(len(pieces), 0, -1):
            name = ",".join(pieces[:end])
            if name in rows.names or name.strip() in stripped or end == 1:
                found.append(rows.column(name if name in rows.names else name.strip()))
                pieces = pieces[end:]
                break
    return tuple(found)


@dataclass(frozen=True)
class Labels:
    """The columns that say where a row belongs."""

    group: str
    parent: str | None
    split: str | None
    share: str | None

    @property
    def columns(self) -> list[str]:
        return [column for column in (self.group, self.parent, self.split, self.share) if column is not None]


class Survey:
    """Counts groups (`group_rows`, `parents`, `splits`), numbers the shared items (`items`), settles the `kind`, and
    each field's `dtypes`, `shapes` and whether values are missing (`incomplete`)."""

    def __init__(
        self, rows: Rows, specs: list[Spec], labels: Labels, kind: Kind | None, notes: Notes, skip_bad: bool
    ) -> None:
        self.rows, self.specs, self.labels, self.notes = rows, specs, labels, notes
        self.source: Path = rows.source
        self.group_rows: Counter[str] = Counter()
        self.parents: dict[str, str] = {}
        self.splits: dict[str, str] = {}
        self.items: dict[str, int] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.incomplete: set[str] = set()
        self.texts = {spec.name for spec in specs if spec.role == "target" and self._is_text(spec, kind)}
        self.names: dict[str, dict[str, int]] = {name: {} for name in self.texts}  # numbers of a text target's values
        self._whole = {spec.name for spec in specs if spec.role == "target"}  # targets of which no value has a fraction
        self.largest: dict[str, float] = {}  # absolute value of each field's numbers
        self._negative: Counter[str] = Counter()  # values of targets below 0
        self._lowest: dict[str, float] = {}
        self._skip_bad = skip_bad
        self._faults: Counter[tuple[str, str]] = Counter()  # rows by (column or field, what is wrong)
        self._known: set[str] = set()  # fields with a value in some row
        self._look_at_all()
        if not self.group_rows:
            raise InputError(f"{self.source} holds no rows; give a table with at least one")
        self.names = {name: {text: n for n, text in enumerate(sorted(known))} for name, known in self.names.items()}
        self.kind: Kind = self._settle(kind)
        note_lookalikes(f"values of column {shown(labels.group)!r}", self.group_rows, notes)
        for name, known in self.names.items():
            note_lookalikes(f"values of target {shown(name)!r}", known, notes)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows that are imported, in order."""
        for batch in self.rows.batches():
            if self._skip_bad:
                bad = np.logical_or.reduce(list(self._bad_rows(batch, None).values()))
                batch = batch.filter(pa.array(~bad))
            if batch.num_rows:
                yield batch

    def read(self, spec: Spec, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
        """A field's values and which of them are there, [n, *shape] each; texts as their numbers."""
        if spec.name in self.texts:
            texts, codes, _ = strings(batch, spec.columns[0], self.source)
            order = self.names[spec.name]
            return np.array([order[text] for text in texts], dtype=np.int64)[codes], np.ones(len(codes), bool)
        data, known = self._stack(spec, batch)
        if data.shape[1:] == (0,):  # lists of which none is there have no width of their own
            shape = (len(data), *self.shapes[spec.name])
            return np.zeros(shape, data.dtype), np.zeros(shape, bool)
        return data, known

    def _look_at_all(self) -> None:
        row, examples = 0, {}
        for batch in self.rows.batches():
            faults = self._bad_rows(batch, self.notes)
            for fault, wrong in faults.items():
                self._faults[fault] += int(wrong.sum())
                if wrong.any():
                    examples.setdefault(fault, f"row {row + int(np.argmax(wrong)) + 1}")
            places = np.arange(row + 1, row + 1 + batch.num_rows)
            row += batch.num_rows
            if self._skip_bad:
                good = ~np.logical_or.reduce(list(faults.values()))
                batch, places = batch.filter(pa.array(good)), places[good]
            if batch.num_rows:
                self._look(batch, places)
        for (column, fault), count in self._faults.items():
            if count and not self._skip_bad:
                first = examples[column, fault]
                raise InputError(
                    f"column {column!r} of {self.source} has {fault} in {count} rows ({first} first); {SKIP}"
                )
            why = f"column {shown(column)!r} has {fault}"
            self.notes.add("rows left out", why, examples.get((column, fault), ""), "mend them", count)

    def _bad_rows(self, batch: pa.RecordBatch, notes: Notes | None) -> dict[tuple[str, str], np.ndarray]:
        """Which rows cannot be used (bool [n]), by column or field and fault."""
        bad: dict[tuple[str, str], np.ndarray] = {}
        texts = [spec.columns[0] for spec in self.specs if spec.name in self.texts]
        for column in dict.fromkeys([*self.labels.columns, *texts]):
            names, codes, _ = strings(batch, column, self.source, notes)
            bad[column, "no value"] = codes == names.index("") if "" in names else np.zeros(len(codes), bool)
        for spec in self.specs:
            if spec.name in self.texts:
                continue
            data, known = self._stack(spec, batch)
            within = tuple(range(1, data.ndim))
            if data.dtype.kind == "f":
                bad[spec.name, "an infinite value"] = np.asarray(np.isinf(data).any(axis=within))
            if spec.role == "target":
                empty = data.shape[1:] == (0,)
                absent = np.ones(len(data), bool) if empty else (~known).any(axis=within)
                bad[spec.name, "no value (null or NaN)"] = np.asarray(absent)
        return bad

    def _look(self, batch: pa.RecordBatch, places: np.ndarray) -> None:
        names, codes, _ = strings(batch, self.labels.group, self.source)
        for name, count in zip(names, np.bincount(codes, minlength=len(names)).tolist(), strict=True):
            if count:
                self.group_rows[name] += count
        for column, known in ((self.labels.parent, self.parents), (self.labels.split, self.splits)):
            if column is not None:
                self._relate(batch, names, codes, column, known)
        if self.labels.share is not None:
            for item in strings(batch, self.labels.share, self.source)[0]:
                self.items.setdefault(item, len(self.items))
        for spec in self.specs:
            self._look_at(spec, batch, places)

    def _look_at(self, spec: Spec, batch: pa.RecordBatch, places: np.ndarray) -> None:
        if spec.name in self.texts:
            self.names[spec.name].update(dict.fromkeys(strings(batch, spec.columns[0], self.source)[0], 0))
            self.dtypes[spec.name], self.shapes[spec.name] = np.dtype(np.int64), ()
            self._known.add(spec.name)
            return
        data, known = self._stack(spec, batch)
        shape = data.shape[1:]
        if known.any():
            self._known.add(spec.name)
            self.dtypes[spec.name] = data.dtype
            if self.shapes.setdefault(spec.name, shape) != shape:
                raise InputError(f"field {spec.name!r} of {self.source} has lists of several lengths; even them out")
        if data.size and data.dtype.kind != "b":
            self.largest[spec.name] = max(self.largest.get(spec.name, 0.0), float(np.abs(data.astype(float)).max()))
        if spec.role == "target":
            if data.dtype.kind == "f" and not np.all(data == np.floor(data)):
                self._whole.discard(spec.name)
            below = data < 0
            self._negative[spec.name] += int(below.sum())
            if below.any():
                self._lowest[spec.name] = min(self._lowest.get(spec.name, 0), data.min().item())
            return
        lacking = (~known).any(axis=tuple(range(1, data.ndim))) if shape != (0,) else np.ones(len(data), bool)
        if lacking.any():
            self.incomplete.add(spec.name)
            count = int((~known).sum()) if shape != (0,) else len(data)
            why, example = f"of input {shown(spec.name)!r} by 0", f"row {places[np.argmax(lacking)]}"
            remedy = f"{spec.name}_mask is False where they are; fill them before for other values"
            self.notes.add("missing values filled", why, example, remedy, count)

    def _stack(self, spec: Spec, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
        parts = [numbers(batch, column, self.source, self.rows.example(column)) for column in spec.columns]
        values, known = parts[0]
        if not spec.vector:
            return values, known
        floats = np.result_type(np.float32, *(values for values, _ in parts))
        if len(parts) == 1 and values.ndim > 1:
            return values.astype(floats, copy=False), known
        if any(values.ndim > 1 for values, _ in parts):
            raise InputError(f"field {spec.name!r} of {self.source} stacks lists; make each list column its own field")
        return np.stack([values for values, _ in parts], axis=1, dtype=floats), np.stack([k for _, k in parts], axis=1)

    def _relate(
        self, batch: pa.RecordBatch, names: list[str], codes: np.ndarray, column: str, known: dict[str, str]
    ) -> None:
        """Note the one value that `column` has for each group."""
        values, value_codes, _ = strings(batch, column, self.source)
        for pair in np.unique(codes * len(values) + value_codes).tolist():
            name, value = names[pair // len(values)], values[pair % len(values)]
            if known.setdefault(name, value) != value:
                raise InputError(
                    f"group {name!r} of {self.source} has {column} {known[name]!r} and {value!r}; give each group one"
                )

    def _settle(self, kind: Kind | None) -> Kind:
        """The kind of the dataset, and with it the type of the targets."""
        targets = [spec.name for spec in self.specs if spec.role == "target"]
        for spec in self.specs:
            if spec.name not in self._known:
                raise InputError(f"field {spec.name!r} of {self.source} has no value in any row; leave it out")
        floats = [name for name in targets if self.dtypes[name].kind == "f"]
        settled: Kind = kind or ("classes" if not targets else "values" if floats else "labelled")
        if (settled == "classes") == bool(targets):
            wish = "no targets" if settled == "classes" else "at least one target"
            raise InputError(f"kind {settled!r} takes {wish} and {self.source} was given {len(targets)}; change either")
        fractions = [name for name in floats if name not in self._whole]
        if settled == "labelled" and fractions:
            raise InputError(f"target {fractions[0]!r} of {self.source} is a float and no label; use kind values")
        if settled == "values" and self.texts:
            raise InputError(f"target {min(self.texts)!r} of {self.source} is text and no number; use kind labelled")
        if settled == "values" and kind is None and not fractions:
            why, remedy = "they are floats, though all whole numbers", "import with --kind labelled if they are labels"
            self.notes.add("targets taken as values, not labels", why, floats[0], remedy, len(floats))
        for name in targets if settled == "labelled" else ():
            if self._negative[name]:
                why, remedy = "they are taken as classes like the others", "remove their rows if they mean no label"
                self.notes.add("labels below 0", why, f"{self._lowest[name]:g}", remedy, self._negative[name])
        for name in targets:
            if settled == "labelled" or name not in floats:
                wide = self.largest.get(name, 0.0) > EXACT
                self.dtypes[name] = np.dtype(np.int64 if settled == "labelled" else np.float64 if wide else np.float32)
        return settled

    def _is_text(self, spec: Spec, kind: Kind | None) -> bool:
        """Whether a target's values are names; numbers that int64 cannot hold are."""
        found = self.rows.type(spec.columns[0])
        return len(spec.columns) == 1 and (
            pa.types.is_string(found) or (pa.types.is_uint64(found) and kind != "values")
        )
