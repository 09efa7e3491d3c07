"""Which split the groups of a table are in, and rows left out so that splits share no value of a column: no molecule,
patient or document of a test row is trained on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from metadist.core.errors import InputError
from metadist.core.task import SPLITS, Split
from metadist.data.files import within
from metadist.data.importers.arrays import strings
from metadist.data.importers.survey import Asked, Survey
from metadist.data.notes import Notes, shown
from metadist.data.splits import divide, split_named, split_of_file


def surveyed(
    make: Callable[..., Survey], asked: list[Asked], disjoint: str | None, notes: Notes,
    fractions: Sequence[float], seed: int,
) -> tuple[Survey, dict[str, Split]]:  # fmt: skip
    """The survey of the rows that are imported, and the split of each group, which does not depend on `disjoint`."""
    first = make(fields=[replace(each) for each in asked], notes=Notes() if disjoint else notes)
    splits, survey = _splits(first, fractions, seed), first
    if disjoint is not None:
        survey = make(fields=asked, notes=notes, kept=Disjoint(first, splits, disjoint, notes))
    if survey.labels.split is None:
        _note_names_of_splits(survey)
    return survey, splits


def _splits(survey: Survey, fractions: Sequence[float], seed: int) -> dict[str, Split]:
    if survey.labels.split is None:
        return divide(survey.group_rows, fractions, seed)
    splits: dict[str, Split] = {}
    for name, text in survey.splits.items():
        split = split_named(text)
        if split is None:
            column = survey.labels.split
            raise InputError(f"column {column!r} of {survey.source} says {text!r}; write train, validation or test")
        splits[name] = split
    return splits


def _note_names_of_splits(survey: Survey) -> None:
    """Say that files called train or test, beside others, are put together and their groups divided anew."""
    paths = survey.rows.paths
    for path in paths if len(paths) > 1 else ():
        if split_of_file(path, survey.source):
            why = "their rows are put together, and whole groups are given to the splits anew, by --fractions"
            remedy = "to keep them apart, add a column to the files that says train, validation or test, and name it "
            remedy += "with --split-column (each group in one split alone)"
            survey.notes.add("file names not taken as splits", why, within(path, survey.source), remedy)


class Disjoint:
    """Which rows are kept so that splits share no value of `column`: each value stays in the last split that has it,
    test before validation before train. So the test split is the same as without it. Call it with a batch of rows.

    Args:
        survey: of all rows.
        splits: of the groups.
        column: whose values are told apart.
        notes: to say how many rows, and which groups, are left out.

    Raises:
        InputError: where a split has no row left.
    """

    def __init__(self, survey: Survey, splits: Mapping[str, Split], column: str, notes: Notes) -> None:
        self._source: Path = survey.source
        self._group, self._column = survey.labels.group, column
        self._place = {name: SPLITS.index(split) for name, split in splits.items()}
        self._last: dict[str, int] = {}
        for batch in survey.batches():
            places, names, codes = self._read(batch)
            for code, place in np.unique(np.stack([codes, places], axis=1), axis=0).tolist():
                self._last[names[code]] = max(self._last.get(names[code], 0), place)
        self._note(survey, notes)

    def __call__(self, batch: pa.RecordBatch) -> np.ndarray:
        """bool [n]: which rows are kept."""
        places, names, codes = self._read(batch)
        return places >= np.array([self._last[name] for name in names], dtype=np.int64)[codes]

    def _note(self, survey: Survey, notes: Notes) -> None:
        column, left = shown(self._column), set[str]()
        for batch in survey.batches():
            kept, (places, names, values) = self(batch), self._read(batch)
            groups, codes = survey.groups(batch)
            left.update(groups[code] for code in np.unique(codes[kept]))
            for place in np.unique(places[~kept]).tolist():
                rows = np.flatnonzero(~kept & (places == place))
                why = f"of {SPLITS[place]}, whose {column} is in {' or '.join(SPLITS[place + 1 :])} too"
                remedy = "import without --disjoint to keep them"
                notes.add("rows left out", why, shown(names[values[rows[0]]]), remedy, len(rows))
        for name in survey.group_rows:
            if name not in left:
                why = f"each of their rows has a {column} that is in a later split too"
                notes.add("groups left out", why, shown(name), "import without --disjoint to keep them")
        for place in sorted(set(self._place.values()) - {self._place[name] for name in left}):
            raise InputError(
                f"--disjoint {self._column} leaves no row of {self._source} in {SPLITS[place]}: each has a value of it "
                "that is in a later split too; give fewer groups to the later splits, or leave it out"
            )

    def _read(self, batch: pa.RecordBatch) -> tuple[np.ndarray, list[str], np.ndarray]:
        """The place of each row's split [n], and the column's values as names and codes [n]."""
        groups, codes = strings(batch, self._group, self._source)
        places = np.array([self._place[name] for name in groups], dtype=np.int64)[codes]
        return places, *strings(batch, self._column, self._source)
