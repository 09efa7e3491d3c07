"""Random draws that are a pure function of a task's name: no generator state, no worker rank, no clock."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from metadist.core.task import SPLITS, TaskId

LEARNER_STREAM = 1
_BLOCK = 64  # raw words fetched at a time, four to a value of the counter
_own = threading.local()  # a thread's generator, which holds no state between two fetches


class Draws:
    """A stream of uniform draws keyed by (seed, stream, task).

    The words come raw from Philox4x64-10 (Salmon et al. 2011), whose stream numpy guarantees; the integers are made
    here, because numpy's own sampling methods may change between releases.

    Args:
        seed: The run's seed, 0 to 2**64 - 1 (else the first draw raises OverflowError).
        task: Whose draws these are.
        stream: Separates uses that share a task: 0 samples the task, LEARNER_STREAM belongs to the learner.

    Example:
        >>> draws = Draws(0, TaskId("train", 0, 0))
        >>> ways, shift = draws.choose(20, 5), draws.uniform(3)  # 5 distinct integers below 20; float64 [3] in [0, 1)
    """

    def __init__(self, seed: int, task: TaskId, stream: int = 0):
        self._key = [seed, stream]
        self._counter = _counter(task)
        self._words: list[int] = []

    def word(self) -> int:
        """64 uniform bits."""
        if not self._words:
            self._words = self._fetch()
        return self._words.pop()

    def below(self, n: int) -> int:
        """A uniform integer in [0, n), n at least 1; its bias is under n / 2**64."""
        return self.word() * n >> 64

    def shuffle(self, n: int) -> Iterator[int]:
        """range(n) in random order (Fisher-Yates), one draw and O(1) memory for each number taken."""
        moved: dict[int, int] = {}
        for i in range(n):
            if not self._words:
                self._words = self._fetch()
            j = i + (self._words.pop() * (n - i) >> 64)  # below(n - i), written out as this is the sampler's inner loop
            yield moved.get(j, j)
            moved[j] = moved.get(i, i)

    def choose(self, n: int, k: int) -> list[int]:
        """k distinct integers of range(n) in random order, k at most n."""
        return list(islice(self.shuffle(n), k))

    def uniform(self, count: int) -> np.ndarray:
        """`count` float64 in [0, 1), 53 bits each."""
        return np.array([self.word() >> 11 for _ in range(count)], np.float64) * 2.0**-53

    def normal(self, count: int) -> np.ndarray:
        """`count` standard normal float64 (Box-Muller)."""
        pairs = (count + 1) // 2
        radius = np.sqrt(-2 * np.log1p(-self.uniform(pairs)))
        angle = 2 * np.pi * self.uniform(pairs)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def _fetch(self) -> list[int]:
        """The next words, last first."""
        words = next(_raw(self._key, [self._counter], _BLOCK)).tolist()
        self._counter[0] += _BLOCK // 4
        return words[::-1]


class ManyDraws:
    """The draws of several tasks at once: those that `Draws(seed, task)` makes of each, in the same order, as arrays.

    Args:
        seed: The run's seed.
        tasks: T tasks.
        count: How many words each of them draws.

    Example:
        >>> draws = ManyDraws(0, [TaskId("train", 0, 0), TaskId("train", 0, 1)], count=21)
        >>> group = draws.below(np.full((2, 1), 1000))  # [2, 1]
        >>> rows = draws.choose(np.full((2, 1), 50), 5, 15)  # [2, 1, 20]: 5, then 15 more distinct integers below 50
    """

    def __init__(self, seed: int, tasks: Sequence[TaskId], count: int):
        self._words = np.array([*_raw([seed, 0], map(_counter, tasks), count)])
        self._drawn = 0

    def skip(self, count: int) -> None:
        """Leave out so many words of each task."""
        self._drawn += count

    def below(self, n: np.ndarray) -> np.ndarray:
        """Of each task t, `Draws.below` of each element of n[t], in order: int64, of n's shape."""
        count = n[0].size
        words = self._words[:, self._drawn : self._drawn + count].reshape(n.shape)
        self._drawn += count
        if n.max(initial=0) >> 32:
            return (words.astype(object) * n >> 64).astype(np.int64)
        n, half, low = n.astype(np.uint64), np.uint64(32), np.uint64(2**32 - 1)
        return ((words >> half) * n + ((words & low) * n >> half) >> half).astype(np.int64)

    def choose(self, n: np.ndarray, *parts: int) -> np.ndarray:
        """Distinct integers below each of n [T, sets], in random order: int64 [T, sets, sum(parts)]. So many as the
        first part says are drawn of each set in turn, then of each as the next says."""
        count = sum(parts)
        places = np.empty((*n.shape, count), np.int64)
        for end, part in zip(np.cumsum(parts).tolist(), parts, strict=True):
            own = np.arange(end - part, end)
            places[..., end - part : end] = self.below(n[..., None] - own) + own
        return np.array([_shuffled(row) for row in places.reshape(-1, count).tolist()], np.int64).reshape(places.shape)


def _shuffled(places: list[int]) -> list[int]:
    """What `Draws.shuffle` yields where its i-th draw is of place i or a later one, places[i]."""
    moved: dict[int, int] = {}
    order = []
    for i, j in enumerate(places):
        order.append(moved.get(j, j))
        moved[j] = moved.get(i, i)
    return order


def _counter(task: TaskId) -> list[int]:
    return [0, task.index, task.step, SPLITS.index(task.split)]


def _raw(key: list[int], counters: Iterable[list[int]], count: int) -> Iterator[np.ndarray]:
    """uint64 [count] of the stream of a key, from each of the counters on. The one generator is set to where they
    begin: making one takes five times as long, and setting it from arrays in the place of lists twice as long."""
    if not hasattr(_own, "philox"):
        _own.philox = np.random.Philox(key=[0, 0])
    philox: Any = _own.philox
    empty = [0, 0, 0, 0]
    rest = {"bit_generator": "Philox", "buffer": empty, "buffer_pos": len(empty), "has_uint32": 0, "uinteger": 0}
    for counter in counters:
        philox.state = {"state": {"counter": counter, "key": key}, **rest}  # pyright: ignore[reportAttributeAccessIssue]
        yield philox.random_raw(count)
