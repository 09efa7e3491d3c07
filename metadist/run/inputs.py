"""Examples as people have them (texts, pictures, rows, arrays) as the arrays of a task, for a model that is used."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch

from metadist.core.errors import InputError
from metadist.data import Field, Preprocessing, Preprocessor, Shapes
from metadist.data.importers.table import as_stored
from metadist.data.notes import Notes, sentence
from metadist.data.preprocessing import fitted
from metadist.data.table import Column

Unit = Mapping[str, Any]


def warn(text: str) -> None:
    """A Python warning that names the line outside metadist which led to it."""
    caller, level = sys._getframe(1), 2
    while caller.f_back and str(caller.f_globals.get("__name__")).startswith("metadist."):
        caller, level = caller.f_back, level + 1
    warnings.warn(text, UserWarning, stacklevel=level)


class Inputs:
    """Makes a task's arrays of the inputs and targets that a learner is given.

    `shapes`: of the model's task. `about`: how the run's dataset made arrays of raw examples. `takes` says in words
    what may be given. What is lost on the way is said once for each kind of it, by `say`: in a Python warning.
    """

    def __init__(self, shapes: Shapes, about: Preprocessing) -> None:
        self.shapes, self.about = shapes, about
        self.units: Sequence[Unit | None] = shapes.input_units or [None] * len(shapes.inputs)
        self.target_units: Sequence[Unit | None] = shapes.target_units or [None] * max(1, len(shapes.targets))
        lengths_differ = shapes.input_units and about.inputs and len(shapes.input_units) != len(about.inputs)
        unnamed = shapes.labels and len(set(shapes.labels)) != shapes.outputs
        if lengths_differ or unnamed or about.shapes not in (None, shapes.inputs):
            raise InputError("the run's description of its inputs or labels does not fit its model's: it is damaged")
        self.raw = Preprocessor.of(about, shapes.input_units)
        arrays = " and ".join(f"[{', '.join(['n', *map(str, shape)])}]" for shape in shapes.inputs)
        several = f"{len(shapes.inputs)} inputs, a tuple of arrays {arrays}" if len(shapes.inputs) > 1 else ""
        if several and about.inputs:
            several += f", or a dict of them by name ({', '.join(about.inputs)})"
        self.takes = (f"{self.raw.takes} or " if self.raw else "") + (several or f"an array {arrays}")
        self.say: Callable[[str], None] = warn
        self._said: set[tuple[str, str]] = set()

    def __call__(self, x: Any) -> tuple[tuple[np.ndarray, ...], bool]:
        """The inputs [n, ...] of n examples as a task holds them, and whether `x` is a single one. Raises InputError
        where it is nothing that the run takes."""
        notes = Notes()
        named = self._by_name(x)
        raw = self.raw.recognise(x) if self.raw and named is None else None
        if raw:
            examples, single = raw
            assert self.raw
            stored = self.raw(examples, notes)
            self._check(stored)
            inputs = tuple(_as_gathered(*pair) for pair in zip(stored, self.units, strict=True))
        else:
            arrays, single = self._arrays(x if named is None else named)
            inputs = tuple(_converted(*pair) for pair in zip(arrays, self.units, strict=True))
            for each, unit in zip(inputs, self.units, strict=True):
                self._look(each, unit, notes)
            self._check_identifiers(inputs)
        self._say(notes)
        return inputs, single

    def targets(self, y: Any, count: int) -> tuple[np.ndarray, ...]:
        """Values of a regression as a task holds them, one array [count, ...] for each target. Raises InputError."""
        shapes, names = [list(shape) for shape in self.shapes.targets] or [[]], self.about.targets
        if isinstance(y, Mapping) and set(names) <= set(y):
            y = tuple(y[name] for name in names)
        several = tuple(map(_array, y)) if isinstance(y, tuple) and len(shapes) > 1 else (_array(y),)
        if len(several) != len(shapes):
            raise InputError(f"the run has {len(shapes)} targets, and {len(several)} were given: give a tuple of them")
        found = []
        for values, shape, unit in zip(several, shapes, self.target_units, strict=True):
            refuse_missing(values.tolist() if values.dtype == object else [], "target", "give a number")
            if values.dtype.kind not in "iuf":
                raise InputError(f"the run predicts values, and as targets {_described(y)} was given: give numbers")
            if values.size != count * int(np.prod(shape)):
                wanted = ", ".join(map(str, [count, *shape]))
                raise InputError(f"targets have shape {list(values.shape)}; {count} examples need [{wanted}]")
            found.append(_converted(values.reshape(count, *shape), unit))
        return tuple(found)

    def values(self, outputs: np.ndarray) -> np.ndarray:
        """A model's outputs [n, d] in a regression in the units of the data as it was before import; as they are where
        they are no target values, as with arms of which one target says which was taken: a whole number beside others,
        or not as many as there are outputs."""
        units = self.shapes.target_units
        if not units or (len(units) > 1 and any(np.dtype(unit["dtype"]).kind in "iu" for unit in units)):
            return outputs
        shapes = self.shapes.targets or [[]] * len(units)
        if outputs.shape[-1] != sum(int(np.prod(shape)) for shape in shapes):
            return outputs  # of a loss to which outputs are not the values of the targets
        offset, scale = (
            np.concatenate(
                [np.broadcast_to(unit[key], shape).ravel() for unit, shape in zip(units, shapes, strict=True)]
            )
            for key in ("offset", "scale")
        )
        return outputs / scale + offset

    def _by_name(self, x: Any) -> tuple[Any, ...] | None:
        """The arrays of a mapping from the names of the input fields; one from the names of columns is no such."""
        names, columns = self.about.inputs, getattr(self.raw, "columns", [])
        if not isinstance(x, Mapping) or (columns and set(columns) <= set(x)):
            return None
        if (set(names) - set(columns)) & set(x):
            if missing := [name for name in names if name not in x]:
                raise InputError(f"input {missing[0]!r} is missing: this run has {', '.join(names)}")
            return tuple(x[name] for name in names)
        if columns:
            return None
        known = f"its inputs are {', '.join(names)}" if names else "the inputs of this run have no names"
        raise InputError(f"the inputs given are {', '.join(map(repr, x))}, and {known}; it takes {self.takes}")

    def _arrays(self, x: Any) -> tuple[list[np.ndarray], bool]:
        """Arrays [n, ...], one for each input; single examples get an axis."""
        shapes = self.shapes.inputs
        arrays = [_array(each) for each in (x if isinstance(x, tuple) else (x,))]
        if len(arrays) != len(shapes) or any(array.dtype.kind not in "biuf" for array in arrays):
            raise InputError(f"{_described(x)} was given; this run takes {self.takes}")
        if not all(array.size for array in arrays):
            raise InputError(f"no example was given; this run takes {self.takes}")
        single = all(list(array.shape) == shape for array, shape in zip(arrays, shapes, strict=True))
        if single:
            arrays = [array[None] for array in arrays]
        self._check(arrays)
        return arrays, single

    def _check(self, arrays: Sequence[np.ndarray]) -> None:
        for array, shape in zip(arrays, self.shapes.inputs, strict=True):
            if list(array.shape[1:]) != shape:
                raise InputError(f"inputs have shape {list(array.shape)}; this run takes {self.takes}")
        if len({len(array) for array in arrays}) > 1:
            raise InputError(f"the inputs given have several lengths ({', '.join(str(len(a)) for a in arrays)})")

    def _check_identifiers(self, inputs: Sequence[np.ndarray]) -> None:
        """Raise InputError where a number is none of an identifier's, which a table of embeddings has no row for."""
        for each, size in zip(inputs, self.shapes.vocabularies or [None] * len(inputs), strict=True):
            if size is not None and not 0 <= each.min() <= each.max() < size:
                wrong = each.max() if each.min() >= 0 else each.min()
                raise InputError(
                    f"identifier {wrong} was given, and this run knows numbers from 0 (unknown) to {size - 1}; give "
                    "rows with the names themselves, or numbers as the import gave them"
                )

    def _look(self, inputs: np.ndarray, unit: Unit | None, notes: Notes) -> None:
        """Note images that were given on another scale than the data's."""
        if unit is not None and unit["dtype"] == "uint8":
            stored = self.about.pictures.highest if self.about.pictures else 255
            most, found = (stored - unit["offset"]) * unit["scale"], float(inputs.max())
            if found > 1.01 * most:
                why = f"white is {stored} in whole numbers (uint8), and {most:g} in floats"
                remedy = "divide or multiply them, or give pictures (paths, PIL images)"
                notes.add("images brighter than any in training", why, f"{found:g} as a float", remedy, len(inputs))

    def _say(self, notes: Notes) -> None:
        for note in notes.as_list():
            if (key := (note["what"], note["why"])) not in self._said:
                self._said.add(key)
                self.say(sentence(note))


