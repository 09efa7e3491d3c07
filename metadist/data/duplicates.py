"""Rows that are equal: within a class a query may repeat a support example, across splits the test was trained on."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from metadist.data.notes import Notes

BLOCK_BYTES = 1 << 16
REMEDY = "remove the copies"

NameRow = Callable[[int, int], str]
"""What to call row `r` of group `g` in a note."""


def fingerprint(columns: Iterable[np.ndarray], out: np.ndarray) -> None:
    """A 64-bit number per row (uint64 [rows], into `out`): equal rows have equal ones, and others in practice not."""
    out[:] = 0
    for number, column in enumerate(columns):
        if not len(column):
            return
        width = column[:1].nbytes
        weights = np.random.Philox(key=number).random_raw(width) | np.uint64(1)
        step = max(1, BLOCK_BYTES // width)
        for start in range(0, len(column), step):
            block = np.ascontiguousarray(column[start : start + step]).view(np.uint8).reshape(-1, width)
            out[start : start + step] += block.astype(np.uint64) @ weights


def note_within(prints: np.ndarray, counts: Sequence[int], name_row: NameRow, notes: Notes) -> None:
    """Count the rows that repeat an earlier one of their own group. `prints` lie group by group."""
    for group, own in enumerate(_parts(prints, counts)):
        ordered = np.sort(own)
        again = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(again):
            one, two = np.flatnonzero(own == again[0])[:2].tolist()
            example = f"{name_row(group, one)} and {name_row(group, two)}"
            why = "equal to another row of the same group, so that a query may repeat a support example"
            notes.add("rows repeated", why, example, REMEDY, len(again))


def note_across(
    prints: np.ndarray,
    scratch: np.ndarray,
    counts: Sequence[int],
    splits: Sequence[str],
    name_row: NameRow,
    notes: Notes,
) -> None:
    """Count the rows that also lie in another group, of the same split or of another. `scratch` is as `prints`."""
    end = 0
    for own in _parts(prints, counts):
        once = np.unique(own)
        scratch[end : end + len(once)] = once
        end += len(once)
    scratch[:end].sort()
    common = np.unique(scratch[1:end][scratch[1:end] == scratch[: max(end - 1, 0)]])
    if not len(common):
        return
    first_group, first_row = np.full(len(common), -1), np.zeros(len(common), dtype=np.int64)
    for group, own in enumerate(_parts(prints, counts)):
        places = np.searchsorted(common, own).clip(max=len(common) - 1)
        rows = np.flatnonzero(common[places] == own)
        earlier = first_group[places[rows]]
        for split_differs in (False, True):
            chosen = rows[(earlier >= 0) & (_differ(splits, earlier, group) == split_differs)]
            if len(chosen):
                place, row = places[chosen[0]], int(chosen[0])
                one = name_row(int(first_group[place]), int(first_row[place]))
                why = "equal to a row of another group" + (
                    " in another split, so that what is tested was trained on" if split_differs else ""
                )
                notes.add("rows shared", why, f"{one} and {name_row(group, row)}", REMEDY, len(chosen))
        new = rows[earlier < 0][::-1]  # reversed: the first row of several equal ones is kept
        first_group[places[new]], first_row[places[new]] = group, new


def _differ(splits: Sequence[str], earlier: np.ndarray, group: int) -> np.ndarray:
    return np.array([splits[other] != splits[group] for other in earlier.tolist()], dtype=bool)


def _parts(prints: np.ndarray, counts: Sequence[int]) -> Iterator[Any]:
    start = 0
    for count in counts:
        yield prints[start : start + count]
        start += count
