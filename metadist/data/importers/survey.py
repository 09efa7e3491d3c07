"""The first pass over a table: its groups, and what its fields turn out to be."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from metadist.core.errors import InputError
from metadist.data.importers.arrays import instants, is_number, numbers, strings, types
from metadist.data.importers.categories import Categories
from metadist.data.importers.columns import chosen, is_pattern
from metadist.data.importers.names import note_lookalikes
from metadist.data.importers.table_files import Rows
from metadist.data.notes import Notes, shown

Kind = Literal["classes", "labelled", "values"]
Role = Literal["input", "target"]
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
EXACT = 2**24  # the last whole number up to which float32 has all
SKIP = "mend or remove them, or leave them out with --skip-bad"


@dataclass(eq=False)
class Asked:
    """A field that was asked for, a column as it is or columns stacked to a `vector` of floats, and what its values
    turn out to be."""

    rows: Rows
    name: str
    columns: tuple[str, ...]
    role: Role
    vector: bool = False
    loose: Collection[str] = ()  # columns that a pattern brought in
    named: tuple[str, ...] = ()  # columns whose values are names
    categories: dict[str, Categories] = field(default_factory=dict)  # of these, once the training rows are known
    identifier: bool = False  # an input of one such column, whose names are numbered
    whole_numbers: bool = False  # a target that stays whole numbers beside others that are values
    numbered: dict[str, int] | None = None  # the values of a target of texts, later with their place in sorted order
    dtype: Any = None  # None until a value is seen
    shape: tuple[int, ...] = ()
    incomplete: bool = False
    whole: bool = True  # a target of which no value has a fraction
    largest: float = 0.0  # absolute value
    negative: int = 0  # values of a target below 0
    lowest: float = 0.0

    @classmethod
    def parse(cls, text: str, role: Role, rows: Rows, taken: Collection[str] = ()) -> "Asked":
        """ "age" is a column, "x=age,income" a vector of two; "y=age" renames a target, and makes an input a vector.
        Columns may have commas and equals signs in their names; `columns.chosen` says which patterns may stand for
        several, of which columns that are `taken` are none. A pattern alone, "x_*", makes the vector "x"."""
        name, equals, columns = text.partition("=")
        if text in rows.names or not (equals or is_pattern(text, rows)):
            return cls(rows, rows.column(text), (rows.column(text),), role)
        name, columns = (name, columns) if equals else ("x" if role == "input" else "y", text)
        parts, loose = chosen(columns, rows, taken)
        return cls(rows, name.strip(), tuple(parts), role, role == "input" or len(parts) > 1, loose=loose)

    def settle_columns(self, categories: Collection[str], identifiers: Collection[str], notes: Notes) -> None:
        """Which columns are names, and of those that a pattern brought in, which are numbers and stay; both noted."""
        if self.role == "target":
            return
        if numbered := [column for column in self.columns if column in identifiers]:
            if len(self.columns) > 1:
                raise InputError(
                    f"input {self.name!r} of {self.rows.source} joins identifier {numbered[0]!r} with other columns; "
                    f"make it an input of its own, --input {numbered[0]}"
                )
            self.named, self.identifier, self.vector = self.columns, True, False
            return
        kinds = {column: self.rows.type(column) for column in self.columns}
        left = [c for c in self.columns if c in self.loose and c not in categories and not is_number(kinds[c])]
        for column in left:
            remedy = "name them too, or --category COLUMN, to have their values as categories"
            why = f"{kinds[column]} and no numbers, and a pattern takes numbers"
            notes.add("columns left out", why, shown(column), remedy)
        self.columns = tuple(column for column in self.columns if column not in left)
        if not self.columns:
            raise InputError(f"input {self.name!r} of {self.rows.source} has no column of numbers; name the columns")
        taken = [column for column in self.columns if column in self.loose]
        example = ", ".join(map(shown, taken[:5])) + (", ..." if len(taken) > 5 else "")
        why, remedy = f"they make up input {shown(self.name)!r}", "leave some out with -COLUMN behind a comma"
        notes.add("columns taken by a pattern", why, example, remedy, len(taken))
        self.named = tuple(c for c in self.columns if c in categories or self._is_text(c, kinds[c], notes))
        self.vector |= bool(self.named)

    def _is_text(self, column: str, kind: pa.DataType, notes: Notes) -> bool:
        """Whether a column is of texts alone, which are categories; refuses numbers with a few texts among them."""
        if not types.is_string(kind):
            return False
        number, example = self.rows.number_example(column), self.rows.example(column)
        if number or _DATE.match(example):
            beside = f" beside {number!r}" if number else ""
            raise InputError(
                f"column {column!r} of {self.rows.source} is {kind}, not numbers ({shown(example)!r} for example"
                f"{beside}); make numbers of it, or take all its values as names with --category {column}"
            )
        why = "each name that train has becomes an element, 0 or 1, and one stands for all others"
        remedy = "write numbers there if they are numbers"
        notes.add("columns of texts taken as categories", why, shown(column), remedy)
        return True

    @property
    def one_hot(self) -> np.ndarray:
        """Which elements stand for a name, bool [width]."""
        widths = [
            (column in self.named, self.categories[column].width if column in self.named else 1)
            for column in self.columns
        ]
        return np.repeat(*map(np.array, zip(*widths, strict=True)))

    def read(self, batch: pa.RecordBatch, notes: Notes | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The values and which of them are there, [n, *shape] each; texts as their numbers. What is unknown among
        categories is noted."""
        if self.numbered is not None:
            texts, codes = strings(batch, self.columns[0], self.rows.source)
            return np.array([self.numbered[text] for text in texts], np.int64)[codes], np.ones(len(codes), bool)
        if self.identifier:
            (column,) = self.columns
            numbers = self.categories[column].numbers(*strings(batch, column, self.rows.source), notes)
            return numbers, np.ones(len(numbers), bool)
        data, known = self._stack(batch, notes)
        if data.shape[1:] == (0,):  # lists of which none is there have no width of their own
            shape = (len(data), *self.shape)
            return np.zeros(shape, data.dtype), np.zeros(shape, bool)
        return data, known

    def faults(self, batch: pa.RecordBatch) -> dict[str, np.ndarray]:
        """Which rows cannot be used (bool [n]), by what is wrong with them."""
        if self.identifier:
            return {}
        data, known = self._stack(batch)
        within, bad = tuple(range(1, data.ndim)), {}
        if data.dtype.kind == "f":
            bad["an infinite value"] = np.asarray(np.isinf(data).any(axis=within))
        if self.role == "target":
            bad["no value (null or NaN)"] = _lacking(known)
        return bad

    def look(self, batch: pa.RecordBatch, places: np.ndarray, notes: Notes) -> None:
        """Take note of the values of some rows, numbered `places` in the source."""
        if self.numbered is not None or self.identifier:
            if self.numbered is not None:
                self.numbered.update(dict.fromkeys(strings(batch, self.columns[0], self.rows.source)[0], 0))
            self.dtype = np.dtype(np.int64)
            return
        data, known = self._stack(batch)
        if self.named and not data.shape[1]:  # the categories are not known yet
            self.dtype = data.dtype
            return
        if known.any():
            if self.dtype is not None and self.shape != data.shape[1:]:
                raise InputError(
                    f"field {self.name!r} of {self.rows.source} has lists of several lengths; even them out"
                )
            self.dtype, self.shape = data.dtype, data.shape[1:]
        if data.size and data.dtype.kind != "b":
            self.largest = max(self.largest, float(np.abs(data.astype(float)).max()))
        if self.role == "target":
            self.whole &= data.dtype.kind != "f" or bool(np.all(data == np.floor(data)))
            self.negative += int((data < 0).sum())
            self.lowest = min(self.lowest, data.min().item() if data.size else 0)
        elif (lacking := _lacking(known)).any():
            self.incomplete = True
            why, example = f"of input {shown(self.name)!r} by 0", f"row {places[np.argmax(lacking)]}"
            remedy = f"{self.name}_mask is False where they are; fill them before for other values"
            count = int((~known).sum()) if known.size else len(known)
            notes.add("missing values filled", why, example, remedy, count)

    def _stack(self, batch: pa.RecordBatch, notes: Notes | None = None) -> tuple[np.ndarray, np.ndarray]:
        named = {column: self.categories.get(column) for column in self.named}
        return stacked(batch, self.name, self.columns, self.vector, named, self.rows.source, self.rows.example, notes)