def refuse_missing(values: Sequence[Any], what: str, remedy: str) -> None:
    """Raises InputError where one of the labels or targets (or of a list among them) is None, NaN or their like."""
    for number, each in enumerate(values, start=1):
        for part in each if isinstance(each, list | tuple) else [each]:
            is_nan = isinstance(part, float | np.floating) and bool(np.isnan(part))
            if part is None or is_nan or type(part).__name__ in ("NAType", "NaTType"):  # of pandas
                said = "NaN" if is_nan else str(part)
                raise InputError(f"{what} {number} is {said}: {remedy}, or leave its example out")


def _array(x: Any) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().numpy()
    try:
        return np.asarray(x)
    except ValueError:
        raise InputError(f"a {type(x).__name__} whose parts have several lengths is no array; even them out") from None


def _described(x: Any) -> str:
    """What was given, in words."""
    if isinstance(x, str | PathLike):
        return "a text" if isinstance(x, str) else "a path"
    if isinstance(x, list | tuple) and x:
        return f"a {type(x).__name__} of {len(x)}, first {_described(x[0])},"
    kind = f" of {x.dtype}" if isinstance(x, np.ndarray | torch.Tensor) else ""
    shape = getattr(x, "shape", None)
    return f"a {type(x).__name__}{kind}" + ("" if shape is None else f" of shape {list(shape)}")


def _converted(array: np.ndarray, unit: Unit | None) -> np.ndarray:
    """An array in the data's own units as a task holds it. Images may be bytes, or floats as they are in a task."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError("the arrays given have values that are no number or infinite: mend or fill them")
    if unit is None:
        return array.astype(np.float32) if array.dtype.kind == "f" else array
    if unit["dtype"] == "uint8" and array.dtype.kind == "f":
        return array.astype(np.float32)
    array = fitted(array, unit["dtype"], "an input of whole numbers")
    if np.ndim(unit["offset"]):
        array = as_stored(array, np.ones(array.shape, bool), unit["dtype"], unit["offset"], unit["scale"])
    return _as_gathered(array, unit)


def _as_gathered(stored: np.ndarray, unit: Unit | None) -> np.ndarray:
    """What `Table.gather` makes of the values that a field stores; vectors are stored as standardized."""
    assert unit is not None
    by_element = np.ndim(unit["offset"]) > 0
    offset, scale = (0.0, 1.0) if by_element else (unit["offset"], unit["scale"])
    field = Field("x", "input", stored.dtype.name, stored.shape[1:], offset, scale)
    return Column(field, np.ascontiguousarray(stored)).take(np.arange(len(stored)))
