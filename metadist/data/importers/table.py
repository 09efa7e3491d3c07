"""Tables (Parquet, CSV, TSV, Arrow): one column names the group, others are inputs and targets.

Memory is bounded by a few of the source's own blocks (Parquet row groups, say). Columns are numbers, or equally long
lists of numbers, taken as they are: integers stay integers. "NAME=COL,COL" stacks columns to a vector
of floats, and an input "NAME=COL" is such a vector too; a target "NAME=COL" only gets a new name. Without targets the
groups are the classes (kind "classes"); integer, bool and text targets make kind "labelled" (int64; texts numbered in
sorted order, which `extra["names"]` keeps), float targets "values", beside which integer ones become floats, but for
those of --integer. Missing inputs (null, NaN) become 0
beside an input `NAME_mask`, True where present. Rows without a group or target, or with an infinite value, are refused.

Columns of names in an input (texts, or what --category names) become an element for each name that train has and one
for all others, 0 or 1. An --identifier, an input of its own, becomes numbers for an embedding (int64): 1, 2, ... for
the names that train has, sorted, and 0 for all others. `extra["columns"]` keeps of which columns each field is made,
in their order, `extra["categories"]` the names, by field and column, and `extra["vocabularies"]`, by field, how many
numbers an identifier can be. `extra["time"]` is the column by which the rows of a group are ordered, where one was
asked for.

Standardized, `gather` yields (value - mean) / deviation over the train rows, and integers become floats; labels and
booleans stay as they are. A single column keeps its values and gets its field's `offset` and `scale`, whose inverse is
`value / field.scale + field.offset`. The elements of lists and of stacked columns are standardized one by one as they
are stored; `extra["standardized"][field]` has their "offset" and "scale" for the same inverse.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from metadist.core.errors import InputError
from metadist.core.task import Split
from metadist.data.importers.arrays import instants, strings
from metadist.data.importers.categories import Categories
from metadist.data.importers.names import note_lookalikes
from metadist.data.importers.survey import EXACT, Asked, Kind, Labels, Survey
from metadist.data.importers.table_files import Rows
from metadist.data.importers.table_splits import surveyed
from metadist.data.notes import Notes, Progress, shown
from metadist.data.splits import FRACTIONS
from metadist.data.table import Field
from metadist.data.writer import ORDER, About, DatasetWriter, Group, options_of, staging

MASK = "_mask"
MOST_IDENTIFIERS = 1_000_000  # they are in the head of each file and in the checkpoints of a run
MANY_CATEGORIES = (
    ", each an element of the input; leave it out, write rare names as one, take it as --identifier for a model with "
    "an embedding, or raise --most-categories"
)
ROUNDING = 1e-13  # deviations below this part of the mean are what rounding leaves of a constant


@dataclass(frozen=True)
class TableField:
    """The columns that a field is made of, in rows that a run is asked about: one, or several stacked to a `vector`.
    `dtype` and `shape` are the field's; `incomplete`: beside it is a field NAME_mask, True where there is a value;
    `categories` are the names that are told apart in columns of names, `identifiers` those of an identifier, in the
    order of their numbers."""

    name: str
    role: Literal["input", "target"]
    columns: list[str]
    vector: bool
    dtype: str
    shape: list[int]
    incomplete: bool
    categories: dict[str, list[str]] = field(default_factory=dict)
    identifiers: list[str] | None = None


Scaling = dict[str, tuple[np.ndarray, np.ndarray]]
"""The offset and scale of each standardized field: numbers, or one per element of a vector."""


def table(
    source: str | Path,
    out: str | Path,
    *,
    group: str,
    inputs: Sequence[str],
    targets: Sequence[str] = (),
    parent: str | None = None,
    split_column: str | None = None,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    kind: Kind | None = None,
    share: str | None = None,
    disjoint: str | None = None,
    time: str | None = None,
    categories: Sequence[str] = (),
    most_categories: int = 64,
    identifiers: Sequence[str] = (),
    integers: Sequence[str] = (),
    standardize: bool = False,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Import your own table (Parquet, CSV, TSV or Arrow).

    Args:
        source: Parquet, CSV, TSV or Arrow file, or a folder of them.
        out: directory to write.
        group: column that says which rows belong together (class, user, target).
        inputs: feature column, or NAME=COL,COL,... for a vector; repeat it for several inputs. "x=*" takes all columns
            of numbers that nothing else uses, "x=*,-age,-zip" all but these, "x=px_*" those of such a name, "x=x1..x20"
            a range.
        targets: target column(s); without one the group is the class.
        parent: column with the group's superclass.
        split_column: column that says train, validation or test.
        fractions: of the groups, for train, validation and test, where no column says it.
        seed: of the random split.
        kind: of the dataset; by default by the target's type.
        share: column whose equal values share their inputs, stored once.
        disjoint: column of which no value is in two splits (molecule, patient, document): rows of train whose value is
            in validation or test too are left out, and those of validation whose value is in test.
        time: column by which the rows of a group are ordered, the earliest first.
        categories: input column whose values are names, even where they look like numbers; texts are names anyway.
        most_categories: the most names of a column; each becomes an element of the input, and one stands for all names
            that train has not.
        identifiers: input column whose values are names of which there are many (items, shops), numbered from 1 for an
            embedding; names that train has not are 0.
        integers: target column that stays whole numbers beside targets that are values (the action taken, say).
        standardize: shift and scale every number by its mean and deviation in train; integers become floats, but for
            identifiers, and targets that stay whole numbers.
        skip_bad: leave out what cannot be used, and say how much.
        overwrite: replace a dataset that is there.
        progress: called now and then with the rows written so far and in all.

    Example:
        metadist data table --source visits.parquet --group user --input x=age,income --target clicked --out data/visits
    """
    options = options_of("table", locals())
    source, notes = Path(source), Notes()
    if not inputs:
        raise InputError(f"no input column of {source} was named; name at least one")
    with staging(out, overwrite) as directory:
        labelling = (parent, split_column, share, disjoint)
        rows = Rows(source, [name for name in (group, *labelling, time) if name is not None], notes)
        others = (None if name is None else rows.column(name) for name in labelling)
        labels, moment = Labels(rows.column(group), *others), None if time is None else rows.column(time)
        asked = _asked(inputs, targets, rows, [*labels.columns, *([] if moment is None else [moment])])
        names, numbered = ([rows.column(name) for name in given] for given in (categories, identifiers))
        _check_names(asked, names, numbered, source)
        _keep_whole_numbers(asked, [rows.column(name) for name in integers], source)
        used = [column for each in asked for column in each.columns if column not in (*names, *numbered)]
        rows.choose([*labels.columns, *names, *numbered], used if moment is None else [*used, moment])
        for each in asked:
            each.settle_columns(names, numbered, notes)
        make = partial(Survey, rows, labels=labels, asked_kind=kind, skip_bad=skip_bad, time=moment)
        survey, splits = surveyed(make, asked, labels.disjoint, notes, fractions, seed)
        _find_categories(survey, splits, most_categories)
        _write(directory, survey, splits, standardize, options, progress)
    return Path(out)


