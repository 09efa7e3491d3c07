"""The fleet in one process, with a virtual clock: the same controller, the same results, no Ray.

Workers take turns in this process, so more of them are not faster; they exist so that a run can be repeated without a
cluster, and so that whatever can happen to one can be scripted, and tested in milliseconds.
"""

import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from metadist.core.messages import Chunk, ChunkReport, Weights, plan
from metadist.fleet import events
from metadist.fleet.controller import KEPT, Controller
from metadist.fleet.dispatch import Ahead, Batch
from metadist.fleet.events import Action, Attempt, Event
from metadist.fleet.limits import PATIENT, Patience
from metadist.fleet.recovery import Kept, RecoveringServer, ResultsLost, ServerLost
from metadist.fleet.server import Optimization, Server
from metadist.fleet.server_proof import server_proof
from metadist.fleet.worker import Worker

SPAWN_S, CHUNK_S, LEAVE_S, CUT_S, ANSWER_S, TICK_S = 1.0, 1.0, 5.0, 25.0, 0.01, 1.0  # virtual seconds
SLOW = 40.0  # times as long
NODES = ("a", "b", "c")


class Fault(NamedTuple):
    """Something scripted, at a virtual time.

    To a worker: kill; hang (it answers no more); unreachable (a call fails, the worker is well); cut (nothing of it
    arrives for some seconds); slow; lose, repeat (its next result never comes, or twice). To the node of that number:
    drain (its workers are killed some seconds later). To the fleet: target (that many workers from then on). To the
    server, at the next step it applies: server before, server after (it dies, and the step counts or not), results
    (they are lost before they are added up).
    """

    at_s: float
    kind: Literal[
        "kill", "hang", "unreachable", "cut", "slow", "lose", "repeat", "drain", "target",
        "server before", "server after", "results",
    ]  # fmt: skip
    number: int = 0


class LocalServer(Server):
    """A server whose death can be scripted."""

    faults: list[str]

    def apply(self, step: int, *chunks: Any, num_tasks: int | None = None) -> Any:
        kind = self.faults.pop() if self.faults else ""
        if kind == "results":
            raise ResultsLost("scripted")
        if kind == "server before":
            raise ServerLost("scripted")
        result = super().apply(step, *chunks, num_tasks=num_tasks)
        if kind == "server after":
            raise ServerLost("scripted")
        return result

    def copy(self, step: int, behind: Weights | None) -> Callable[[], Kept]:
        """What there is after `step` meta-steps."""
        kept = Kept(step, self.weights().theta, self.snapshot(), None if behind is None else behind.theta)
        return lambda: kept

    def close(self) -> None:
        """Nothing to end."""


