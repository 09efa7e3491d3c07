"""Raw examples (texts, pictures, rows of a table) as the arrays of a dataset: by the code that imported it, and by a
description of plain values that travels with a run, so that a model can be asked without its data.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import TypeAdapter, ValidationError

from metadist.core.errors import InputError
from metadist.data.files import read_regular
from metadist.data.importers.arrays import plain, strings
from metadist.data.importers.categories import Categories
from metadist.data.importers.names import lacking
from metadist.data.importers.pictures import FILE_BYTES, Decoder, Picture, PictureForm
from metadist.data.importers.survey import stacked
from metadist.data.importers.table import MASK, TableField, as_stored
from metadist.data.notes import Notes, shown
from metadist.data.table import Dataset
from metadist.data.tokenizer import PAD, UNKNOWN, Tokenizer, padded, words
from metadist.data.writer import VOCABULARY

GIVEN = "the rows given"
REPLACE = "replace or remove it"
LISTED = "make one of a folder with sorted(Path(FOLDER).glob('*.png'))"


@dataclass(frozen=True)
class TextForm:
    """How texts become tokens: the tokens kept of each, the content of `vocabulary.json`, and the column that held the
    texts."""

    column: str
    length: int
    vocabulary: str = ""


@dataclass(frozen=True)
class Preprocessing:
    """How raw examples become the arrays of a dataset: what the fields of its inputs and targets are called, and which
    of three kinds they are made of; of none where arrays alone are taken. `label`: the column of a table or a file of
    texts that held the class."""

    inputs: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    label: str | None = None
    texts: TextForm | None = None
    pictures: PictureForm | None = None
    table: list[TableField] | None = None

    @property
    def shapes(self) -> list[list[int]] | None:
        """Of an example's inputs, where they are made of a text or a picture."""
        if self.texts:
            return [[self.texts.length]] * 2
        return [[1 if self.pictures.mode == "L" else 3, *self.pictures.size]] if self.pictures else None

    @classmethod
    def parse(cls, description: Any) -> "Preprocessing":
        """What `preprocessing_of` gave. Raises InputError where it is something else."""
        try:
            return TypeAdapter(cls).validate_python(description or {})
        except ValidationError as error:
            first = error.errors()[0]
            entry = ".".join(map(str, ("preprocessing", *first["loc"])))
            raise InputError(f"it does not say how raw examples become inputs: {entry}: {first['msg']}") from None


def preprocessing_of(dataset: Dataset) -> dict[str, Any]:
    """How raw examples become arrays of this dataset, as plain values. A dataset of an importer that does not say it,
    or of before importers did, has only the names of its fields."""
    said = dict(dataset.metadata["extra"].get("preprocessing", {}))
    if "texts" in said:
        said["texts"] = {**said["texts"], "vocabulary": Tokenizer.load(dataset.path / VOCABULARY).dumps()}
    names = {f"{role}s": [f.name for f in dataset.fields if f.role == role] for role in ("input", "target")}
    return asdict(Preprocessing.parse({**said, **names}))


class Preprocessor(ABC):
    """Makes arrays of raw examples of one kind."""

    takes: str
    """What it takes, in words for a message."""

    @staticmethod
    def of(about: Preprocessing, units: Sequence[Mapping[str, Any]]) -> "Preprocessor | None":
        """The one that a description asks for, if any; `units` are those of the input fields, see `Shapes`. Raises
        InputError."""
        if about.texts:
            return TextPreprocessor(about.texts)
        if about.pictures:
            return PicturePreprocessor(about.pictures)
        return TablePreprocessor(about, units) if about.table else None

    @abstractmethod
    def recognise(self, x: Any) -> tuple[Any, bool] | None:
        """The raw examples that `x` is, and whether it is a single one; None where it is none of this kind. Raises
        InputError where only some of it are."""

    @abstractmethod
    def __call__(self, raw: Any, notes: Notes) -> list[np.ndarray]:
        """What the dataset would store of these examples, [n, *shape] for each input field; what is lost is noted.
        Raises InputError where an example cannot be used."""


