"""What driver, workers and server say to one another: names, flat numpy vectors and a few numbers."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from metadist.core.task import Split, TaskId

Progress = Callable[[int, int], None]
"""Takes how much is done, and of how much."""


def unseen(*progress: str | int) -> None:
    """Takes progress that nobody looks at."""


class Weights(NamedTuple):
    """theta [P] after `version` meta-updates."""

    version: int
    theta: np.ndarray


class Chunk(NamedTuple):
    """Tasks start, ..., stop - 1 of one meta-step (or of an evaluation): the unit of work, of a size fixed per run."""

    split: Split
    step: int
    start: int
    stop: int

    @property
    def tasks(self) -> list[TaskId]:
        return [TaskId(self.split, self.step, index) for index in range(self.start, self.stop)]


PHASES: tuple[str, ...] = ("sample", "transfer_in", "adapt", "transfer_out", "reduce")
"""What a worker does: draw the tasks, bring theta to the device, compute, bring gradients to the host, sum up."""


class ChunkReport(NamedTuple):
    """What the driver and the server need to know of a computed chunk beside its gradient.

    losses, norms: float64 [n], the outer loss and the meta-gradient's norm of each task; a task is finite when both
    are. seconds: time per phase, see PHASES. worker: who computed it, as host:process. diagnostics: the learner's, [n]
    each. system: how busy the worker's machine is, by name.
    """

    chunk: Chunk
    losses: np.ndarray
    norms: np.ndarray
    seconds: dict[str, float]
    worker: str = ""
    diagnostics: Mapping[str, np.ndarray] = {}
    system: Mapping[str, float] = {}

    @property
    def computing_s(self) -> float:
        """Seconds without sampling, which overlaps the chunk before."""
        return sum(self.seconds[phase] for phase in PHASES[1:])

    def first_not_finite(self) -> TaskId | None:
        """The first task whose loss or meta-gradient is not finite."""
        bad = np.flatnonzero(~(np.isfinite(self.losses) & np.isfinite(self.norms)))
        return self.chunk.tasks[bad[0]] if len(bad) else None


def plan(split: Split, step: int, num_tasks: int, chunk_size: int) -> list[Chunk]:
    """Tasks 0, ..., num_tasks - 1 cut into chunks of `chunk_size`, the last one possibly shorter."""
    return [Chunk(split, step, start, min(start + chunk_size, num_tasks)) for start in range(0, num_tasks, chunk_size)]


def fold(gradients: Sequence[np.ndarray], size: int) -> np.ndarray:
    """The float64 sum [P] of rows [n, P] (or partial sums [P]), one after another in the order given."""
    total = np.zeros(size, np.float64)
    for gradient in gradients:
        for row in gradient.reshape(-1, size):
            np.add(total, row, out=total)
    return total
