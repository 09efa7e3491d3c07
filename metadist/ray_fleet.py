"""The fleet as Ray actors: carries out the controller's actions and tells it what happened."""

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from metadist.controller import Action, Assign, Controller, Done, Event, Joined, Lost, Retire, Say, Spawn, Target, Tick
from metadist.errors import InputError
from metadist.messages import Chunk, ChunkReport, Weights
from metadist.server import Optimization, Server, Stats
from metadist.worker import Worker, set_up_process

Ref = ray.ObjectRef
TICK_S = 1.0
GPU_ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def connect(address: str | None, cpus: float, say: Callable[[str], None]) -> bool:
    """Join the cluster at `address` or RAY_ADDRESS, or start one here with at least `cpus` CPUs; True if this call did.

    A cluster started here counts as many CPUs as the workers ask for, even where that is more than there are.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        if "RAY_AUTH_MODE" not in os.environ and (Path.home() / ".ray" / "auth_token").exists():
            os.environ["RAY_AUTH_MODE"] = "token"
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RayError, RuntimeError, ValueError) as error:
            raise InputError(f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}") from None
        return True
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    here = os.cpu_count() or 1
    if cpus > here:
        say(f"the workers ask for {cpus:g} CPUs and this machine has {here}: they will share them")
    cpus = max(here, math.ceil(cpus))
    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    return True


def disconnect() -> None:
    """Leave the cluster; one that `connect` started ends."""
    ray.shutdown()


class WorkerActor:
    """A worker in a process of its own."""

    def __init__(self, make_worker: Callable[[], Worker], threads: int):
        set_up_process(threads)
        self._make_worker = make_worker

    def ready(self) -> tuple[int, str]:
        """Build the worker (here, so that what goes wrong is this call's own exception); process id and fingerprint."""
        self._worker = self._make_worker()
        return os.getpid(), self._worker.engine.fingerprint()

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
            raise error.cause from None

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
        say: Callable[[str], None] = lambda text: None,
    ):
        self.fingerprint: str | None = None
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
                    self._say(text + self._shortage() if text.startswith("waiting") else text)

    def _spawn(self, worker: int) -> None:
        wanted = self._resources
        remote = ray.remote(WorkerActor).options(
            num_cpus=wanted.cpus,
            num_gpus=wanted.gpus,
            resources=wanted.custom,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": GPU_ENVIRONMENT} if wanted.gpus else None,
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
            raise error.cause from None
        except RayError as error:
            return self._lost(worker, error)
        if chunk is None:
            self.pids[worker], fingerprint = value
            self._admit(worker, fingerprint)
            return Joined(worker)
        return Done(worker, chunk)

    def _admit(self, worker: int, fingerprint: str) -> None:
        self.fingerprint = self.fingerprint or fingerprint
        if fingerprint != self.fingerprint and not self._mixed_devices:
            raise InputError(
                f"worker {worker} computes on {fingerprint}, the others on {self.fingerprint}: the run would not be "
                "bit-identical; use equal machines, or set fleet.mixed_devices=true"
            )

    def _lost(self, worker: int, error: RayError) -> Lost:
        """Forget a worker that cannot be trusted any more."""
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] != worker}
        self._joining = {ref: other for ref, other in self._joining.items() if other != worker}
        self.pids.pop(worker, None)
        actor = self._actors.pop(worker, None)
        if actor is not None:
            ray.kill(actor)
        return Lost(worker, type(error).__name__)

    def _shortage(self) -> str:
        wanted, free = self._resources, ray.available_resources()
        return (
            f"; each asks for {wanted.cpus:g} CPU and {wanted.gpus:g} GPU, and the cluster has "
            f"{free.get('CPU', 0):g} of {ray.cluster_resources().get('CPU', 0):g} CPU and "
            f"{free.get('GPU', 0):g} of {ray.cluster_resources().get('GPU', 0):g} GPU free"
        )