def _asked(inputs: Sequence[str], targets: Sequence[str], rows: Rows, labels: Sequence[str]) -> list[Asked]:
    """The fields that were asked for; patterns of inputs pass over labels, targets, and what is named by itself."""
    last = [Asked.parse(text, "target", rows, labels) for text in targets]
    single = [Asked.parse(text, "input", rows, labels) for text in inputs]
    taken = {*labels, *(c for each in last for c in each.columns)}
    taken |= {column for each in single for column in each.columns if column not in each.loose}
    return [*(Asked.parse(text, "input", rows, taken) for text in inputs), *last]


def _check_names(asked: Sequence[Asked], categories: Sequence[str], identifiers: Sequence[str], source: Path) -> None:
    """Raise InputError where columns of names are in no input, or are to be both kinds of names."""
    for name in (*categories, *identifiers):
        if not any(name in each.columns for each in asked if each.role == "input"):
            raise InputError(f"column {name!r} of {source} is in no input; name it in --input too")
    if both := set(categories) & set(identifiers):
        raise InputError(f"column {min(both)!r} of {source} is a category and an identifier; name it as one of them")


def _keep_whole_numbers(asked: Sequence[Asked], integers: Sequence[str], source: Path) -> None:
    """Mark the targets that stay whole numbers. Raises InputError where a column is no target of its own."""
    for name in integers:
        found = [each for each in asked if each.role == "target" and each.columns == (name,)]
        if not found:
            raise InputError(f"column {name!r} of {source} is no target of its own; name it in --target too")
        found[0].whole_numbers = True


def _find_categories(survey: Survey, splits: dict[str, Split], most: int) -> None:
    """Give the fields the names that train has in their columns of names, sorted."""
    found: dict[str, set[str]] = {column: set() for asked in survey.fields for column in asked.named}
    identifiers = {asked.columns[0] for asked in survey.fields if asked.identifier}
    for batch in survey.batches() if found else ():
        groups, codes = survey.groups(batch)
        in_train = np.array([splits[name] == "train" for name in groups])[codes]
        for column, known in found.items():
            names, numbers = strings(batch, column, survey.source)
            known.update(names[number] for number in np.unique(numbers[in_train]) if names[number])
            limit = MOST_IDENTIFIERS if column in identifiers else most
            if len(known) > limit:
                raise InputError(
                    f"column {column!r} of {survey.source} has more than {limit} names in train"
                    + ("; write rare names as one" if column in identifiers else MANY_CATEGORIES)
                )
    for asked in survey.fields:
        if asked.named:
            asked.categories = {column: Categories(column, tuple(sorted(found[column]))) for column in asked.named}
            asked.shape = () if asked.identifier else (len(asked.one_hot),)
            for column in asked.named:
                note_lookalikes(f"categories of column {shown(column)!r}", found[column], survey.notes)