class LocalFleet:
    """Computes chunks in this process as `target` workers would."""

    def __init__(
        self,
        make_worker: Callable[[], Worker],
        target: int = 1,
        min_workers: int = 1,
        faults: Sequence[Fault] = (),
        say: Callable[[str], None] = lambda text: None,
        patience: Patience = PATIENT,
    ):
        self._worker = make_worker()
        self.proof, self.server_proof = self._worker.proof(), server_proof()
        self._controller = Controller(target, min_workers, patience=patience)
        self._say = say
        self._order = itertools.count()
        self._events: list[tuple[float, int, Event | Fault]] = []
        self._free_at: dict[int, float] = {}
        self._places: dict[int, str] = {}
        self._troubles: dict[int, str] = {}
        self._cut: dict[int, float] = {}  # until when nothing of a worker arrives
        self._draining: frozenset[str] = frozenset()
        self._of_server: list[str] = []
        self._chunk_size = 1
        self._batches: dict[int, Batch] = {}
        self._computed: Batch | None = None
        self.now = self._ticked = 0.0
        for fault in faults:
            self._at(fault.at_s, fault)

    @property
    def num_workers(self) -> int:
        """Workers that have joined."""
        return self._controller.num_workers

    @property
    def target(self) -> int:
        """How many workers the run should have."""
        return self._controller.target

    def start_server(
        self, theta: np.ndarray, optimization: Optimization, state: dict[str, Any] | None,
        behind: np.ndarray | None = None, lag: int = 0,
    ) -> RecoveringServer:  # fmt: skip
        """The parameter server, here a plain object."""

        def start(theta: np.ndarray, state: dict[str, Any] | None) -> LocalServer:
            server = LocalServer(theta, optimization, state)
            server.faults = self._of_server
            return server

        kept = Kept(state["step"] if state else 0, theta, state, behind)
        return RecoveringServer(start, kept, self._recompute, lambda weights: weights, lag, self._say)

    def meta_gradients(
        self, weights: Weights, chunks: Sequence[Chunk], ahead: Ahead | None = None
    ) -> list[tuple[ChunkReport, np.ndarray]]:
        """The chunks' reports and gradients, in the order of `chunks`. Nothing is begun ahead, as nothing is idle."""
        del ahead
        self._chunk_size = max(self._chunk_size, chunks[0].stop - chunks[0].start)
        return self._run(lambda chunk: self._worker.meta_gradients(weights, chunk), chunks, "train")

    def evaluate(
        self, weights: Weights, chunks: Sequence[Chunk], baselines: tuple[str, ...] = ()
    ) -> list[dict[str, np.ndarray]]:
        """What `Worker.evaluate` returns for each chunk, in order."""
        return self._run(lambda chunk: self._worker.evaluate(weights, chunk, baselines), chunks, "evaluate")

    def reports(self) -> list[ChunkReport]:
        """The reports of the last meta-step's chunks, in task order."""
        return self._computed.reports() if self._computed else []

    def account(self) -> list[list[Any]]:
        """Of each chunk of the last meta-step: first task, the task after the last, worker, attempts, seconds, who."""
        return self._computed.account() if self._computed else []

    def fetch(self, weights: Weights) -> Weights:
        """Weights as the server returned them, here the same object."""
        return weights

    def resize(self, target: int) -> None:
        """Have `target` workers from now on."""
        self._perform(self._controller.on(events.Target(target), self.now))

    def close(self) -> None:
        """Nothing to end."""

    def _recompute(self, weights: Weights, step: int, num_tasks: int) -> list[Any]:
        return self.meta_gradients(weights, plan("train", step, num_tasks, self._chunk_size))

    def _run(self, compute: Callable[[Chunk], Any], chunks: Sequence[Chunk], kind: str) -> list[Any]:
        number = self._controller.batch + 1
        batch = self._batches[number] = Batch([(chunk,) for chunk in chunks], lambda *given: (compute(given[2][0]),))
        self._batches.pop(number - KEPT, None)
        self._perform(self._controller.begin(batch.deals, self.now, kind))
        while not self._controller.finished(number):
            event = self._next()
            if isinstance(event, events.Done) and self._controller.awaits(event.attempt):
                self._take(event.attempt)
            if isinstance(event, Fault):
                self._happen(event)
            else:
                self._perform(self._controller.on(event, self.now))
        results = [batch.results[deal][0] for deal in batch.deals]
        batch.results = dict.fromkeys(batch.results, ())
        if kind == "train":
            self._computed = batch
        return results

    def _take(self, attempt: Attempt) -> None:
        """What an attempt brings, now that its time has come; the first results of a chunk are the ones that count."""
        batch = self._batches.get(attempt.batch)
        if batch is not None:
            (result,) = batch.submit(0, attempt.worker, attempt.chunk)
            batch.results.setdefault(attempt.chunk, (result,))
            batch.told[attempt] = result if isinstance(result, dict) else [result[0]]

    def _next(self) -> Event | Fault:
        """What happens next: an event, or time going by where the controller waits for that."""
        wakes_s = self._controller.wakes_in(self.now)
        if wakes_s is not None and (not self._events or self._events[0][0] > self.now + wakes_s):
            self.now += wakes_s
            return self._tick()
        assert self._events, "the fleet waits for something that cannot happen"
        self.now = max(self.now, self._events[0][0])
        if self.now >= self._ticked + TICK_S:
            return self._tick()
        event = heapq.heappop(self._events)[2]
        match event:
            case events.Done(Attempt(_, _, worker)) | events.Answered(worker) if self._cut.get(worker, 0.0) > self.now:
                self._at(self._cut[worker], event)
                return self._next()
        return event

    def _tick(self) -> Event:
        self._ticked = self.now
        return events.Tick()

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case events.Spawn(worker, avoid):
                    self._place(worker, avoid)
                case events.Assign(attempt):
                    attempts = self._batches[attempt.batch].attempts
                    attempts[attempt.chunk] = attempts.get(attempt.chunk, 0) + 1
                    self._compute(attempt)
                case events.Ask(worker) if self._troubles.get(worker) != "hang":
                    self._at(self.now + ANSWER_S, events.Answered(worker))
                case events.Probe(worker, successor):
                    self._places[successor] = self._places.pop(worker, "")
                    self._join(successor)
                case events.Retire(worker) | events.Abandon(worker):
                    self._places.pop(worker, None)
                case events.Compare(first, second) if self._batches[first.batch].differ(first, second):
                    self._say(f"workers {first.worker} and {second.worker} computed {second.chunk} differently")
                case events.Say(text):
                    self._say(text)
                case _:
                    pass

    def _place(self, worker: int, avoid: frozenset[str]) -> None:
        """Start a worker on a node that is not to be avoided; while there is none, it waits."""
        nodes = [node for node in NODES if node not in avoid | self._draining]
        if nodes:
            self._places[worker] = nodes[worker % len(nodes)]
            self._join(worker)

    def _join(self, worker: int) -> None:
        self._at(self.now + SPAWN_S, events.Joined(worker, self._places[worker], self._places[worker]))

    def _compute(self, attempt: Attempt) -> None:
        trouble = self._troubles.get(attempt.worker)
        takes_s = CHUNK_S * (SLOW if trouble == "slow" else 1)
        self._free_at[attempt.worker] = max(self.now, self._free_at.get(attempt.worker, 0.0)) + takes_s
        if trouble in ("lose", "repeat"):
            del self._troubles[attempt.worker]
        if trouble not in ("lose", "hang"):
            for _ in range(2 if trouble == "repeat" else 1):
                self._at(self._free_at[attempt.worker], events.Done(attempt))

    def _happen(self, fault: Fault) -> None:
        match fault.kind:
            case "kill":
                self._kill(fault.number)
            case "unreachable":
                self._perform(self._controller.on(events.Unreachable(fault.number, "scripted"), self.now))
            case "cut":
                self._cut[fault.number] = self.now + CUT_S
            case "target":
                self.resize(fault.number)
            case "drain":
                node = NODES[fault.number % len(NODES)]
                if self._draining | {node} != set(NODES):  # the last one is left
                    self._draining |= {node}
                    for worker in [worker for worker, place in self._places.items() if place == node]:
                        self._at(self.now + LEAVE_S, Fault(self.now, "kill", worker))
                    self._perform(self._controller.on(events.Draining(self._draining), self.now))
            case "server before" | "server after" | "results":
                self._of_server.append(fault.kind)
            case trouble:
                self._troubles[fault.number] = trouble

    def _kill(self, worker: int) -> None:
        if self._places.pop(worker, None):
            self._perform(self._controller.on(events.Lost(worker, "scripted"), self.now))

    def _at(self, time_s: float, event: Event | Fault) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), event))
