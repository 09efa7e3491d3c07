"""The executor on Ray: actors on a cluster's nodes, objects in its stores."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from metadist.fleet.dispatch import Fleet
from metadist.fleet.executor import Failure
from metadist.fleet.ray.actors import WorkerActor
from metadist.fleet.ray.cluster import GIVE_UP_S, HeadWatch
from metadist.fleet.server import Shard

ANSWER_S = 600.0  # of an actor that nothing is known of
NODE_LABEL = "ray.io/node-id"  # which Ray gives every node
Ref = ray.ObjectRef


@dataclass(frozen=True)
class Resources:
    """What each worker actor asks of the cluster, and its torch threads (None: it has no torch)."""

    cpus: float = 1
    gpus: float = 0
    threads: int | None = 1
    custom: dict[str, float] = field(default_factory=dict)


class ServerActor(Shard):
    """A shard of the parameter server in a process of its own."""

    def __init__(self, *arguments: Any):
        torch.set_num_threads(1)
        super().__init__(*arguments)


class RayExecutor:
    """Ray must be initialised. `make_worker` makes a `Worker`, or anything with its methods, in the actor's process.
    `say` takes lines about the cluster's head, which is given up after `head_give_up_s` of silence."""

    def __init__(
        self,
        make_worker: Callable[[], Any],
        resources: Resources,
        say: Callable[[str], None],
        head_give_up_s: float = GIVE_UP_S,
    ):
        self.head = HeadWatch(say, head_give_up_s)
        make: Any = ray.remote(concurrency_groups={"control": 1})  # pyright: ignore[reportCallIssue]
        self._worker_actor, self._server_actor = make(WorkerActor), ray.remote(ServerActor)
        self._make_worker = ray.put(make_worker)
        self._resources = resources

    def now(self) -> float:
        return time.monotonic()

    def check(self) -> None:
        self.head.check()

    def draining(self) -> frozenset[str]:
        return self.head.draining

    def shortage(self) -> str:
        if not self.head.answers:
            return "Ray's head does not answer"
        wanted = {"CPU": self._resources.cpus, "GPU": self._resources.gpus, **self._resources.custom}
        if not any(wanted.values()):
            return "the others are being started"
        free, there = ray.available_resources(), ray.cluster_resources()
        asks = " and ".join(f"{amount:g} {name}" for name, amount in wanted.items() if amount)
        has = ", ".join(f"{free.get(n, 0):g} of {there.get(n, 0):g} {n}" for n, amount in wanted.items() if amount)
        return f"each asks for {asks}, and the cluster has {has} free"

    def start_worker(self, worker: int, avoid: frozenset[str]) -> Any:
        wanted, elsewhere = self._resources, None
        if avoid and self.head.answers:
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            if alive - avoid and alive & avoid:
                elsewhere = {NODE_LABEL: f"!in({','.join(sorted(alive & avoid))})"}
        remote = self._worker_actor.options(
            num_cpus=wanted.cpus,
            num_gpus=wanted.gpus,
            resources=wanted.custom,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=2,  # a bundle waits in the actor for the one before it
            label_selector=elsewhere,
        )
        return remote.remote(self._make_worker, wanted.threads)

    def start_shards(self, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """One on the driver's node, without which there is no run; several spread over the cluster."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        where: Any = "SPREAD" if len(arguments) > 1 else here
        remote = self._server_actor.options(num_cpus=0, max_restarts=0, scheduling_strategy=where)
        return [remote.remote(*each) for each in arguments]

    def call(self, actor: Any, method: str, *arguments: Any, returns: int = 1, control: bool = False) -> list[Ref]:
        options: dict[str, Any] = {"concurrency_group": "control"} if control else {}
        refs = getattr(actor, method).options(num_returns=returns, **options).remote(*arguments)
        return [refs] if returns == 1 else refs

    def wait(self, refs: Sequence[Ref], longest_s: float) -> list[Ref]:
        """Objects stay where they are."""
        if not refs:
            time.sleep(longest_s)
            return []
        done, rest = ray.wait(list(refs), num_returns=1, timeout=longest_s, fetch_local=False)
        if done and rest:
            done += ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]
        return done

    def get(self, refs: Sequence[Ref]) -> list[Any]:
        try:
            return ray.get(list(refs), timeout=ANSWER_S)
        except RayError as raised:
            failure = failure_of(raised)
            late = isinstance(raised, GetTimeoutError)
        return [failure] * len(refs) if late or len(refs) == 1 else [value for ref in refs for value in self.get([ref])]

    def put(self, value: Any) -> Ref:
        return ray.put(value)

    def end(self, actor: Any) -> None:
        ray.kill(actor)

    def close(self) -> None:
        self.head.close()


class RayFleet(Fleet):
    """A fleet on a Ray cluster; see `RayExecutor` and `Fleet`, whose `options` are."""

    def __init__(
        self,
        make_worker: Callable[[], Any],
        target: int,
        min_workers: int = 1,
        resources: Resources = Resources(),  # noqa: B008
        say: Callable[[str], None] = lambda text: None,
        head_give_up_s: float = GIVE_UP_S,
        **options: Any,
    ):
        executor = RayExecutor(make_worker, resources, say, head_give_up_s)
        self._head = executor.head
        super().__init__(executor, target, min_workers, say=say, **options)

    @property
    def head_lost(self) -> bool:
        """Whether the head of the cluster has been given up: then Ray ends this process before long."""
        return self._head.lost


def failure_of(error: RayError) -> Failure:
    """What an error of Ray means. Without its traceback, which is in a cycle with the frames of `ray.get` that holds
    whatever their callers held, such as references to the gradients of a step, until Python looks for cycles."""
    error, name = error.with_traceback(None), type(error).__name__
    if isinstance(error, RayTaskError):
        cause = error.cause if isinstance(error.cause, Exception) else error
        if isinstance(cause, RayError) and cause is not error:  # of an argument
            return Failure("lost", type(cause).__name__)
        cause.__cause__ = None if cause is error else error
        return Failure("error", name, _last_line(error), cause)
    if isinstance(error, ObjectLostError):
        return Failure("lost", name)
    if isinstance(error, GetTimeoutError):
        return Failure("died", f"no answer within {ANSWER_S:g} s")
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return Failure("error", name, "", RuntimeError(f"an actor could not be started: {_last_line(error)}"))
    details = _last_line(error).partition("Some common causes")[0].rpartition("Worker exit detail: ")[2].strip()
    if isinstance(error, OutOfMemoryError) or "running low on memory" in str(error):
        how_much_and_where = str(error).strip().splitlines()[0].rpartition("low on memory. ")[2]
        return Failure("out of memory", name, how_much_and_where.strip())
    return Failure("unavailable" if isinstance(error, ActorUnavailableError) else "died", name, details)


def _last_line(error: Exception) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
