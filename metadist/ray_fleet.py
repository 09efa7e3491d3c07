"""The fleet as Ray actors: carries out the controller's actions and tells it what happened."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

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
    Tick,
    Waiting,
    cut_deals,
)
from metadist.errors import InputError, Interrupted
from metadist.messages import Chunk, ChunkReport, Weights
from metadist.ray_actors import WorkerActor, join_weights
from metadist.ray_server import RayServer, Ref, Result
from metadist.server import Optimization

TICK_S = 1.0
SEND_AHEAD = 16

Deal = tuple[Chunk, ...]  # consecutive chunks that one worker computes in one call


@dataclass(frozen=True)
class Resources:
    """What each worker actor asks of the cluster, and its torch threads (None: it has no torch)."""

    cpus: float = 1
    gpus: float = 0
    threads: int | None = 1
    custom: dict[str, float] = field(default_factory=dict)


class RayFleet:
    """Computes chunks on worker actors; Ray must be initialised. The driver owns every actor and every reference.

    `make_worker` makes a `Worker`, or anything with its methods, in the actor's process.
    """

    def __init__(
        self,
        make_worker: Callable[[], Any],
        target: int,
        min_workers: int = 1,
        resources: Resources = Resources(),
        mixed_devices: bool = False,
        asked_to_stop: Callable[[], int | None] = lambda: None,
        say: Callable[[str], None] = lambda text: None,
        servers: int = 1,
    ):
        self._proof: str | None = None
        self._proved = False
        self._asked_to_stop = asked_to_stop
        self._mixed_devices = mixed_devices
        self._make_worker = ray.put(make_worker)
        self._resources = resources
        self._say = say
        self._controller = Controller(target, min_workers)
        self._actors: dict[int, Any] = {}
        self._joining: dict[Ref, int] = {}
        self._calls: dict[Ref, tuple[int, Deal]] = {}
        self.servers = servers
        self._server: RayServer | None = None
        self.pids: dict[int, int] = {}
        self._weights: Sequence[Ref] = ()
        self._number = 0
        self._told: set[int] = set()
        self._submit: Callable[[int, Deal], Result] | None = None
        self._results: dict[Deal, Result] = {}
        self._perform(self._controller.on(Tick(), time.monotonic()))

    @property
    def num_workers(self) -> int:
        """Workers that have joined."""
        return self._controller.num_workers

    @property
    def target(self) -> int:
        """How many workers the run should have."""
        return self._controller.target

    def start_server(self, theta: np.ndarray, optimization: Optimization, state: dict[str, Any] | None) -> RayServer:
        """The parameter server, in as many actors as it was asked to be, on any nodes that have room."""
        if self._server is not None:
            self._server.close()
        self._server = RayServer(theta, optimization, state, self.servers)
        return self._server

    def meta_gradients(self, weights: Sequence[Ref], chunks: Sequence[Chunk]) -> list[Result]:
        """References to reports and gradients, in the order of `chunks`, all computed: what `RayServer.apply` takes."""

        self._begin(weights)

        def submit(worker: int, deal: Deal) -> Result:
            method = self._actors[worker].meta_gradients.options(num_returns=1 + len(weights))
            return method.remote(deal, *self._news(worker))

        return self._run(submit, cut_deals(chunks, self.target), self._send)

    def evaluate(
        self, weights: Sequence[Ref] | Weights, chunks: Sequence[Chunk], baselines: tuple[str, ...] = ()
    ) -> list[dict[str, np.ndarray]]:
        """What `Worker.evaluate` returns for each chunk, in order."""
        self._begin([ray.put(weights)] if isinstance(weights, Weights) else weights)

        def submit(worker: int, deal: Deal) -> Result:
            return (self._actors[worker].evaluate.remote(deal[0], baselines, *self._news(worker)),)

        return ray.get([ref for (ref,) in self._run(submit, [(chunk,) for chunk in chunks])])

    def reports(self, results: Sequence[Result]) -> list[ChunkReport]:
        """The reports among what `meta_gradients` returned."""
        return [report for reports in ray.get([result[0] for result in results]) for report in reports]

    def fetch(self, weights: Sequence[Ref] | Weights) -> Weights:
        """Weights as the server returned them."""
        return weights if isinstance(weights, Weights) else join_weights(ray.get(list(weights)))[0]

    def resize(self, target: int) -> None:
        """Have `target` workers from now on."""
        self._perform(self._controller.on(Target(target), time.monotonic()))

    def close(self) -> None:
        """End every actor of this fleet."""
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()
        if self._server is not None:
            self._server.close()

    def _begin(self, weights: Sequence[Ref]) -> None:
        """Use other weights from now on."""
        self._weights, self._number, self._told = weights, self._number + 1, set()

    def _news(self, worker: int) -> tuple[Any, ...]:
        """The number of the weights and, the first time that this worker is told, the weights."""
        told = worker in self._told
        self._told.add(worker)
        return (self._number,) if told else (self._number, *self._weights)

    def _run(
        self,
        submit: Callable[[int, Deal], Result],
        deals: Sequence[Deal],
        send: Callable[[int, Sequence[Deal]], int] = lambda sent, deals: 0,
    ) -> list[Result]:
        """Results of the deals, in order. `send(sent, deals)` is told of progress, and how many it has sent before."""
        self._submit, self._results = submit, {}
        self._perform(self._controller.begin(deals, time.monotonic()))
        sent = 0
        while not self._controller.finished:
            for event in self._wait():
                self._perform(self._controller.on(event, time.monotonic()))
            if self._controller.stands_still and (number := self._asked_to_stop()) is not None:
                raise Interrupted(number)
            sent = send(sent, deals)
        self._proved = True
        results, self._results = self._results, {}
        return [results[deal] for deal in deals]

    def _send(self, sent: int, deals: Sequence[Deal]) -> int:
        """Let the server add up, while others are being computed, the first results of the step; how many it has."""
        if self._server is None:
            return 0
        ready = sent
        while ready < len(deals) and deals[ready] not in self._controller.remaining:
            ready += 1
        if ready - sent < SEND_AHEAD:
            return sent
        self._server.send(deals[0][0].step, sent, [self._results[deal] for deal in deals[sent:ready]])
        self._results |= {deal: self._results[deal][:1] for deal in deals[sent:ready]}
        return ready

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Spawn(worker):
                    self._spawn(worker)
                case Assign(worker, deal):
                    assert self._submit is not None
                    refs = self._submit(worker, deal)
                    self._calls[refs[0]] = worker, deal
                    self._results[deal] = refs
                case Retire(worker):
                    ray.kill(self._actors.pop(worker))
                    self.pids.pop(worker, None)
                case Say(text):
                    self._say(text)
                case Waiting(joined, target, paused):
                    doing = "waiting for workers" if paused else "computing with fewer workers"
                    self._say(f"{doing}: {joined} of {target} have joined; {self._shortage()}")

    def _spawn(self, worker: int) -> None:
        wanted = self._resources
        remote = ray.remote(WorkerActor).options(
            num_cpus=wanted.cpus,
            num_gpus=wanted.gpus,
            resources=wanted.custom,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=2,  # a deal waits in the actor for the one before it
        )
        self._actors[worker] = remote.remote(self._make_worker, wanted.threads)
        self._joining[self._actors[worker].ready.remote()] = worker

    def _wait(self) -> list[Event]:
        """What happened: at least one event, a Tick when nothing did for a second."""
        refs = [*self._calls, *self._joining]
        done, rest = ray.wait(refs, num_returns=1, timeout=TICK_S, fetch_local=False)
        if done and rest:
            done += ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]
        events = [
            self._event(ref, value)
            for ref, value in zip(done, _values(done), strict=True)
            if ref in self._calls or ref in self._joining
        ]
        return events or [Tick()]

    def _event(self, ref: Ref, value: Any) -> Event:
        """What a finished call means. An exception of our own or the user's code is raised here, as it was there."""
        joining = self._joining.pop(ref, None)
        worker, deal = (joining, None) if joining is not None else self._calls.pop(ref)
        if isinstance(value, RayTaskError):
            raise value.cause from value
        if isinstance(value, RayError):
            return self._lost(worker, value)
        if deal is None:
            pid, proof = value
            return self._admit(worker, pid, proof)
        return Done(worker, deal)

    def _admit(self, worker: int, pid: int, proof: str) -> Event:
        """Let a worker in that computes what the first one did; another is refused, or stops a run not yet begun."""
        self._proof = self._proof or proof
        if proof != self._proof and not self._mixed_devices:
            text = (
                f"worker {worker} ({proof}) does not compute the same bits as the first one ({self._proof}): use equal "
                "machines, packages and data, or set fleet.mixed_devices=true"
            )
            if not self._proved:
                raise InputError(text)
            ray.kill(self._actors.pop(worker))
            return Lost(worker, text)
        self.pids[worker] = pid
        return Joined(worker)

    def _lost(self, worker: int, error: RayError) -> Lost:
        """Forget a worker that cannot be trusted any more."""
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] != worker}
        self._joining = {ref: other for ref, other in self._joining.items() if other != worker}
        self.pids.pop(worker, None)
        actor = self._actors.pop(worker, None)
        if actor is not None:
            ray.kill(actor)
        if isinstance(error, RayActorError) and error.actor_init_failed:
            raise RuntimeError(f"worker {worker} could not be started: {str(error).splitlines()[-1]}") from error
        *_, last = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        return Lost(worker, f"{type(error).__name__}: {last}")

    def _shortage(self) -> str:
        wanted = {"CPU": self._resources.cpus, "GPU": self._resources.gpus, **self._resources.custom}
        if not any(wanted.values()):
            return "the others are being started"
        free, there = ray.available_resources(), ray.cluster_resources()
        asks = " and ".join(f"{amount:g} {name}" for name, amount in wanted.items() if amount)
        has = ", ".join(f"{free.get(n, 0):g} of {there.get(n, 0):g} {n}" for n, amount in wanted.items() if amount)
        return f"each asks for {asks}, and the cluster has {has} free"


def _values(refs: Sequence[Ref]) -> list[Any]:
    """What finished calls returned, or the error of each that failed."""
    try:
        return ray.get(list(refs))
    except RayError as error:
        return [error] if len(refs) == 1 else [value for ref in refs for value in _values([ref])]
