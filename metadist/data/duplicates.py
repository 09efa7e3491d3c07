"""Rows that are equal: within a class a query may repeat a support example, across splits the test was trained on."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from metadist.data.mapped import blocks
from metadist.data.notes import Notes

BLOCK_BYTES = 1 << 16
REMEDY = "remove the copies"


def note_equal_rows(
    columns: Iterable[np.ndarray],
    prints: np.ndarray,
    scratch: np.ndarray,
    counts: Sequence[int],
    splits: Sequence[str] | None,
    name_row: Callable[[int, int], str],
    notes: Notes,
) -> None:
    """Count the rows that repeat an earlier one of their group and, where the `splits` of the groups are given, those
    that also lie in another group.

    `columns` [rows, ...] lie group by group, `counts` rows each; `prints` and `scratch` (uint64 [rows]) are written to;
    `name_row` is what to call row r of group g.
    """
    _fingerprint(columns, prints)
    end = 0
    for group, part in enumerate(_parts(prints, counts)):
        ordered = np.sort(part)
        again = ordered[1:] == ordered[:-1]
        if again.any():
            one, two = np.flatnonzero(part == ordered[1:][again][0])[:2].tolist()
            example = f"{name_row(group, one)} and {name_row(group, two)}"
            why = "equal to another row of the same group, so that a query may repeat a support example"
            notes.add("rows repeated", why, example, REMEDY, int(again.sum()))
        once = ordered[np.append(True, ~again)]
        scratch[end : end + len(once)] = once
        end += len(once)
    if splits is not None:
        scratch[:end].sort()
        common = np.unique(scratch[1:end][scratch[1:end] == scratch[: max(end - 1, 0)]])
        if len(common):
            _note_across(common, prints, counts, np.array(splits), name_row, notes)


def _note_across(
    common: np.ndarray,
    prints: np.ndarray,
    counts: Sequence[int],
    splits: np.ndarray,
    name_row: Callable[[int, int], str],
    notes: Notes,
) -> None:
    """Count the rows with a print that is `common` to several groups, of one split or of two."""
    first_group, first_row = np.full(len(common), -1), np.zeros(len(common), dtype=np.int64)
    for group, part in enumerate(_parts(prints, counts)):
        places = np.searchsorted(common, part).clip(max=len(common) - 1)
        rows = np.flatnonzero(common[places] == part)
        earlier = first_group[places[rows]]
        across = splits[earlier] != splits[group]
        other = " in another split, so that what is tested was trained on"
        for differs, such in ((False, " in the same split"), (True, other)):
            chosen = rows[(earlier >= 0) & (across == differs)]
            if len(chosen):
                place, row = places[chosen[0]], int(chosen[0])
                example = f"{name_row(int(first_group[place]), int(first_row[place]))} and {name_row(group, row)}"
                notes.add("rows shared", f"equal to a row of another group{such}", example, REMEDY, len(chosen))
        new = rows[earlier < 0][::-1]  # reversed: the first row of several equal ones is kept
        first_group[places[new]], first_row[places[new]] = group, new


def _fingerprint(columns: Iterable[np.ndarray], out: np.ndarray) -> None:
    """A 64-bit number per row (uint64 [rows], into `out`): equal rows have equal ones, and others in practice not."""
    out[:] = 0
    for number, column in enumerate(columns):
        if not len(column):
            return
        width = column[:1].nbytes
        weights = np.random.Philox(key=number).random_raw(width) | np.uint64(1)
        for rows in blocks(column, BLOCK_BYTES):
            block = np.ascontiguousarray(column[rows]).view(np.uint8).reshape(-1, width)
            out[rows] += block.astype(np.uint64) @ weights


def _parts(prints: np.ndarray, counts: Sequence[int]) -> Iterator[np.ndarray]:
    start = 0
    for count in counts:
        yield prints[start : start + count]
        start += count