class TextPreprocessor(Preprocessor):
    """Texts as token numbers int32 [n, length] and their mask bool [n, length]."""

    takes = "texts (one, or a list)"

    def __init__(self, form: TextForm) -> None:
        self.form = form
        self.tokenizer = Tokenizer.loads(form.vocabulary, "the vocabulary of this run")

    def recognise(self, x: Any) -> tuple[list[str], bool] | None:
        return _recognised(x, (str,), "text")

    def __call__(self, raw: list[str], notes: Notes) -> list[np.ndarray]:
        rows, length = [], self.form.length
        for number, text in enumerate(raw, start=1):
            if not words(text):
                raise InputError(f"text {number} has no word ({shown(text)!r}); leave it out")
            ids = self.tokenizer.encode(text)
            rows.append(padded(ids, length))
            example = f"text {number}, {shown(text)!r}"
            if len(ids) > length:
                why = f"the run was trained on {length} tokens of each"
                notes.add("texts cut", why, f"{example}, has {len(ids)}", "put what matters first, or make parts")
            if (rows[-1] <= UNKNOWN).all():
                why, remedy = "none of their characters were in the texts of training", "give texts of its language"
                notes.add("texts that say nothing to the model", why, example, remedy)
        tokens = np.stack(rows)
        return [tokens, tokens != PAD]


class PicturePreprocessor(Preprocessor):
    """Pictures (paths or Pillow's) as pixels uint8 [n, channels, height, width]."""

    takes = "pictures (paths or PIL images, one or a list)"

    def __init__(self, form: PictureForm) -> None:
        self.form = form

    def recognise(self, x: Any) -> tuple[list[Any], bool] | None:
        from PIL import Image

        return _recognised(x, (str, os.PathLike, Image.Image), "picture")

    def __call__(self, raw: list[Any], notes: Notes) -> list[np.ndarray]:
        decoder = Decoder(self.form, notes)
        pixels = []
        for number, picture in enumerate(raw, start=1):
            if isinstance(picture, str | os.PathLike):
                path = Path(picture)
                if os.path.isdir(path):
                    decoder.faults.add(shown(path), "is a folder, and this run takes a list of pictures: " + LISTED)
                elif not os.path.lexists(path):
                    decoder.faults.add(shown(path), "was not found, and this run takes pictures")
                else:
                    pixels.append(decoder(Picture(shown(path), partial(read_regular, path, FILE_BYTES))))
            else:
                pixels.append(decoder.open_picture(picture, f"picture {number}"))
        decoder.faults.refuse("what was given", len(raw), REPLACE)
        return [np.stack(pixels)]


class TablePreprocessor(Preprocessor):
    """Rows of a table as the fields that its columns were imported to."""

    def __init__(self, about: Preprocessing, units: Sequence[Mapping[str, Any]]) -> None:
        self.fields = [each for each in about.table or () if each.role == "input"]
        self.units = dict(zip(about.inputs, units, strict=False))
        if missing := {each.name for each in self.fields} - self.units.keys():
            raise InputError(f"the description of this run's inputs names {min(missing)!r}, which is none of them")
        self.columns = list(dict.fromkeys(column for each in self.fields for column in each.columns))
        numbered = {column for each in self.fields if each.identifiers is not None for column in each.columns}
        self.names = numbered | {column for each in self.fields for column in each.categories}
        """The columns whose values are names, even where they look like numbers."""
        self.takes = (
            f"rows with {'columns' if len(self.columns) > 1 else 'column'} {', '.join(map(shown, self.columns[:20]))}"
            f"{', ...' if len(self.columns) > 20 else ''} (a data frame, a dict, a list of dicts)"
        )

    def recognise(self, x: Any) -> tuple[pa.Table, bool] | None:
        if isinstance(x, pa.Table | pa.RecordBatch) or (hasattr(x, "columns") and hasattr(x, "__arrow_c_stream__")):
            named = {str(name): name for name in _names(x)}
            return self._table({name: x[named[name]] for name in self._there(list(named))}), False
        if hasattr(x, "to_dict") and hasattr(x, "index") and set(self.columns) & set(x.index):  # a row of a data frame
            x = x.to_dict()
        if isinstance(x, Mapping):
            names = self._there(list(x))
            first = next(each for each in self.fields if names[0] in each.columns)
            single = np.ndim(x[names[0]]) == (1 if first.shape and not first.vector else 0)
            return self._table({name: [x[name]] if single else x[name] for name in names}), single
        if isinstance(x, list | tuple) and x and all(isinstance(row, Mapping) for row in x):
            names = self._there(list(dict.fromkeys(name for row in x for name in row)))
            return self._table({name: [row.get(name) for row in x] for name in names}), False
        return None

    def __call__(self, raw: pa.Table, notes: Notes) -> list[np.ndarray]:
        (batch,) = raw.combine_chunks().to_batches() or [None]
        if batch is None:
            raise InputError("there are no rows; give at least one")
        batch = pa.record_batch([plain(column) for column in batch.columns], names=batch.schema.names)
        return [array for each in self.fields for array in self._stored(each, batch, notes)]

    def _stored(self, each: TableField, batch: pa.RecordBatch, notes: Notes) -> list[np.ndarray]:
        """A field, and its mask where it has one."""
        if each.identifiers is not None:
            (column,) = each.columns
            return [Categories(column, tuple(each.identifiers)).numbers(*strings(batch, column, GIVEN), notes)]
        first = lambda column: str(batch.column(column)[0])  # noqa: E731
        named: dict[str, Categories | None] = {
            column: Categories(column, tuple(names)) for column, names in each.categories.items()
        }
        data, known = stacked(batch, each.name, each.columns, each.vector, named, GIVEN, first, notes)
        data, unit = fitted(data, each.dtype, " or ".join(map(repr, each.columns[:3]))), self.units[each.name]
        if not known.any():  # lists of which none is there have no width of their own
            data, known = np.zeros((len(data), *each.shape), data.dtype), np.zeros((len(data), *each.shape), bool)
        if list(data.shape[1:]) != each.shape:
            raise InputError(
                f"column {each.columns[0]!r} has values of shape {list(data.shape[1:])} and must have {each.shape}"
            )
        if not each.incomplete and not known.all():
            row, *place = np.argwhere(~known)[0].tolist()
            widths = [1 + len(each.categories.get(column, ())) for column in each.columns]
            column = np.repeat(each.columns, widths).tolist()[place[0] if each.vector and len(each.columns) > 1 else 0]
            raise InputError(f"row {row + 1} has no value for {column!r}, and all rows in training had one; fill it in")
        stored = as_stored(data, known, each.dtype, unit["offset"], unit["scale"])
        return [stored, known] if each.name + MASK in self.units and each.incomplete else [stored]

    def _there(self, names: list[str]) -> list[str]:
        """The columns that are needed. Raises InputError where one is not among the names."""
        for column in self.columns:
            if column not in names:
                raise InputError(f"what was given {lacking(column, names)}; this run takes {self.takes}")
        return self.columns

    def _table(self, columns: Mapping[str, Any]) -> pa.Table:
        found = {}
        for name, values in columns.items():
            try:
                found[name] = _arrow(values)
            except (pa.ArrowException, TypeError, ValueError) as error:
                said = str(error).splitlines()[0].rstrip(".")
                raise InputError(f"column {name!r} of what was given has no one type ({said}); make it one") from None
        try:
            return pa.table(found)
        except pa.ArrowException:
            sizes = ", ".join(f"{name!r} {len(values)}" for name, values in found.items())
            raise InputError(f"the columns given have several lengths ({sizes}); even them out") from None


