"""The first pass over a table: its groups, and what its fields turn out to be."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from metadist.data.importers.columns import Rows, is_list, is_text, numbers, strings
from metadist.errors import InputError

Kind = Literal["classes", "labelled", "values"]


@dataclass(frozen=True)
class Spec:
    """What the caller asked for as one field: a column as it is, or columns stacked to a `vector` of floats."""

    name: str
    columns: tuple[str, ...]
    role: Literal["input", "target"]
    vector: bool = False

    @classmethod
    def parse(cls, text: str, role: Literal["input", "target"]) -> "Spec":
        """ "age" is a column, "x=age,income" a vector of two; "y=age" renames a target, and makes an input a vector."""
        name, equals, columns = text.partition("=")
        if not equals:
            return cls(text, (text,), role)
        parts = tuple(column.strip() for column in columns.split(","))
        return cls(name.strip(), parts, role, vector=role == "input" or len(parts) > 1)


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

    def __init__(self, rows: Rows, specs: list[Spec], labels: Labels, kind: Kind | None) -> None:
        self.rows, self.specs, self.labels = rows, specs, labels
        self.source: Path = rows.source
        self.group_rows: Counter[str] = Counter()
        self.parents: dict[str, str] = {}
        self.splits: dict[str, str] = {}
        self.items: dict[str, int] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.incomplete: set[str] = set()
        self.texts = {spec.name for spec in specs if spec.role == "target" and self._is_text(spec)}
        self.names: dict[str, dict[str, int]] = {name: {} for name in self.texts}  # numbers of a text target's values
        self._faults: Counter[tuple[str, str]] = Counter()  # rows by (column or field, what is wrong)
        self._known: set[str] = set()  # fields with a value in some row
        for batch in rows.batches():
            self._look(batch)
        for (column, fault), count in self._faults.items():
            if count:
                raise InputError(f"column {column!r} of {self.source} has {fault} in {count} rows; mend or remove them")
        if not self.group_rows:
            raise InputError(f"{self.source} holds no rows; give a table with at least one")
        self.names = {name: {text: n for n, text in enumerate(sorted(known))} for name, known in self.names.items()}
        self.kind: Kind = self._settle(kind)

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

    def _look(self, batch: pa.RecordBatch) -> None:
        names, codes, nameless = strings(batch, self.labels.group, self.source)
        self._faults[self.labels.group, "no value"] += nameless
        self.group_rows.update(dict(zip(names, np.bincount(codes).tolist(), strict=True)))
        for column, known in ((self.labels.parent, self.parents), (self.labels.split, self.splits)):
            if column is not None:
                self._relate(batch, names, codes, column, known)
        if self.labels.share is not None:
            items, _, nameless = strings(batch, self.labels.share, self.source)
            self._faults[self.labels.share, "no value"] += nameless
            for item in items:
                self.items.setdefault(item, len(self.items))
        for spec in self.specs:
            self._look_at(spec, batch)

    def _look_at(self, spec: Spec, batch: pa.RecordBatch) -> None:
        if spec.name in self.texts:
            texts, _, nameless = strings(batch, spec.columns[0], self.source)
            self.names[spec.name].update(dict.fromkeys(texts, 0))
            self.dtypes[spec.name], self.shapes[spec.name] = np.dtype(np.int64), ()
            self._faults[spec.name, "no value"] += nameless
            self._known.add(spec.name)
            return
        data, known = self._stack(spec, batch)
        shape = data.shape[1:]
        within = tuple(range(1, data.ndim))
        if known.any():
            self._known.add(spec.name)
            self.dtypes[spec.name] = data.dtype
            if self.shapes.setdefault(spec.name, shape) != shape:
                raise InputError(f"field {spec.name!r} of {self.source} has lists of several lengths; even them out")
        if data.dtype.kind == "f":
            self._faults[spec.name, "an infinite value"] += int(np.isinf(data).any(axis=within).sum())
        absent = int((~known).any(axis=within).sum()) if shape != (0,) else len(data)
        if spec.role == "target":
            self._faults[spec.name, "no value (null or NaN)"] += absent
        elif absent:
            self.incomplete.add(spec.name)

    def _stack(self, spec: Spec, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
        parts = [numbers(batch, column, self.source) for column in spec.columns]
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
        values, value_codes, nameless = strings(batch, column, self.source)
        self._faults[column, "no value"] += nameless
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
        if settled == "labelled" and floats:
            raise InputError(f"target {floats[0]!r} of {self.source} is a float and no label; use kind values")
        if settled == "values" and self.texts:
            raise InputError(f"target {min(self.texts)!r} of {self.source} is text and no number; use kind labelled")
        for name in targets:
            if name not in floats:
                self.dtypes[name] = np.dtype(np.float32 if settled == "values" else np.int64)
        return settled

    def _is_text(self, spec: Spec) -> bool:
        kind = self.rows.schema.field(spec.columns[0]).type
        return len(spec.columns) == 1 and not is_list(kind) and is_text(kind)
