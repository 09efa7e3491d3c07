"""The fleet as Ray actors: carries out the controller's actions and tells it what happened."""

import os
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
)
from metadist.errors import InputError, Interrupted
from metadist.messages import Chunk, ChunkReport, Weights
from metadist.server import Optimization, Server, Stats
from metadist.worker import Worker, set_up_process

Ref = ray.ObjectRef
TICK_S = 1.0


class WorkerActor:
    """A worker in a process of its own."""

    def __init__(self, make_worker: Callable[[], Worker], threads: int):
        set_up_process(threads)
        self._make_worker = make_worker

    def ready(self) -> tuple[int, str]:
        """Build the worker (here, so that what goes wrong is this call's own exception) and compute the reference
        chunk: process id and proof of being equal to the others."""
        self._worker = self._make_worker()
        return os.getpid(), self._worker.proof()

    def meta_gradients(self, weights: Weights, chunk: Chunk) -> tuple[ChunkReport, np.ndarray]:
        return self._worker.meta_gradients(weights, chunk)

    def evaluate(self, weights: Weights, chunk: Chunk, baselines: tuple[str, ...]) -> dict[str, np.ndarray]:
        return self._worker.evaluate(weights, chunk, baselines)


class ServerActor:
    """The parameter server in a process of its own; its arguments arrive straight from the workers."""

    def __init__(self, theta: np.ndarray, optimization: Optimization, state: dict[str, Any] | None):
        set_up_process(1)
        self._server = Server(theta, optimization, state)

    def apply(self, step: int, num_tasks: int | None, *reports_and_gradients: Any) -> tuple[Weights, Stats]:
        half = len(reports_and_gradients) // 2
        chunks = zip(reports_and_gradients[:half], reports_and_gradients[half:], strict=True)
        return self._server.apply(step, *chunks, num_tasks=num_tasks)

    def weights(self) -> Weights:
        return self._server.weights()

    def snapshot(self) -> dict[str, Any]:
        return self._server.snapshot()


class ServerLost(RuntimeError):
    """The actor that owns theta died."""


class RayServer:
    """The driver's view of the server: references go in, a reference to the new weights comes out."""

    def __init__(self, actor: Any):
        self._actor = actor

    def apply(self, step: int, *chunks: tuple[Ref, Ref], num_tasks: int | None = None) -> tuple[Ref, Stats]:
        reports, gradients = zip(*chunks, strict=True)
        weights, stats = self._actor.apply.options(num_returns=2).remote(step, num_tasks, *reports, *gradients)
        try:
            return weights, ray.get(stats)
        except RayTaskError as error:
            raise error.cause from error
        except RayActorError as error:
            raise ServerLost(
                f"the parameter server was lost ({type(error).__name__}): --resume auto goes on from the checkpoint"
            ) from error

    def weights(self) -> Ref:
        return self._actor.weights.remote()

    def snapshot(self) -> dict[str, Any]:
        return ray.get(self._actor.snapshot.remote())


@dataclass(frozen=True)
class Resources:
    """What each worker actor asks of the cluster, and its torch threads."""

    cpus: float = 1
    gpus: float = 0
    threads: int = 1
    custom: dict[str, float] = field(default_factory=dict)


