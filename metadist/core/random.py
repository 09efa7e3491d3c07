"""Random draws that are a pure function of a task's name: no generator state, no worker rank, no clock."""

import threading
from collections.abc import Iterator
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
        self._counter = [0, task.index, task.step, SPLITS.index(task.split)]
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
        """The next words, last first. A generator is set to where they begin: making one takes five times as long."""
        if not hasattr(_own, "philox"):
            _own.philox = np.random.Philox(key=[0, 0])
            _own.state = _own.philox.state
        place: Any = _own.state["state"]
        place["key"][:], place["counter"][:] = self._key, self._counter
        _own.philox.state = _own.state
        self._counter[0] += _BLOCK // 4
        return _own.philox.random_raw(_BLOCK).tolist()[::-1]
