"""Online meta-learning: tasks arrive one after another, and training draws from those that have arrived."""

from dataclasses import dataclass

import numpy as np

from metadist.core.random import Draws
from metadist.core.task import Examples, Task, TaskId
from metadist.data.sources import Source

STREAM = 3


@dataclass(frozen=True)
class Stream:
    """Round t, of `steps_per_round` meta-steps, draws from tasks 0, ..., t of `source`, with equal chances.

    Finn et al. 2019, follow the meta-leader, Algorithm 1 (https://arxiv.org/abs/1902.08438). Task t's data set is what
    the source gives as training task t; each draw divides it anew into support and query set. Training tasks are drawn;
    those of split `validation` and meta-step t + 1 are draws of round t's task, to judge theta when it arrives (no
    other task is ever named so); all others are those of `others`, whose shots and ways may differ.
    """

    source: Source
    others: Source
    steps_per_round: int
    seed: int

    @property
    def outputs(self) -> int:
        return self.others.outputs

    def __call__(self, task_id: TaskId) -> Task:
        draws = Draws(self.seed, task_id, STREAM)
        if task_id.split == "train":
            return self._draw(draws.below(task_id.step // self.steps_per_round + 1), draws)
        if task_id.split == "validation" and task_id.step:
            return self._draw(task_id.step - 1, draws)
        return self.others(task_id)

    def _draw(self, number: int, draws: Draws) -> Task:
        support, query = self.source(TaskId("train", number, 0))
        joined = Examples(*(tuple(map(_join, a, b)) for a, b in zip(support, query, strict=True)))
        labels = joined.targets[0]
        classes = len(joined.targets) == 1 and np.issubdtype(labels.dtype, np.integer)
        chosen: tuple[list[int], list[int]] = [], []
        for label in range(labels.max() + 1) if classes else [None]:
            rows = np.arange(len(labels)) if label is None else np.flatnonzero(labels == label)
            shots = len(support.targets[0]) if label is None else int((support.targets[0] == label).sum())
            order = rows[draws.choose(len(rows), len(rows))].tolist()
            chosen[0].extend(order[:shots])
            chosen[1].extend(order[shots:])
        return Task(*(Examples(*(tuple(array[rows] for array in part) for part in joined)) for rows in chosen))


def _join(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.concatenate([a, b])
