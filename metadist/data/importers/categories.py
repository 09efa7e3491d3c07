"""Names as numbers for a model: few (colours) as an element each, 1 where it is that name; many (items) numbered."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from metadist.data.notes import Notes, shown


@dataclass(frozen=True)
class Categories:
    """The names of a column that are told apart, of the training rows alone; any other is unknown.

    `one_hot` makes float32 [n, len(names) + 1] of them, the last element for all unknown ones and where there is none;
    `numbers` makes int64 [n] for an embedding, 1, 2, ... in the order of the names and 0 for the others.

    Example:
        >>> Categories("colour", ("blue", "red")).one_hot(["red", "pink"], np.array([0, 0, 1]))
        array([[0., 1., 0.], [0., 1., 0.], [0., 0., 1.]], dtype=float32)
        >>> Categories("film", ("alien", "brazil")).numbers(["brazil", "casablanca"], np.array([0, 0, 1]))
        array([2, 2, 0])
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
            self._note(names, codes, notes, "the element of unknown names is 1")
        rows = np.zeros((len(places), self.width), np.float32)
        rows[np.arange(len(places)), places] = 1
        return rows

    def numbers(self, names: Sequence[str], codes: np.ndarray, notes: Notes | None = None) -> np.ndarray:
        """Numbers of `names[codes]` ("" where there is none), codes int64 [n]; unknown ones are noted."""
        if notes is not None:
            self._note(names, codes, notes, "they are 0, as unknown names are")
        return np.array([self._places.get(name, -1) + 1 for name in names], np.int64)[codes]

    def _note(self, names: Sequence[str], codes: np.ndarray, notes: Notes, stored: str) -> None:
        column = f"column {shown(self.column)!r}"
        for name, count in zip(names, np.bincount(codes, minlength=len(names)).tolist(), strict=True):
            if not name:
                why, remedy = f"{column} is empty; {stored}", "fill them for a name of its own"
                notes.add("missing categories taken as unknown", why, column, remedy, count)
            elif name not in self._places:
                why, remedy = f"no row of train has them in {column}", "nothing, if new ones are to be expected"
                notes.add("categories unknown", why, shown(name), remedy, count)
