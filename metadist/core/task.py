"""What a task is: a name that travels, and the support and query examples the name stands for."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from metadist.core.errors import InputError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
MOST_WAYS = 2**16


class TaskId(NamedTuple):
    """The name of one task. A source turns it into the same task on any machine, at any time.

    Args:
        split: `train`, `validation` or `test`, whose classes are disjoint.
        step: The meta-step that the task belongs to, from 0; 0 for evaluation.
        index: Its place in that step's meta-batch, from 0.

    Example:
        >>> str(TaskId("train", 120, 7))
        'train:120:7'
    """

    split: Split
    step: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]

    def __str__(self) -> str:
        return f"{self.split}:{self.step}:{self.index}"

    @classmethod
    def parse(cls, text: str) -> "TaskId":
        """The inverse of `str`: "train:120:7" -> TaskId("train", 120, 7). Raises ValueError for any other text."""
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
    """One few-shot problem: adapt on `support`, judge on `query`. The two share no example.

    Args:
        support: The n = N * K examples of N ways and K shots (K alone in regression) that the learner adapts on.
        query: The n = N * Q examples that it is judged on.

    Example:
        >>> x, y = np.zeros((5, 28, 28), np.float32), np.arange(5)  # 5 ways, 1 shot
        >>> Task.of(x, y, x, y).support.inputs[0].shape
        (5, 28, 28)
    """

    support: Examples
    query: Examples

    @classmethod
    def of(cls, support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> "Task":
        """A task with one input and one target, from arrays or tensors of shape [n, ...]; labels are whole numbers from
        0 to N - 1, targets of a regression floats."""
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


def as_labels(task: Task) -> Task:
    """The task with labels (one target of whole numbers, of whatever width) as int64. Raises InputError where they do
    not fit."""
    return Task(*(part._replace(targets=(_int64(part.targets[0]),)) if has_labels(part) else part for part in task))


def has_labels(examples: Examples) -> bool:
    """Whether the targets are labels: one array of whole numbers."""
    if len(examples.targets) != 1:
        return False
    only = examples.targets[0]
    return only.dtype.kind in "iu" if isinstance(only, np.ndarray) else _kind(only).startswith(("int", "uint"))


def _kind(array: Any) -> str:
    return str(array.dtype if hasattr(array, "dtype") else np.asarray(array).dtype).removeprefix("torch.")


def _int64(array: Any) -> Any:
    if _kind(array) == "int64":
        return array
    array = np.asarray(array.cpu() if hasattr(array, "cpu") else array)
    if array.dtype == np.uint64 and array.max(initial=0) > np.iinfo(np.int64).max:
        raise InputError(f"label {array.max()} is too large: number the classes of a task from 0")
    return array.astype(np.int64)


def ways_of(tasks: Sequence[Task], *, covered: bool = False) -> list[int]:
    """Of each task, how many classes the labels of its support set number from 0; 0 where its targets are no labels.

    `covered`: the support set must also have an example of every class of the query set, else InputError.
    """
    if isinstance(tasks, Tasks):
        return _ways(tasks.stacked, covered)
    return [ways for task in tasks for ways in _ways(task.map(lambda array: array[None]), covered)]


def _ways(stacked: Task, covered: bool) -> list[int]:
    if not has_labels(stacked.support):
        return [0] * len(stacked.support.inputs[0])
    support, query = (_rows(part.targets[0]) for part in stacked)
    ways = np.maximum(support.max(axis=1) + 1, 0)
    if covered and ways.max() > MOST_WAYS:
        raise InputError(f"label {ways.max() - 1} in a support set: number the classes of a task from 0, without gaps")
    if covered:
        present = np.zeros((len(support), ways.max() + 1), bool)  # the last column: of no class
        np.put_along_axis(present, np.where(support < 0, ways.max(), support), True, axis=1)
        present[:, -1] = False
        absent = (query >= 0) & ~np.take_along_axis(present, np.clip(query, 0, ways.max()), axis=1)
        if absent.any():
            raise InputError(
                f"a task's query set has label {query[absent][0]}, its support set has none: this learner makes its "
                "head from the support set, so each class needs an example there"
            )
    return ways.tolist()


def _rows(labels: Any) -> np.ndarray:
    """[T, n, ...] -> [T, n], int64."""
    labels = np.asarray(_int64(labels.cpu() if hasattr(labels, "cpu") else labels))
    return labels.reshape(len(labels), -1)
