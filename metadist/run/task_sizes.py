"""What tasks the splits of a dataset can give: ways, and rows for shots and queries."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from metadist.core.errors import InputError
from metadist.core.task import Split
from metadist.data import Dataset, Table
from metadist.data.description import more_classes

MOST_WAYS, MOST_ROWS, MOST_SHOTS = 5, 20, {"classes": 5, "labelled": 5, "values": 10}
SHARE, SMALL_SHARE, FEW_ROWS = 0.75, 0.5, 6
"""Of a split's classes or groups so many, at least, should be able to take part in tasks; or fewer, where tasks would
otherwise have fewer rows than that of each label."""
_NEEDS = {
    "classes": "2 classes with 2 rows each",
    "labelled": "a group with 2 labels of 2 rows each",
    "values": "a group with 2 rows",
}


class TaskSizes(NamedTuple):
    """Tasks that each of `splits` (train first) can give, most of its classes or groups taking part: N, K and Q, each
    with the reason. Without labels, ways is 0."""

    splits: Sequence[Split]
    ways: int
    shots: int
    queries: int
    why_ways: str
    why_rows: str


def task_sizes(dataset: Dataset) -> TaskSizes:
    """The largest tasks, up to 5 ways and 20 rows a label (or a task, of values), that the data can give. Raises
    InputError where it cannot give any to train on and any to judge on."""
    kind, splits = dataset.kind, _usable(dataset)
    tables: dict[Split, Table] = {split: dataset.splits[split] for split in splits}
    ways, why_ways = _ways(kind, tables)
    fewest, least = "", MOST_ROWS
    for split, table in tables.items():
        rows = _rows_of_most(np.sort(rows_by_ways(kind, table, ways))[::-1], ways if kind == "classes" else 1)
        if rows < least:
            fewest, least = split, rows
    shots = max(1, min(MOST_SHOTS[kind], least // 2 if kind == "values" else least // 3))
    of = {"classes": "classes", "labelled": "labels of a group", "values": "groups"}[kind]
    why = f"K + Q is {least}, which most {of} of split {fewest} have in rows" if fewest else f"{least} rows are enough"
    return TaskSizes(splits, ways, shots, least - shots, why_ways, why)


def _rows_of_most(sizes: np.ndarray, needed: int) -> int:
    """How many rows the largest share of classes or groups have, and at least as many of them as are `needed`; `sizes`:
    the rows of each, the largest first."""
    most, half = (int(sizes[max(needed, int(np.ceil(s * len(sizes)))) - 1]) for s in (SHARE, SMALL_SHARE))
    return max(most, min(half, FEW_ROWS))


def rows_by_ways(kind: str, table: Table, ways: int) -> np.ndarray:
    """int64 [n]: the classes or groups that can take part in a task of so many ways, and how many rows each can give
    for a label (or the task), 2 or more."""
    rows = table.counts
    if kind == "labelled":
        groups, counts = table.label_counts
        order = np.lexsort((-counts, groups))
        groups, counts = groups[order], counts[order]
        place = np.arange(len(groups)) - np.searchsorted(groups, groups)  # of a label in its group, the largest first
        rows = counts[place == ways - 1]
    return rows[rows >= 2]


def _usable(dataset: Dataset) -> list[Split]:
    """Train and those to judge on, of the splits that can give a task at all."""
    few = 2 if dataset.kind == "classes" else 1
    found = list(dataset.splits)
    usable: list[Split] = [
        split for split, table in dataset.splits.items() if len(rows_by_ways(dataset.kind, table, 2)) >= few
    ]
    if "train" in usable and len(usable) > 1:
        return usable
    lacking = " and ".join(split for split in found if split not in usable)
    why = f"{lacking} cannot give a task, which takes {_NEEDS[dataset.kind]}" if lacking else ""
    what = "classes" if dataset.kind == "classes" else "groups"
    remedy = f"import more {what}, or divide them otherwise (--fractions, such as 0.5 0.2 0.3)"
    if dataset.kind == "classes":
        total = sum(len(rows_by_ways("classes", table, 2)) for table in dataset.splits.values())
        remedy = more_classes(max(2, len(found)), total)
    raise InputError(
        f"{dataset.path} has too little to train and to judge on: {why or f'its only split is {found[0]}'}: {remedy}, "
        f"since what is learned is judged on {what} that training has not seen"
    )


def _ways(kind: str, tables: Mapping[Split, Table]) -> tuple[int, str]:
    if kind == "values":
        return 0, ""
    if kind == "classes":
        sizes = {split: len(rows_by_ways(kind, table, 2)) for split, table in tables.items()}
        split = min(sizes, key=lambda split: sizes[split])
        return min(MOST_WAYS, sizes[split]), (
            f"N: the smallest split, {split}, has {sizes[split]} classes"
            f"{' (--fractions of the import give it more)' if sizes[split] < MOST_WAYS else ''}"
        )
    for ways in range(MOST_WAYS, 1, -1):
        able = [len(rows_by_ways(kind, table, ways)) / len(table.counts) for table in tables.values()]
        if min(able) >= SHARE:
            break
    return ways, f"N: {min(able):.0%} of the groups, or more, have {ways} labels with rows enough"  # pyright: ignore


def left_out(dataset: Dataset, sizes: TaskSizes, training_queries: int) -> list[str]:
    """A sentence for each split with classes or groups that take part in no task of these sizes; those of training have
    queries of their own."""
    queries = {split: training_queries if split == "train" else sizes.queries for split in sizes.splits}
    found = (
        _left_out(dataset.kind, split, dataset.splits[split], sizes.ways, sizes.shots + queries[split])
        for split in sizes.splits
    )
    return [note for note in found if note]


def _left_out(kind: str, split: Split, table: Table, ways: int, rows: int) -> str:
    count, able = len(table.counts), int((rows_by_ways(kind, table, ways) >= rows).sum())
    what = "classes" if kind == "classes" else "groups"
    lack = f"have no {ways} labels with {rows} rows" if kind == "labelled" else f"have fewer than {rows} rows"
    return f"{count - able} of {count} {what} of {split} {lack}, and are in no task" if able < count else ""
