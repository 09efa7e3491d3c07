"""Names (colours, shops, identifiers) as numbers for a model: one element for each name, 1 where it is that name."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from metadist.data.notes import Notes, shown


@dataclass(frozen=True)
class Categories:
    """The names of a column that are told apart, of the training rows alone; any other is unknown.

    Names are stored as float32 [n, len(names) + 1], the last element for all unknown ones and where there is none.

    Example:
        >>> Categories("colour", ("blue", "red")).one_hot(["red", "pink"], np.array([0, 0, 1]))
        array([[0., 1., 0.], [0., 1., 0.], [0., 0., 1.]], dtype=float32)
    """

    column: str
    names: tuple[str, ...]

    @property
    def width(self) -> int:
        return len(self.names) + 1

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    def one_hot(self, names: Sequence[str], codes: np.ndarray, notes: Notes | None = None) -> np.ndarray:
        """Rows that are `names[codes]` ("" where there is none), codes int64 [n]; unknown ones are noted."""
        places = np.array([self._places.get(name, len(self.names)) for name in names], np.int64)[codes]
        if notes is not None:
            self._note(names, np.bincount(codes, minlength=len(names)), notes)
        rows = np.zeros((len(places), self.width), np.float32)
        rows[np.arange(len(places)), places] = 1
        return rows

    def _note(self, names: Sequence[str], counts: np.ndarray, notes: Notes) -> None:
        column = f"column {shown(self.column)!r}"
        for name, count in zip(names, counts.tolist(), strict=True):
            if not name:
                why, remedy = f"{column} is empty; the element of unknown names is 1", "fill them for a name of its own"
                notes.add("missing categories taken as unknown", why, column, remedy, count)
            elif name not in self._places:
                why, remedy = f"no row of train has them in {column}", "nothing, if new ones are to be expected"
                notes.add("categories unknown", why, shown(name), remedy, count)