def fitted(values: np.ndarray, dtype: str, what: str) -> np.ndarray:
    """Numbers as a field of this dtype holds them. Raises InputError that begins with `what` where it cannot."""
    kind = np.dtype(dtype)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InputError(f"{what} has a value that is no number or infinite; mend or fill it")
    if kind.kind == "f":
        return values.astype(kind)
    low, high = (0, 1) if kind.kind == "b" else (np.iinfo(kind).min, np.iinfo(kind).max)
    if values.size and (np.any(values != np.floor(values)) or values.min() < low or values.max() > high):
        raise InputError(f"{what} must hold whole numbers from {low} to {high}, as {dtype} does; correct it")
    return values.astype(kind)


def _recognised(x: Any, kinds: tuple[type, ...], what: str) -> tuple[list[Any], bool] | None:
    """The examples in `x`, which are of one of the kinds, and whether it is one itself."""
    if isinstance(x, kinds):
        return [x], True
    elements = _elements(x)
    if not elements or not any(isinstance(each, kinds) for each in elements):
        return None
    for number, each in enumerate(elements, start=1):
        if not isinstance(each, kinds):
            raise InputError(f"{what} {number} is of type {type(each).__name__}; give a {what} there or leave it out")
    return elements, False


def _elements(x: Any) -> list[Any] | None:
    """Those of a list, or of a series or array of objects; None where it has none, or is numbers."""
    if isinstance(x, list | tuple):
        return list(x)
    if isinstance(x, np.ndarray):
        return x.tolist() if x.ndim == 1 and x.dtype.kind in "OUT" else None
    for name in ("to_list", "to_pylist"):
        if hasattr(x, name):
            return getattr(x, name)()
    return None


def _names(frame: Any) -> Sequence[Any]:
    return frame.schema.names if isinstance(frame, pa.Table | pa.RecordBatch) else list(frame.columns)


def _arrow(values: Any) -> pa.Array | pa.ChunkedArray:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    if isinstance(values, np.ndarray) and values.ndim > 1:
        values = list(values)
    return pa.array(values, from_pandas=True)
