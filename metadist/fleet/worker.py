"""A worker computes chunks: it samples their tasks and returns meta-gradients or measurements. It keeps no state."""

import ctypes
import hashlib
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch

from metadist.core.errors import InputError
from metadist.core.messages import PHASES, Chunk, ChunkReport, Weights, fold
from metadist.core.random import LEARNER_STREAM, Draws
from metadist.core.task import Task, TaskId
from metadist.data.sources import Source, sample
from metadist.engine import Engine
from metadist.fleet.vitals import Vitals

TWO_RESULTS = (
    "computing the same tasks twice gave two results: the model, loss or source draws random numbers of its own "
    "(F.dropout, torch.randn, numpy.random) or keeps state between calls; use nn.Dropout, which draws from the task's "
    "own key, let the source draw other noise from metadist.Draws(seed, task_id), and keep no state"
)
Result = TypeVar("Result")
MALLOC = {-3: 1 << 25, -1: 1 << 30, -2: 1 << 26}
"""mallopt's M_MMAP_THRESHOLD (its largest), M_TRIM_THRESHOLD and M_TOP_PAD in bytes; see malloc.h of glibc."""


def set_up_process(threads: int) -> None:
    """Fix what the bits of a result depend on: torch threads (whatever the scheduler suggests), deterministic kernels.

    An operation without a deterministic kernel then raises an error that names it. Memory once freed is kept for the
    next tensors: asking the system for it anew, page by page, was a sixth of a convolutional network's time.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode("error")  # `use_deterministic_algorithms` imports the compiler: over a second
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in MALLOC.items():
            libc.mallopt(parameter, value)


class Evaluator(Protocol):
    """What a worker evaluates with: see `metadist.evaluation.evaluator`."""

    @property
    def source(self) -> Source: ...

    def evaluate(
        self, theta: torch.Tensor, tasks: Sequence[Task], draws: Sequence[Draws], step: int, meta_steps: int,
        baselines: Sequence[str] = (),
    ) -> dict[str, np.ndarray]: ...  # fmt: skip

    def evaluate_baselines(self, baselines: Sequence[str], tasks: Sequence[Task]) -> dict[str, np.ndarray]: ...


class Worker:
    """Computes any chunk, any number of times, from nothing but the weights it is given.

    May be called from several threads: each samples as it likes, one computes at a time.
    """

    def __init__(
        self,
        engine: Engine,
        source: Source,
        evaluator: Evaluator,
        seed: int,
        meta_steps: int,
        aggregate: Literal["task", "chunk"] = "task",
        chunk_size: int = 1,
    ):
        self.engine = engine
        self.source = source
        self.evaluator = evaluator
        self.seed = seed
        self.meta_steps = meta_steps
        self.chunk_size = chunk_size
        self.aggregate = aggregate
        self._computing = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "computing")
        self._vitals = Vitals()
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    def meta_gradients(self, weights: Weights, chunk: Chunk) -> tuple[ChunkReport, np.ndarray]:
        """Meta-gradients of the chunk's tasks at theta: a report, and rows [n, P] in theta's dtype.

        With `aggregate="chunk"` the rows are added up here, in task order in float64: [P].
        """
        began = time.perf_counter()
        tasks, draws = self._sample(self.source, chunk)
        sampled = time.perf_counter()
        found: dict[str, torch.Tensor] = {}

        def compute() -> tuple[np.ndarray, np.ndarray, list[float]]:
            times = [time.perf_counter()]
            theta = _tensor(weights).to(self.engine.device)
            times.append(self.engine.now())
            losses, rows = self.engine.meta_gradients(theta, tasks, chunk.step, self.meta_steps, draws, found)
            times.append(self.engine.now())
            gradient, losses = rows.cpu().numpy(), losses.cpu().numpy().astype(np.float64)
            return gradient, losses, [*times, time.perf_counter()]

        gradient, losses, times = self._in_turn(compute)
        cut = gradient.shape[1] - self.engine.num_statistics
        norms = np.sqrt(np.einsum("ij,ij->i", gradient[:, :cut], gradient[:, :cut], dtype=np.float64))
        norms[~np.isfinite(gradient[:, cut:]).all(axis=1)] = np.nan
        if self.aggregate == "chunk":
            gradient = fold([gradient], gradient.shape[1])
        times.append(time.perf_counter())
        spent = [sampled - began, *(later - earlier for earlier, later in pairwise(times))]
        seconds: dict[str, float] = dict(zip(PHASES, spent, strict=True))
        diagnostics = {name: values.cpu().numpy() for name, values in found.items()}
        return ChunkReport(chunk, losses, norms, seconds, self._name, diagnostics, self._vitals.sample()), gradient

    def evaluate(self, weights: Weights, chunk: Chunk, baselines: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
        """{metric: [n, inner_steps + 1]} of the chunk's tasks, before adaptation and after every inner step, and
        {"baseline/metric": [n]} for each baseline named; with `from_scratch` alone, no more than that."""
        tasks, draws = self._sample(self.evaluator.source, chunk)
        return self._in_turn(  # baselines too: two threads in one module would see each other's weights
            lambda: self.evaluator.evaluate(_tensor(weights), tasks, draws, weights.version, self.meta_steps, baselines)
        )

    def proof(self) -> str:
        """The device, and a hash of the meta-gradients of the run's first chunk at its initial theta: workers with the
        same proof are taken to compute the same bits. Raises InputError where computing it twice gives two results."""
        weights, chunk = Weights(0, self.engine.initial_theta().cpu().numpy()), Chunk("train", 0, 0, self.chunk_size)
        first, second = (self.meta_gradients(weights, chunk)[1].tobytes() for _ in range(2))
        if first != second:
            raise InputError(TWO_RESULTS)
        return f"{self.engine.fingerprint()}, {hashlib.sha256(first).hexdigest()[:16]}"

    def trace(self, weights: Weights, task_id: TaskId) -> list[tuple[float, float]]:
        """Support loss and norm of the fast weights of one training task, before and after every inner step."""
        task, draws = self.source(task_id), Draws(self.seed, task_id, LEARNER_STREAM)
        return self.engine.trace(_tensor(weights), task, draws, task_id.step, self.meta_steps)

    def _in_turn(self, compute: Callable[[], Result]) -> Result:
        """What `compute` returns, nothing else being computed meanwhile. The main thread calls it itself; for all
        others one thread does: glibc keeps memory that a thread has freed for that thread alone, so each that computes
        would have as much of its own."""

        def alone() -> Result:
            with self._computing:
                return compute()

        if threading.current_thread() is threading.main_thread():
            return alone()
        return self._thread.submit(alone).result()

    def _sample(self, source: Source, chunk: Chunk) -> tuple[Sequence[Task], list[Draws]]:
        names = chunk.tasks
        return sample(source, names), [Draws(self.seed, name, LEARNER_STREAM) for name in names]


def _tensor(weights: Weights) -> torch.Tensor:
    """theta [P], a copy that may be written to."""
    return torch.from_numpy(np.array(weights.theta))