class RayFleet:
    """Computes chunks on worker actors; Ray must be initialised. The driver owns every actor and every reference."""

    def __init__(
        self,
        make_worker: Callable[[], Worker],
        target: int,
        min_workers: int = 1,
        resources: Resources = Resources(),
        mixed_devices: bool = False,
        asked_to_stop: Callable[[], int | None] = lambda: None,
        say: Callable[[str], None] = lambda text: None,
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
        self._calls: dict[Ref, tuple[int, Chunk]] = {}
        self._server: Any | None = None
        self.pids: dict[int, int] = {}
        self._submit: Callable[[Any, Chunk], Any] | None = None
        self._results: dict[Chunk, Any] = {}
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
        """The parameter server, in an actor on any node that has room."""
        remote = ray.remote(ServerActor).options(num_cpus=0, max_restarts=0)
        self._server = remote.remote(theta, optimization, state)
        return RayServer(self._server)

    def meta_gradients(self, weights: Ref, chunks: Sequence[Chunk]) -> list[tuple[Ref, Ref]]:
        """References to each chunk's report and gradient, in the order of `chunks`, all computed."""
        return self._run(
            lambda actor, chunk: actor.meta_gradients.options(num_returns=2).remote(weights, chunk), chunks
        )

    def evaluate(
        self, weights: Ref | Weights, chunks: Sequence[Chunk], baselines: tuple[str, ...] = ()
    ) -> list[dict[str, np.ndarray]]:
        """What `Worker.evaluate` returns for each chunk, in order."""
        weights = weights if isinstance(weights, Ref) else ray.put(weights)
        refs = self._run(lambda actor, chunk: (actor.evaluate.remote(weights, chunk, baselines),), chunks)
        return ray.get([ref for (ref,) in refs])

    def reports(self, results: Sequence[tuple[Ref, Ref]]) -> list[ChunkReport]:
        """The reports among what `meta_gradients` returned."""
        return ray.get([report for report, _ in results])

    def fetch(self, weights: Ref | Weights) -> Weights:
        """Weights as the server returned them."""
        return ray.get(weights) if isinstance(weights, Ref) else weights

    def resize(self, target: int) -> None:
        """Have `target` workers from now on."""
        self._perform(self._controller.on(Target(target), time.monotonic()))

    def close(self) -> None:
        """End every actor of this fleet."""
        for actor in [*self._actors.values(), *([self._server] if self._server else [])]:
            ray.kill(actor)
        self._actors.clear()

    def _run(self, submit: Callable[[Any, Chunk], Any], chunks: Sequence[Chunk]) -> list[Any]:
        self._submit, self._results = submit, {}
        self._perform(self._controller.begin(chunks, time.monotonic()))
        while not self._controller.finished:
            for event in self._wait():
                self._perform(self._controller.on(event, time.monotonic()))
            if self._controller.stands_still and (number := self._asked_to_stop()) is not None:
                raise Interrupted(number)
        self._proved = True
        results, self._results = self._results, {}
        return [results[chunk] for chunk in chunks]

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Spawn(worker):
                    self._spawn(worker)
                case Assign(worker, chunk):
                    assert self._submit is not None
                    refs = self._submit(self._actors[worker], chunk)
                    self._calls[refs[0]] = worker, chunk
                    self._results[chunk] = refs
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
        )
        self._actors[worker] = remote.remote(self._make_worker, wanted.threads)
        self._joining[self._actors[worker].ready.remote()] = worker

    def _wait(self) -> list[Event]:
        """What happened: at least one event, a Tick when nothing did for a second."""
        refs = [*self._calls, *self._joining]
        done, rest = ray.wait(refs, num_returns=1, timeout=TICK_S, fetch_local=False)
        if done and rest:
            done += ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]
        events = [self._event(ref) for ref in done if ref in self._calls or ref in self._joining]
        return events or [Tick()]

    def _event(self, ref: Ref) -> Event:
        """What a finished call means. An exception of our own or the user's code is raised here, as it was there."""
        joining = self._joining.pop(ref, None)
        worker, chunk = (joining, None) if joining is not None else self._calls.pop(ref)
        try:
            value = ray.get(ref)
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            return self._lost(worker, error)
        if chunk is None:
            pid, proof = value
            return self._admit(worker, pid, proof)
        return Done(worker, chunk)

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
        free, there = ray.available_resources(), ray.cluster_resources()
        asks = " and ".join(f"{amount:g} {name}" for name, amount in wanted.items() if amount)
        has = ", ".join(f"{free.get(n, 0):g} of {there.get(n, 0):g} {n}" for n, amount in wanted.items() if amount)
        return f"each asks for {asks}, and the cluster has {has} free"
