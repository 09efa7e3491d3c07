"""Random draws that are a pure function of a task's name: no generator state, no worker rank, no clock."""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from metadist.task import SPLITS, TaskId

_BLOCK = 64  # raw words fetched at a time


class Draws:
    """A stream of uniform draws keyed by (seed, stream, task).

    The words come raw from Philox4x64-10 (Salmon et al. 2011), whose stream numpy guarantees; the integers are made
    here, because numpy's own sampling methods may change between releases. `stream` separates uses that share a task:
    0 samples the task, 1 belongs to the learner.
    """

    def __init__(self, seed: int, task: TaskId, stream: int = 0):
        counter = [0, task.index, task.step, SPLITS.index(task.split)]
        self._key, self._counter = [seed, stream], counter
        self._philox: np.random.Philox | None = None  # made at the first draw: many streams are never drawn from
        self._words: list[int] = []

    def word(self) -> int:
        """64 uniform bits."""
        if not self._words:
            self._philox = self._philox or np.random.Philox(key=self._key, counter=self._counter)
            self._words = self._philox.random_raw(_BLOCK).tolist()[::-1]
        return self._words.pop()

    def below(self, n: int) -> int:
        """A uniform integer in [0, n); its bias is under n / 2**64."""
        return self.word() * n >> 64

    def shuffle(self, n: int) -> Iterator[int]:
        """range(n) in random order (Fisher-Yates), one draw and O(1) memory for each number taken."""
        moved: dict[int, int] = {}
        for i in range(n):
            j = i + self.below(n - i)
            yield moved.get(j, j)
            moved[j] = moved.get(i, i)

    def choose(self, n: int, k: int) -> list[int]:
        """k distinct integers of range(n) in random order."""
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
