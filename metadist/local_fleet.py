"""The fleet in one process, with a virtual clock: the same controller, the same results, no Ray.

Workers take turns in this process, so more of them are not faster; they exist so that a run can be repeated without a
cluster, and so that what happens when one dies can be scripted and tested in milliseconds.
"""

import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from metadist.controller import (
    Action,
    Assign,
    Controller,
    Done,
    Event,
    Joined,
    Lost,
    Retire,
    Say,
    Spawn,
    Target,
    Waiting,
)
from metadist.messages import Chunk, ChunkReport, Weights
from metadist.server import Optimization, Server
from metadist.worker import Worker

SPAWN_S, CHUNK_S = 1.0, 1.0  # virtual seconds


class Fault(NamedTuple):
    """A scripted fault: at a virtual time, worker `worker` is killed."""

    at_s: float
    worker: int


class LocalFleet:
    """Computes chunks in this process as `target` workers would."""

    def __init__(
        self,
        make_worker: Callable[[], Worker],
        target: int = 1,
        min_workers: int = 1,
        faults: Sequence[Fault] = (),
        say: Callable[[str], None] = lambda text: None,
    ):
        self._worker = make_worker()
        self._worker.proof()
        self._controller = Controller(target, min_workers)
        self._say = say
        self._order = itertools.count()
        self._events: list[tuple[float, int, Event]] = []
        self._free_at: dict[int, float] = {}
        self.now = 0.0
        for fault in faults:
            self._at(fault.at_s, Lost(fault.worker, "scripted"))

    @property
    def num_workers(self) -> int:
        """Workers that have joined."""
        return self._controller.num_workers

    @property
    def target(self) -> int:
        """How many workers the run should have."""
        return self._controller.target

    def start_server(self, theta: np.ndarray, optimization: Optimization, state: dict[str, Any] | None) -> Server:
        """The parameter server, here a plain object."""
        return Server(theta, optimization, state)

    def meta_gradients(self, weights: Weights, chunks: Sequence[Chunk]) -> list[tuple[ChunkReport, np.ndarray]]:
        """The chunks' reports and gradients, in the order of `chunks`."""
        return self._run(lambda chunk: self._worker.meta_gradients(weights, chunk), chunks)

    def evaluate(
        self, weights: Weights, chunks: Sequence[Chunk], baselines: tuple[str, ...] = ()
    ) -> list[dict[str, np.ndarray]]:
        """What `Worker.evaluate` returns for each chunk, in order."""
        return self._run(lambda chunk: self._worker.evaluate(weights, chunk, baselines), chunks)

    def reports(self, results: Sequence[tuple[ChunkReport, np.ndarray]]) -> list[ChunkReport]:
        """The reports among what `meta_gradients` returned."""
        return [report for report, _ in results]

    def fetch(self, weights: Weights) -> Weights:
        """Weights as the server returned them, here the same object."""
        return weights

    def resize(self, target: int) -> None:
        """Have `target` workers from now on."""
        self._perform(self._controller.on(Target(target), self.now))

    def close(self) -> None:
        """Nothing to end."""

    def _run(self, compute: Callable[[Chunk], Any], chunks: Sequence[Chunk]) -> list[Any]:
        results: dict[Chunk, Any] = {}
        self._perform(self._controller.begin(chunks, self.now))
        while not self._controller.finished:
            at_s, _, event = heapq.heappop(self._events)
            self.now = max(self.now, at_s)
            if isinstance(event, Done) and event.chunk in self._controller.in_flight.get(event.worker, []):
                results[event.chunk] = compute(event.chunk)
            self._perform(self._controller.on(event, self.now))
        return [results[chunk] for chunk in chunks]

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Spawn(worker):
                    self._at(self.now + SPAWN_S, Joined(worker))
                case Assign(worker, chunk):
                    self._free_at[worker] = max(self.now, self._free_at.get(worker, 0.0)) + CHUNK_S
                    self._at(self._free_at[worker], Done(worker, chunk))
                case Say(text):
                    self._say(text)
                case Retire() | Waiting():
                    pass

    def _at(self, time_s: float, event: Event) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), event))