def stacked(
    batch: pa.RecordBatch, name: str, columns: Sequence[str], vector: bool, named: Mapping[str, Categories | None],
    source: Path | str, example: Callable[[str], str], notes: Notes | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The values of the field `name` and which of them are there, [n, *shape] each: those of its one column, or of its
    columns beside one another in a `vector`, where those `named` have an element for each of their categories (none
    until these are known; what is unknown among them is noted). `example` gives a value of a column that is no number,
    for errors. Raises InputError where a column is no numbers, or lists are stacked."""
    plain = [column for column in columns if column not in named]
    values, known = {}, {}
    for column in plain:
        values[column], known[column] = numbers(batch, column, source, example(column))
    if not vector:
        return values[plain[0]], known[plain[0]]
    floats = np.result_type(np.float32, *values.values())
    if len(columns) == len(plain) == 1 and values[plain[0]].ndim > 1:
        return values[plain[0]].astype(floats, copy=False), known[plain[0]]
    if any(part.ndim > 1 for part in values.values()):
        raise InputError(f"field {name!r} of {source} stacks lists; make each list column its own field")
    if not named:
        return np.stack([*values.values()], axis=1, dtype=floats), np.stack([*known.values()], axis=1)
    for column, categories in named.items():
        if categories is not None:
            values[column] = categories.one_hot(*strings(batch, column, source), notes)
            known[column] = np.ones(values[column].shape, bool)
    return _joined(values, columns, len(batch), floats), _joined(known, columns, len(batch), bool)


def _joined(parts: dict[str, np.ndarray], columns: Sequence[str], rows: int, dtype: Any) -> np.ndarray:
    """Columns [n] and [n, width] beside one another, those that there are."""
    found = [parts[name].reshape(rows, -1) for name in columns if name in parts]
    return np.concatenate([np.zeros((rows, 0), dtype), *found], axis=1, dtype=dtype)


def _lacking(known: np.ndarray) -> np.ndarray:
    """Which rows lack a value or an element of it, bool [n]; lists without a width are all absent."""
    if known.shape[1:] == (0,):
        return np.ones(len(known), bool)
    return np.asarray(~known.all(axis=tuple(range(1, known.ndim))))


@dataclass(frozen=True)
class Labels:
    """The columns that say where a row belongs."""

    group: str
    parent: str | None
    split: str | None
    share: str | None
    disjoint: str | None = None

    @property
    def columns(self) -> list[str]:
        columns = self.group, self.parent, self.split, self.share, self.disjoint
        return [column for column in columns if column is not None]


@dataclass
class Survey:
    """Counts groups (`group_rows`, `parents`, `splits`), numbers the shared items (`items`), settles the `kind`, and
    has each of the `fields` look at its values. `kept` says which rows are imported; by default all."""

    rows: Rows
    fields: list[Asked]
    labels: Labels
    asked_kind: Kind | None
    notes: Notes
    skip_bad: bool
    time: str | None = None
    kept: Callable[[pa.RecordBatch], np.ndarray] | None = None
    group_rows: Counter[str] = field(default_factory=Counter)
    parents: dict[str, str] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.source: Path = self.rows.source
        for asked in self.fields:
            if asked.role == "target" and self._is_text(asked):
                asked.numbered = {}
        self._look_at_all()
        if not self.group_rows:
            raise InputError(f"{self.source} holds no rows; give a table with at least one")
        self.kind: Kind = self._settle()
        note_lookalikes(f"values of column {shown(self.labels.group)!r}", self.group_rows, self.notes)
        for asked in self.fields:
            if asked.numbered is not None:
                asked.numbered = {text: number for number, text in enumerate(sorted(asked.numbered))}
                note_lookalikes(f"values of target {shown(asked.name)!r}", asked.numbered, self.notes)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows that are imported, in order."""
        for batch in self.rows.batches():
            if self.skip_bad:
                batch = batch.filter(pa.array(_good(self._faults(batch, None), batch)))
            if self.kept is not None:
                batch = batch.filter(pa.array(self.kept(batch)))
            if batch.num_rows:
                yield batch

    def groups(self, batch: pa.RecordBatch) -> tuple[list[str], np.ndarray]:
        """The names of the groups of some rows, and int64 [n] into them."""
        return strings(batch, self.labels.group, self.source)

    def _look_at_all(self) -> None:
        row, counts, examples, bereft = 0, Counter(), {}, dict[str, None]()
        for batch in self.rows.batches():
            faults = self._faults(batch, self.notes)
            for fault, wrong in faults.items():
                counts[fault] += int(wrong.sum())
                if wrong.any():
                    examples.setdefault(fault, f"row {row + int(np.argmax(wrong)) + 1}")
            places = np.arange(row + 1, row + 1 + batch.num_rows)
            row += batch.num_rows
            if self.skip_bad:
                good = _good(faults, batch)
                names, codes = self.groups(batch)
                bereft |= dict.fromkeys(names[code] for code in np.unique(codes[~good]) if names[code])
                batch, places = batch.filter(pa.array(good)), places[good]
            if self.kept is not None:
                good = self.kept(batch)
                batch, places = batch.filter(pa.array(good)), places[good]
            if batch.num_rows:
                self._look(batch, places)
        for (column, fault), count in counts.items():
            first = examples.get((column, fault), "")
            if count and not self.skip_bad:
                raise InputError(
                    f"column {column!r} of {self.source} has {fault} in {count} rows ({first} first); {SKIP}"
                )
            self.notes.add("rows left out", f"column {shown(column)!r} has {fault}", first, "mend them", count)
        for name in bereft:
            if name not in self.group_rows:
                self.notes.add("groups left out", "all their rows are left out", shown(name), "mend a row of each")

    def _faults(self, batch: pa.RecordBatch, notes: Notes | None) -> dict[tuple[str, str], np.ndarray]:
        """Which rows cannot be used (bool [n]), by column or field and fault."""
        bad: dict[tuple[str, str], np.ndarray] = {}
        texts = [asked.columns[0] for asked in self.fields if asked.numbered is not None]
        for column in dict.fromkeys([*self.labels.columns, *texts]):
            names, codes = strings(batch, column, self.source, notes)
            bad[column, "no value"] = codes == names.index("") if "" in names else np.zeros(len(codes), bool)
        if self.time is not None:
            bad[self.time, "no time"] = ~instants(batch, self.time, self.source)[1]
        for asked in self.fields:
            if asked.numbered is None:
                bad |= {(asked.name, fault): wrong for fault, wrong in asked.faults(batch).items()}
        return bad

    def _look(self, batch: pa.RecordBatch, places: np.ndarray) -> None:
        names, codes = self.groups(batch)
        self.group_rows.update(dict(zip(names, np.bincount(codes, minlength=len(names)).tolist(), strict=True)))
        for column, known in ((self.labels.parent, self.parents), (self.labels.split, self.splits)):
            if column is not None:
                self._relate(batch, names, codes, column, known)
        if self.labels.share is not None:
            for item in strings(batch, self.labels.share, self.source)[0]:
                self.items.setdefault(item, len(self.items))
        for asked in self.fields:
            asked.look(batch, places, self.notes)

    def _relate(
        self, batch: pa.RecordBatch, names: list[str], codes: np.ndarray, column: str, known: dict[str, str]
    ) -> None:
        """Note the one value that `column` has for each group."""
        values, value_codes = strings(batch, column, self.source)
        for pair in np.unique(codes * len(values) + value_codes).tolist():
            name, value = names[pair // len(values)], values[pair % len(values)]
            if known.setdefault(name, value) != value:
                raise InputError(
                    f"group {name!r} of {self.source} has {column} {known[name]!r} and {value!r}; give each group one"
                )

    def _settle(self) -> Kind:
        """The kind of the dataset, and with it the type of the targets."""
        for asked in self.fields:
            if asked.dtype is None:
                raise InputError(f"field {asked.name!r} of {self.source} has no value in any row; leave it out")
        targets = [asked for asked in self.fields if asked.role == "target"]
        floats = [target for target in targets if target.dtype.kind == "f" and not target.whole_numbers]
        mixed = len({target.whole_numbers for target in targets}) > 1
        kind: Kind = self.asked_kind or ("classes" if not targets else "values" if floats or mixed else "labelled")
        if (kind == "classes") == bool(targets):
            wish = "no targets" if kind == "classes" else "at least one target"
            raise InputError(f"kind {kind!r} takes {wish} and {self.source} was given {len(targets)}; change either")
        fractions = [target.name for target in floats if not target.whole]
        texts = [target.name for target in targets if target.numbered is not None]
        if kind == "labelled" and fractions:
            raise InputError(f"target {fractions[0]!r} of {self.source} is a float and no label; use kind values")
        if kind == "values" and texts:
            raise InputError(f"target {min(texts)!r} of {self.source} is text and no number; use kind labelled")
        self._check_whole_numbers(kind, targets)
        if kind == "values" and self.asked_kind is None and floats and not fractions:
            why, remedy = "they are floats, though all whole numbers", "import with --kind labelled if they are labels"
            self.notes.add("targets taken as values, not labels", why, floats[0].name, remedy, len(floats))
        for target in targets:
            if kind == "labelled":
                why, remedy = "they are taken as classes like the others", "remove their rows if they mean no label"
                self.notes.add("labels below 0", why, f"{target.lowest:g}", remedy, target.negative)
                target.dtype = np.dtype(np.int64)
            elif target.whole_numbers:
                target.dtype = np.dtype(np.int64)
            elif target not in floats:
                why, remedy = "they are beside values", "--integer COLUMN keeps whole numbers, as of an action taken"
                self.notes.add("integer targets made floats", why, shown(target.name), remedy, int(bool(floats)))
                target.dtype = np.dtype(np.float64 if target.largest > EXACT else np.float32)
        return kind

    def _check_whole_numbers(self, kind: Kind, targets: Sequence[Asked]) -> None:
        """Raise InputError where a target cannot stay whole numbers."""
        for target in targets:
            if target.whole_numbers and not target.whole:
                raise InputError(
                    f"target {target.name!r} of {self.source} has fractions, which --integer would cut off"
                )
            if target.whole_numbers and kind == "values" and len(targets) == 1:
                raise InputError(
                    f"target {target.name!r} of {self.source} is alone and in whole numbers, which are labels; leave "
                    "out --kind values, or --integer to have floats"
                )

    def _is_text(self, target: Asked) -> bool:
        """Whether a target's values are names; numbers that int64 cannot hold are."""
        found = self.rows.type(target.columns[0])
        return len(target.columns) == 1 and (
            types.is_string(found) or (types.is_uint64(found) and self.asked_kind != "values")
        )


def _good(faults: dict[tuple[str, str], np.ndarray], batch: pa.RecordBatch) -> np.ndarray:
    return ~np.logical_or.reduce([np.zeros(batch.num_rows, bool), *faults.values()])