def _fields(survey: Survey, scaling: Scaling) -> tuple[list[Field], dict[str, Any]]:
    """The fields, and what the metadata must say beside them."""
    fields: list[Field] = []
    standardized: dict[str, Any] = {}
    for asked in survey.fields:
        shared = survey.labels.share is not None and asked.role == "input"
        field = Field(asked.name, asked.role, asked.dtype.name, asked.shape, shared=shared)
        if asked.name in scaling:
            offset, scale = scaling[asked.name]
            if offset.ndim:
                standardized[asked.name] = {"offset": offset.tolist(), "scale": scale.tolist()}
            else:
                field = replace(field, offset=float(offset), scale=float(scale))
        fields.append(field)
        if asked.incomplete:
            fields.append(Field(asked.name + MASK, "input", "bool", asked.shape, shared=shared))
    names = {asked.name: list(asked.numbered) for asked in survey.fields if asked.numbered is not None}
    categories = {
        asked.name: {column: list(asked.categories[column].names) for column in asked.named}
        for asked in survey.fields
        if asked.named and not asked.identifier
    }
    columns = {asked.name: list(asked.columns) for asked in survey.fields}
    vocabularies = {a.name: a.categories[a.columns[0]].width for a in survey.fields if a.identifier}
    extra = {"names": names, "standardized": standardized, "categories": categories, "columns": columns}
    extra["vocabularies"] = vocabularies
    extra["preprocessing"] = _preprocessing(survey)
    extra |= {} if survey.time is None else {"time": survey.time}
    return fields, {name: content for name, content in extra.items() if content}


def _preprocessing(survey: Survey) -> dict[str, Any]:
    """Which columns the fields are made of, and which one holds the labels, for rows that a run will be asked about."""
    fields = []
    for asked in survey.fields:
        kind = asked.vector, asked.dtype.name, list(asked.shape), asked.incomplete
        names = {column: list(asked.categories[column].names) for column in asked.named}
        identifiers = names.pop(asked.columns[0]) if asked.identifier else None
        fields.append(TableField(asked.name, asked.role, list(asked.columns), *kind, names, identifiers))
    labels = [survey.labels.group] if survey.kind == "classes" else [f.columns[0] for f in fields if f.role == "target"]
    return {"table": [asdict(field) for field in fields], "label": None if survey.kind == "values" else labels[0]}


def _scaling(survey: Survey, splits: dict[str, Split]) -> Scaling:
    """The offset and scale of each number, over the train rows; what stays as it is, is noted."""
    moments: dict[str, _Moments] = {}
    for asked in survey.fields:
        label = asked.identifier or asked.whole_numbers or (asked.role == "target" and survey.kind == "labelled")
        if asked.dtype.kind == "b" and not label:
            why = "they are booleans"
            survey.notes.add("fields not standardized", why, shown(asked.name), "nothing if that is right")
        elif not label:
            moments[asked.name] = _Moments(by_element=bool(asked.shape))
    chosen = [asked for asked in survey.fields if asked.name in moments]
    for batch in survey.batches():
        names, codes = survey.groups(batch)
        in_train = np.array([splits[name] == "train" for name in names])[codes]
        for asked in chosen:
            data, known = asked.read(batch)
            moments[asked.name].add(data[in_train], known[in_train])
    for asked in chosen:
        constant = moments[asked.name].constant & ~(asked.one_hot if asked.named else False)
        why = "they are constant or missing in all of train, and only shifted"
        example = f"{shown(asked.name)}[{int(np.argmax(constant))}]" if constant.ndim else shown(asked.name)
        remedy = "leave them out if they say nothing"
        survey.notes.add("numbers not scaled", why, example, remedy, int(constant.sum()))
        if asked.dtype.kind != "f":
            remedy = "take them as --identifier where they are numbers of things, for an embedding"
            survey.notes.add("integer fields made floats", "they are standardized", shown(asked.name), remedy)
            asked.dtype = np.dtype(np.float64)
    scaling = {name: found.offset_and_scale() for name, found in moments.items()}
    for asked in chosen:
        if asked.named:
            offset, scale = scaling[asked.name]
            offset[asked.one_hot], scale[asked.one_hot] = 0, 1
    return scaling


