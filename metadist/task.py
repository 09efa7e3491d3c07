"""What a task is: a name that travels, and the support and query examples the name stands for."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class TaskId(NamedTuple):
    """The name of one task. A source turns it into the same task on any machine, at any time.

    `step` is the meta-step that the task belongs to (0 for evaluation), `index` its place in that step's meta-batch.
    """

    split: Split
    step: int
    index: int

    def __str__(self) -> str:
        return f"{self.split}:{self.step}:{self.index}"

    @classmethod
    def parse(cls, text: str) -> "TaskId":
        """The inverse of `str`: "train:120:7" -> TaskId("train", 120, 7)."""
        split, step, index = text.split(":")
        if split not in SPLITS:
            raise ValueError(f"{text!r} does not name a task: its split must be one of {', '.join(SPLITS)}")
        return cls(split, int(step), int(index))


class Examples(NamedTuple):
    """`n` examples: one array (or tensor) per input field and per target field, each of shape [n, *field shape].

    A model is called with the inputs in this order; a loss with its output and the targets in this order.
    """

    inputs: tuple[Any, ...]
    targets: tuple[Any, ...]


class Task(NamedTuple):
    """One few-shot problem: adapt on `support`, judge on `query`. The two share no example."""

    support: Examples
    query: Examples

    @classmethod
    def of(cls, support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> "Task":
        """A task with one input and one target, from arrays or tensors of shape [n, ...]."""
        return cls(Examples((support_x,), (support_y,)), Examples((query_x,), (query_y,)))

    def map(self, f: Callable[[Any], Any]) -> "Task":
        """The task with f applied to each of its arrays."""
        return Task(*(Examples(tuple(map(f, part.inputs)), tuple(map(f, part.targets))) for part in self))


class Tasks(Sequence[Task]):
    """T tasks of equal shapes, held as `stacked`: one Task whose arrays have a leading axis T."""

    def __init__(self, stacked: Task):
        self.stacked = stacked

    def __len__(self) -> int:
        return len(self.stacked.support.inputs[0])

    def __getitem__(self, place: Any) -> Any:
        """One task, as views; a slice of tasks is Tasks."""
        chosen = self.stacked.map(lambda array: array[place])
        return Tasks(chosen) if isinstance(place, slice) else chosen


def stack(tasks: Sequence[Task], join: Callable[[list[Any]], Any]) -> Task:
    """Tasks of equal shapes as one task whose arrays have a leading axis T, made by `join` (such as torch.stack)."""
    return Task(
        *(
            Examples(
                tuple(join(list(arrays)) for arrays in zip(*(part.inputs for part in parts), strict=True)),
                tuple(join(list(arrays)) for arrays in zip(*(part.targets for part in parts), strict=True)),
            )
            for parts in zip(*tasks, strict=True)
        )
    )


def num_ways(tasks: Sequence[Task]) -> int:
    """The most classes of a support set, whose targets number them from 0; 0 where the targets are something else."""
    most = 0
    for support, _ in [tasks.stacked] if isinstance(tasks, Tasks) else tasks:
        first = support.targets[0]
        labels = np.asarray(first.cpu() if hasattr(first, "cpu") else first)
        if len(support.targets) > 1 or not np.issubdtype(labels.dtype, np.integer):
            return 0
        most = max(most, int(labels.max()) + 1)
    return most
