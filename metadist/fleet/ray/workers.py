"""The worker actors of a fleet: how they are started, let in, judged when a call fails, and ended."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private.state import state
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from metadist.core.errors import InputError
from metadist.fleet.events import Joined, Kind, Lost
from metadist.fleet.ray.actors import WorkerActor

NODE_LABEL = "ray.io/node-id"  # which Ray gives every node


@dataclass(frozen=True)
class Resources:
    """What each worker actor asks of the cluster, and its torch threads (None: it has no torch)."""

    cpus: float = 1
    gpus: float = 0
    threads: int | None = 1
    custom: dict[str, float] = field(default_factory=dict)


class RayWorkers:
    """Actors by the numbers that the controller gives them. `make_worker` makes a `Worker`, or anything with its
    methods, in the actor's process."""

    def __init__(
        self, make_worker: Callable[[], Any], resources: Resources, mixed_devices: bool, proof: str | None = None
    ):
        make: Any = ray.remote(concurrency_groups={"control": 1})  # pyright: ignore[reportCallIssue]
        self._actor = make(WorkerActor)
        self._make_worker = ray.put(make_worker)
        self._resources = resources
        self.mixed_devices = mixed_devices
        self.proof = proof
        self.proved = False  # that workers compute what they should: the run has begun
        self.actors: dict[int, Any] = {}
        self.placing: dict[ray.ObjectRef, int] = {}
        self.joining: dict[ray.ObjectRef, int] = {}
        self.asked: dict[ray.ObjectRef, int] = {}
        self._since: dict[int, float] = {}
        self.pids: dict[int, int] = {}

    def spawn(self, worker: int, avoid: frozenset[str]) -> None:
        """Ask for an actor, elsewhere than on the nodes to avoid, if there are others."""
        wanted, elsewhere = self._resources, None
        if avoid and (there := alive_nodes()) - avoid:
            elsewhere = {NODE_LABEL: f"!in({','.join(sorted(avoid & there))})"} if avoid & there else None
        remote = self._actor.options(
            num_cpus=wanted.cpus,
            num_gpus=wanted.gpus,
            resources=wanted.custom,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=2,  # a deal waits in the actor for the one before it
            label_selector=elsewhere,
        )
        self.actors[worker] = remote.remote(self._make_worker, wanted.threads)
        self.placing[self.actors[worker].node.remote()] = worker
        self.joining[self.actors[worker].ready.remote()] = worker

    def placed(self, ref: ray.ObjectRef, now: float) -> None:
        """Its process has begun; from now on it should get ready."""
        self._since[self.placing.pop(ref)] = now

    def hung(self, now: float, longest_s: float) -> list[int]:
        """Those that have been getting ready for too long."""
        late = {worker for worker, since in self._since.items() if now - since > longest_s}
        return [worker for worker in self.joining.values() if worker in late]

    def probe(self, worker: int, successor: int) -> None:
        """Ask the actor of a worker again; if it answers it joins as its successor."""
        self.actors[successor] = self.actors.pop(worker)
        self.pids.pop(worker, None)
        self._since.pop(worker, None)
        self._since[successor] = time.monotonic()
        still_there = self.actors[successor].still_there.options(concurrency_group="control")
        self.joining[still_there.remote()] = successor

    def end(self, worker: int) -> None:
        """Kill it, if it is there."""
        self.pids.pop(worker, None)
        self._since.pop(worker, None)
        self.joining = {ref: other for ref, other in self.joining.items() if other != worker}
        self.asked = {ref: other for ref, other in self.asked.items() if other != worker}
        self.placing = {ref: other for ref, other in self.placing.items() if other != worker}
        actor = self.actors.pop(worker, None)
        if actor is not None:
            ray.kill(actor)

    def cancel(self, worker: int, call: int) -> None:
        """Tell it that nobody wants the result of a call."""
        if worker in self.actors:
            self.actors[worker].cancel.options(concurrency_group="control").remote(call)

    def ask(self, worker: int) -> None:
        """For a sign of life, which an actor gives while it computes."""
        if worker in self.actors:
            self.asked[self.actors[worker].still_there.options(concurrency_group="control").remote()] = worker

    def admit(self, worker: int, pid: int, node: str, host: str, proof: str) -> Joined | Lost:
        """Let a worker in that computes what those before it did; another is refused, or stops a run not yet begun."""
        self.proof = self.proof or proof
        if proof != self.proof and not self.mixed_devices:
            text = (
                f"worker {worker} ({proof}) does not compute the same bits as those before it ({self.proof}): use "
                "equal machines, packages and data, or set fleet.mixed_devices=true"
            )
            if not self.proved:
                raise InputError(text)
            self.end(worker)
            return Lost(worker, text, node=node)
        self.pids[worker] = pid
        return Joined(worker, node, host)

    def lost(self, worker: int, error: RayError) -> Lost:
        """End a worker that cannot be trusted any more."""
        self.end(worker)
        if isinstance(error, RayActorError) and error.actor_init_failed:
            raise RuntimeError(f"worker {worker} could not be started: {str(error).splitlines()[-1]}") from error
        kind, lines = kind_of(error), [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        told = lines[-1].partition("Some common causes")[0].rpartition("Worker exit detail: ")[2].strip()
        if kind == "out of memory":
            told = lines[0].rpartition("low on memory. ")[2]  # how much, on which node
        return Lost(worker, f"{type(error).__name__}: {told}", kind)

    def shortage(self) -> str:
        """What the workers that have not joined are waiting for."""
        wanted = {"CPU": self._resources.cpus, "GPU": self._resources.gpus, **self._resources.custom}
        if not any(wanted.values()):
            return "the others are being started"
        free, there = ray.available_resources(), ray.cluster_resources()
        asks = " and ".join(f"{amount:g} {name}" for name, amount in wanted.items() if amount)
        has = ", ".join(f"{free.get(n, 0):g} of {there.get(n, 0):g} {n}" for n, amount in wanted.items() if amount)
        return f"each asks for {asks}, and the cluster has {has} free"

    def close(self) -> None:
        """End all."""
        for worker in list(self.actors):
            self.end(worker)


def kind_of(error: RayError) -> Kind:
    """What became of a worker whose call failed."""
    if isinstance(error, RayTaskError):
        return "error"
    if isinstance(error, OutOfMemoryError) or "running low on memory" in str(error):
        return "out of memory"
    return "unavailable" if isinstance(error, ActorUnavailableError) else "died"


def alive_nodes() -> frozenset[str]:
    """Ids of the cluster's nodes."""
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def draining_nodes() -> frozenset[str]:
    """Ids of the nodes that will be taken away. There is no public call for it; Ray's own libraries use this one."""
    return frozenset(state.get_draining_nodes())