def _note_rounding(survey: Survey, scaling: Scaling) -> None:
    """Say which numbers lose digits: models get float32."""
    for asked in survey.fields:
        if asked.dtype.kind == "f" and asked.name not in scaling and asked.largest > EXACT:
            why = "models get float32, which keeps seven digits"
            remedy = "--standardize shifts them before they are rounded"
            example = f"{shown(asked.name)} up to {asked.largest:g}"
            survey.notes.add("fields of large numbers rounded", why, example, remedy)


def _write(
    directory: Path,
    survey: Survey,
    splits: dict[str, Split],
    standardize: bool,
    options: dict[str, Any],
    progress: Progress | None,
) -> None:
    """The last passes: moments where they are asked for, then the rows."""
    scaling = _scaling(survey, splits) if standardize else {}
    _note_rounding(survey, scaling)
    fields, extra = _fields(survey, scaling)
    groups = [Group(name, splits[name], n, survey.parents.get(name)) for name, n in survey.group_rows.items()]
    about = About(survey.kind, str(survey.source), "as its source says", options, extra, survey.notes)
    shared_rows, ordered = len(survey.items), None if survey.time is None else survey.rows.instant_type(survey.time)
    writer = DatasetWriter(
        directory, fields, groups, about, shared_rows=shared_rows, ordered=ordered, progress=progress
    )
    shared = [field.name for field in writer.fields if field.shared]
    for batch in survey.batches():
        names, codes = survey.groups(batch)
        values = _values(writer.fields, survey, scaling, batch)
        if survey.time is not None:
            values[ORDER] = instants(batch, survey.time, survey.source)[0]
        share = survey.labels.share
        if share is not None:
            labels, items = strings(batch, share, survey.source)
            items = np.array([survey.items[label] for label in labels])[items]
            wrong = writer.add_shared(items, {name: values.pop(name) for name in shared})
            if wrong is not None:
                item = batch.column(share)[wrong].as_py()
                raise InputError(
                    f"rows of {survey.source} with {share} {item!r} differ in their inputs; make them equal"
                )
            values["index"] = items
        writer.add(np.array([writer.numbers[name] for name in names])[codes], values)
    writer.finish()


def _values(fields: Sequence[Field], survey: Survey, scaling: Scaling, batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    """What each field stores for these rows."""
    known_fields = {field.name: field for field in fields}
    values: dict[str, np.ndarray] = {}
    for asked in survey.fields:
        field = known_fields[asked.name]
        data, known = asked.read(batch, survey.notes)
        by_element = asked.shape and asked.name in scaling
        offset, scale = scaling[asked.name] if by_element else (field.offset, field.scale)
        values[asked.name] = as_stored(data, known, field.dtype, offset, scale)
        if asked.incomplete:
            values[asked.name + MASK] = known
    return values


def as_stored(data: np.ndarray, known: np.ndarray, dtype: str, offset: Any = 0.0, scale: Any = 1.0) -> np.ndarray:
    """What a field stores of these values. Vectors are standardized, where `offset` and `scale` have a number for each
    element; other values stay as they are. Of absent ones `gather` makes 0."""
    if np.ndim(offset):
        data = np.where(known, (data - offset) * scale, 0)
    elif not known.all():
        data = data.astype(dtype, copy=False)  # an offset is no whole number
        data = np.where(known, data, np.asarray(offset, data.dtype))
    return data.astype(dtype, copy=False)


class _Moments:
    """Mean and variance over rows, streamed block by block (Chan, Golub, LeVeque 1979)."""

    def __init__(self, by_element: bool) -> None:
        self._axis = 0 if by_element else None
        self._count: Any = 0.0
        self._mean: Any = 0.0
        self._squares: Any = 0.0

    def add(self, data: np.ndarray, known: np.ndarray) -> None:
        data = np.where(known, data, 0).astype(np.float64)
        count = known.sum(axis=self._axis).astype(np.float64)
        mean = data.sum(axis=self._axis) / np.maximum(count, 1)
        squares = (np.where(known, data - mean, 0) ** 2).sum(axis=self._axis)
        total = np.maximum(self._count + count, 1)
        shift = mean - self._mean
        self._squares = self._squares + squares + shift**2 * self._count * count / total
        self._mean = self._mean + shift * count / total
        self._count = self._count + count

    @property
    def constant(self) -> np.ndarray:
        """Where there is no deviation but that of rounding."""
        deviation = np.sqrt(self._squares / np.maximum(self._count, 1))
        return np.asarray(deviation <= ROUNDING * np.abs(self._mean))

    def offset_and_scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and 1 / deviation; a constant keeps its scale."""
        deviation = np.sqrt(self._squares / np.maximum(self._count, 1))
        return np.asarray(self._mean), np.asarray(1 / np.where(self.constant, 1.0, deviation))
