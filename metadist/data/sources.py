"""Where tasks come from: a source is a pure function TaskId -> Task."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import comb
from typing import Protocol

import numpy as np

from metadist.core.errors import InputError
from metadist.core.random import Draws, ManyDraws
from metadist.core.task import Examples, Split, Task, TaskId, Tasks
from metadist.data.table import Table


class Source(Protocol):
    """A pure function TaskId -> Task; what a user's own `data.source: module:Class` must offer.

    It is built as `Class(seed=..., **options)`, once per process. Calling it twice with one TaskId must give the same
    arrays, in any process: draw from `metadist.Draws(seed, task_id)`, never from global state. Every task has the same
    array shapes: support [n, ...], query [m, ...]; labels number the N ways from 0. Where a model is called with
    something else than a task's inputs (a policy with what it observes), the shapes of that are its attribute
    `observation_shapes`, a list for each input.

    Example:
        >>> class Lines:
        ...     outputs = 1
        ...     def __init__(self, seed: int):
        ...         self.seed = seed
        ...     def __call__(self, task_id: TaskId) -> Task:
        ...         draws = Draws(self.seed, task_id)
        ...         slope, x = draws.uniform(1), draws.uniform(20).reshape(-1, 1)
        ...         return Task.of(x[:5], slope * x[:5], x[5:], slope * x[5:])
    """

    @property
    def outputs(self) -> int:
        """How many outputs a model needs: ways, or target values."""
        ...

    def __call__(self, task_id: TaskId) -> Task: ...


@dataclass(frozen=True)
class TableSource(ABC):
    """K support and Q query examples (per label, where there are labels) of the groups of a table.

    Args:
        tables: a table per split, as `open_dataset(path).splits`.
        shots: K, support examples per label (per task in `ValueSource`).
        queries: Q, query examples likewise; the support set does not depend on it.
        seed: of the draws; a task is a function of (seed, TaskId, data).
        in_order: support examples come before query examples in their group (per label, where there are labels), in
            the table's order, that of time if it was imported so. The support set then depends on Q.

    Raises:
        InputError: at the first task of a split that the data lacks, or has too few groups or rows for.
    """

    tables: Mapping[Split, Table] = field(repr=False)
    shots: int
    queries: int
    seed: int
    in_order: bool = field(default=False, kw_only=True)
    _pools: dict[Split, list[np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    @property
    @abstractmethod
    def outputs(self) -> int:
        """How many outputs a model needs."""

    @abstractmethod
    def eligible(self, split: Split, table: Table) -> list[np.ndarray]:
        """Sets of groups a task may draw from, never empty; raises InputError when there is none."""

    @abstractmethod
    def combinations(self, split: Split) -> int:
        """How many tasks of a split differ in more than the rows drawn and the order of labels: in their classes, or,
        where a group is the task, in the group. Raises InputError if the split cannot yield a task."""

    @abstractmethod
    def rows(self, table: Table, pools: Sequence[np.ndarray], task_ids: Sequence[TaskId]) -> np.ndarray:
        """K + Q rows of each label of each task (or, without labels, of the task): int64 [T, labels, K + Q]."""

    def pools(self, split: Split) -> list[np.ndarray]:
        """What `eligible` found for a split. Raises InputError if the split cannot yield a task."""
        if split not in self.tables:
            raise InputError(f"the data has no split {split!r}, only {', '.join(self.tables)}")
        if split not in self._pools:
            self._pools[split] = self.eligible(split, self.tables[split])
        return self._pools[split]

    def __call__(self, task_id: TaskId) -> Task:
        return self.sample([task_id])[0]

    def sample(self, task_ids: Sequence[TaskId]) -> Tasks:
        """Tasks of one split, drawn and read from the table at once: the same as one after the other, in a third of the
        time."""
        pools, table = self.pools(task_ids[0].split), self.tables[task_ids[0].split]
        rows = self.rows(table, pools, task_ids)
        count, ways = rows.shape[:2]
        order = [part.reshape(count, -1) for part in (rows[..., : self.shots], rows[..., self.shots :])]
        inputs, targets = table.gather(np.concatenate(order, axis=1).ravel())
        if not isinstance(self, ValueSource):
            labels = np.arange(ways)
            labels = np.concatenate([labels.repeat(self.shots), labels.repeat(self.queries)])
            targets = (np.tile(labels, count),)

        def part(arrays: tuple[np.ndarray, ...], chosen: slice) -> tuple[np.ndarray, ...]:
            return tuple(array.reshape(count, -1, *array.shape[1:])[:, chosen] for array in arrays)

        support, query = slice(ways * self.shots), slice(ways * self.shots, None)
        return Tasks(Task(*(Examples(part(inputs, chosen), part(targets, chosen)) for chosen in (support, query))))

    @property
    def _needed(self) -> int:
        return self.shots + self.queries


@dataclass(frozen=True)
class ClassSource(TableSource):
    """N-way K-shot classification where the groups of a table are the classes (scheme `classes`).

    A task draws N groups and K + Q rows of each; the groups come in random order, so that labels 0..N-1 carry no
    identity. support [N*K, ...], query [N*Q, ...], ordered by label.

    Args:
        tables, shots, queries, seed, in_order: as `TableSource`.
        ways: N.
        within_parent: draw all N groups from one parent (characters of one alphabet, say).

    Example:
        >>> source = ClassSource(open_dataset("data/digits").splits, shots=1, queries=15, seed=0, ways=3)
        >>> source(TaskId("train", step=0, index=0)).query.targets[0].shape
        (45,)
    """

    ways: int = field(kw_only=True)
    within_parent: bool = field(default=False, kw_only=True)

    @property
    def outputs(self) -> int:
        return self.ways

    def eligible(self, split: Split, table: Table) -> list[np.ndarray]:
        groups = np.flatnonzero(table.counts >= self._needed)
        pools = [groups]
        if self.within_parent:
            if table.parents is None:
                raise InputError("task.within_parent needs data with parents, and this has none: set it to false")
            ordered = groups[np.argsort(table.parents[groups], kind="stable")]
            pools = np.split(ordered, np.flatnonzero(np.diff(table.parents[ordered])) + 1)
        pools = [pool for pool in pools if len(pool) >= self.ways]
        if not pools:
            raise InputError(
                f"split {split!r} has {len(groups)} classes (of {len(table.counts)}) with the {self._needed} examples "
                f"that {self.shots} shots and {self.queries} queries take, and {self.ways} ways need {self.ways}"
                f"{' of one parent' if self.within_parent else ''}: lower ways, shots or queries"
            )
        return pools

    def combinations(self, split: Split) -> int:
        return sum(comb(len(pool), self.ways) for pool in self.pools(split))

    def rows(self, table: Table, pools: Sequence[np.ndarray], task_ids: Sequence[TaskId]) -> np.ndarray:
        draws = ManyDraws(self.seed, task_ids, 1 + self.ways + self.ways * self._needed)
        pool = draws.below(np.full((len(task_ids), 1), len(pools)))
        sizes, starts = np.array([len(each) for each in pools]), np.cumsum([0, *(len(each) for each in pools[:-1])])
        places = draws.choose(sizes[pool], self.ways)[:, 0]
        groups = (pools[0] if len(pools) == 1 else np.concatenate(pools))[starts[pool] + places]
        chosen = draws.choose(table.counts[groups], self.shots, self.queries)
        return table.starts[groups][..., None] + (np.sort(chosen) if self.in_order else chosen)


@dataclass(frozen=True)
class LabelledSource(TableSource):
    """Classification where one group (a user, a device) is the task and its rows bring the labels (scheme `labelled`).

    A task draws a group that has N labels with K + Q rows each, N of those labels, and K + Q rows of each.
    support [N*K, ...], query [N*Q, ...], ordered by label.

    Args:
        tables, shots, queries, seed, in_order: as `TableSource`; the tables have one target field, of whole numbers.
        ways: N.
        permute_labels: number the labels in random order, so that a label means nothing beyond its task; without it
            they keep the table's order, which suits labels that mean the same for every group.

    Raises:
        InputError: when built, where the tables have no such target; else as `TableSource`.

    Example:
        >>> source = LabelledSource(open_dataset("data/visits").splits, shots=5, queries=10, seed=0, ways=2)
        >>> source(TaskId("train", 0, 0)).support.targets[0]
        array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    """

    ways: int = field(kw_only=True)
    permute_labels: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        targets = [f for table in self.tables.values() for f in table.fields if f.role == "target"]
        if len(targets) != len(self.tables) or any(f.shape or "int" not in f.dtype for f in targets):
            raise InputError(
                "task.scheme=labelled needs a table with one target field, of whole numbers or names; this one has "
                f"{', '.join(sorted({f'{f.name} ({f.dtype})' for f in targets})) or 'none'}"
            )

    @property
    def outputs(self) -> int:
        return self.ways

    @property
    def labels(self) -> list[int]:
        """Of each output the label that it stands for, where labels mean the same in every task: all tasks have all
        labels that there are, in one order. Else none."""
        if self.permute_labels:
            return []
        known = np.unique(np.concatenate([table.labels for table in self.tables.values()]))
        return known.tolist() if len(known) == self.ways else []

    def eligible(self, split: Split, table: Table) -> list[np.ndarray]:
        groups, rows = table.label_counts
        groups = np.flatnonzero(np.bincount(groups[rows >= self._needed]) >= self.ways)
        if not len(groups):
            raise InputError(
                f"no group of split {split!r} has {self.ways} labels with the {self._needed} rows that {self.shots} "
                f"shots and {self.queries} queries take: lower ways, shots or queries"
            )
        return [groups]

    def combinations(self, split: Split) -> int:
        groups, rows = self.tables[split].label_counts
        labels = np.bincount(groups[rows >= self._needed])
        return sum(comb(int(labels[group]), self.ways) for group in self.pools(split)[0])

    def rows(self, table: Table, pools: Sequence[np.ndarray], task_ids: Sequence[TaskId]) -> np.ndarray:
        return np.array([self._rows(table, pools[0], task_id) for task_id in task_ids], np.int64)

    def _rows(self, table: Table, pool: np.ndarray, task_id: TaskId) -> list[np.ndarray]:
        draws = Draws(self.seed, task_id)
        draws.word()  # which chose the one pool there is
        group = pool[draws.below(len(pool))]
        start = int(table.starts[group])
        labels = table.labels_of_rows()[start : start + int(table.counts[group])]
        values, counts = np.unique(labels, return_counts=True)
        values = values[counts >= self._needed]
        places = draws.choose(len(values), self.ways)
        members = [
            start + np.flatnonzero(labels == values[p]) for p in (places if self.permute_labels else sorted(places))
        ]
        chosen = self._places([len(rows) for rows in members], draws)
        return [rows[places] for rows, places in zip(members, chosen, strict=True)]

    def _places(self, sizes: Sequence[int], draws: Draws) -> list[list[int]]:
        """K + Q places in sets of the given sizes. All support sets are drawn first: they do not depend on Q."""
        orders = [draws.shuffle(size) for size in sizes]
        supports = [list(islice(order, self.shots)) for order in orders]
        sets = [support + list(islice(order, self.queries)) for support, order in zip(supports, orders, strict=True)]
        return [sorted(places) for places in sets] if self.in_order else sets


@dataclass(frozen=True)
class ValueSource(TableSource):
    """Regression where one group is the task (scheme `values`): K support and Q query rows with their own targets.

    support [K, ...], query [Q, ...].

    Args:
        tables, shots, queries, seed, in_order: as `TableSource`; the tables have target fields.
        window: the rows of a task follow one another in their group, from a random one on; the first K are the support
            set (`in_order` for a history without gaps).

    Raises:
        InputError: when built, where the tables have no target; else as `TableSource`.

    Example:
        >>> source = ValueSource(open_dataset("data/sinusoid").splits, shots=5, queries=10, seed=0)
        >>> source(TaskId("train", 0, 0)).support.targets[0].shape
        (5, 1)
    """

    window: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not all(any(f.role == "target" for f in table.fields) for table in self.tables.values()):
            raise InputError("task.scheme=values needs a table with a target field, and this has none")

    @property
    def outputs(self) -> int:
        table = next(iter(self.tables.values()))
        return sum(int(np.prod(f.shape)) for f in table.fields if f.role == "target")

    def eligible(self, split: Split, table: Table) -> list[np.ndarray]:
        groups = np.flatnonzero(table.counts >= self._needed)
        if not len(groups):
            raise InputError(
                f"no group of split {split!r} has the {self._needed} rows that {self.shots} shots and {self.queries} "
                f"queries take (its largest has {table.counts.max(initial=0)}): lower shots or queries"
            )
        return [groups]

    def combinations(self, split: Split) -> int:
        return len(self.pools(split)[0])

    def rows(self, table: Table, pools: Sequence[np.ndarray], task_ids: Sequence[TaskId]) -> np.ndarray:
        draws = ManyDraws(self.seed, task_ids, 2 + (1 if self.window else self._needed))
        draws.skip(1)  # which chose the one pool there is
        groups = pools[0][draws.below(np.full((len(task_ids), 1), len(pools[0])))]
        starts, counts = table.starts[groups], table.counts[groups]
        if self.window:
            chosen = draws.below(counts - self._needed + 1)[..., None] + np.arange(self._needed)
        else:
            chosen = draws.choose(counts, self._needed)
        return starts[..., None] + (np.sort(chosen) if self.in_order else chosen)


def sample(source: Source, task_ids: Sequence[TaskId]) -> Sequence[Task]:
    """The named tasks, of one split, in order."""
    return source.sample(task_ids) if isinstance(source, TableSource) else [source(task_id) for task_id in task_ids]
