"""The executor on Ray: actors on a cluster's nodes, objects in its stores."""

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import ray
import torch
from ray.exceptions import (
    ActorAlreadyExistsError,
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from metadist.core.garbage import look_as_usual
from metadist.fleet.dispatch import Fleet
from metadist.fleet.executor import Failure
from metadist.fleet.ray.actors import WorkerActor, print_start, prints_errors
from metadist.fleet.ray.capacity import Resources, why_missing
from metadist.fleet.ray.cluster import GIVE_UP_S, NAMESPACE, SLIVER, HeadWatch
from metadist.fleet.ray.metrics import RunMetrics
from metadist.fleet.server import Shard, Stats

ANSWER_S = 600.0  # of an actor that nothing is known of
STARTING_S = 30.0  # that workers' processes may take to start on a busy node
NODE_LABEL = "ray.io/node-id"  # which Ray gives every node
Ref = ray.ObjectRef


@prints_errors
class ServerActor(Shard):
    """A shard of the parameter server in a process of its own."""

    def __init__(self, *arguments: Any):
        torch.set_num_threads(1)
        print_start("parameter server")
        super().__init__(*arguments)


class RayExecutor:
    """Ray must be initialised. `make_worker` makes a `Worker`, or anything with its methods, in the actor's process.
    `say` takes lines about the cluster's head, which is given up after `head_give_up_s` of silence. `run`: the actors
    are named for it, such as `digits-worker-3`. `alone`: nobody else uses this Ray. `begun`: workers' actors that have
    been started already, see `begin_workers`."""

    def __init__(
        self,
        make_worker: Callable[[], Any],
        resources: Resources,
        say: Callable[[str], None],
        head_give_up_s: float = GIVE_UP_S,
        run: str = "",
        alone: bool = False,
        begun: Sequence[Any] = (),
    ):
        self.head = HeadWatch(say, head_give_up_s)
        self._run, self._alone, self._begun = run, alone, list(begun)
        self._server_actor = ray.remote(ServerActor)
        self._make_worker = cache(lambda: ray.put(make_worker))
        self._resources = resources
        self._shortage = ((0, 0), self.now())  # (workers without a place, workers that have joined), since when

    def now(self) -> float:
        return time.monotonic()

    def check(self) -> None:
        self.head.check()

    def draining(self) -> frozenset[str]:
        return self.head.draining

    def shortage(self, unplaced: int, building: int, silent: int, joined: int = 0) -> str:
        if self.head.ask():
            with suppress(RayError):  # it has stopped answering meanwhile
                own = self._alone or self._is_new((unplaced, joined))
                return why_missing(self._resources, unplaced, building, silent, joined if own else None)
        return "Ray's head does not answer"

    def _is_new(self, shortage: tuple[int, int]) -> bool:
        """Whether it has been so for less time than the start of a worker's process may take, as far as it was asked
        about."""
        if shortage != self._shortage[0]:
            self._shortage = shortage, self.now()
        return self.now() - self._shortage[1] < STARTING_S

    def start_worker(self, worker: int, avoid: frozenset[str]) -> Any:
        if self._begun:
            return self._begun.pop(0)
        elsewhere = None
        if avoid and self.head.answers:
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            if alive - avoid and alive & avoid:
                elsewhere = {NODE_LABEL: f"!in({','.join(sorted(alive & avoid))})"}
        return start_worker(self._make_worker(), self._resources, self._named(f"worker-{worker}"), elsewhere)

    def start_shards(self, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """One on the driver's node, without which there is no run; several spread over the cluster."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        where: Any = "SPREAD" if len(arguments) > 1 else here
        options = {"num_cpus": 0, "memory": SLIVER, "scheduling_strategy": where}
        names = ["server"] if len(arguments) == 1 else [f"server-{number}" for number in range(len(arguments))]
        return [
            start(self._server_actor, self._named(name), options, *each)
            for name, each in zip(names, arguments, strict=True)
        ]

    def _named(self, name: str) -> str:
        """Under the run's name; none where the head does not answer: the call would wait for it."""
        return f"{self._run}-{name}" if self._run and self.head.ask() else ""

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


def start(actor: Any, name: str, options: dict[str, Any], *arguments: Any) -> Any:
    """Start an actor under a name, with something added where another actor has that name: of another run that is
    called the same, or of this one before it was resumed. "": without a name."""
    options = {**options, "max_restarts": 0}
    if not name:
        return actor.options(**options).remote(*arguments)
    while True:
        try:
            return actor.options(**options, name=name, namespace=NAMESPACE).remote(*arguments)
        except ActorAlreadyExistsError:
            name = f"{name}-{secrets.token_hex(2)}"


def start_worker(make_worker: Ref, wanted: Resources, name: str, elsewhere: dict[str, str] | None = None) -> Any:
    """A worker's actor, on a node whose labels are as `elsewhere` says."""
    options = {
        "num_cpus": wanted.cpus,
        "num_gpus": wanted.gpus,
        "memory": None if wanted.asked else SLIVER,
        "resources": wanted.custom,
        "max_task_retries": 0,
        "max_concurrency": 2,  # a bundle waits in the actor for the one before it
        "label_selector": elsewhere,
    }
    make: Any = ray.remote(concurrency_groups={"control": 1})  # pyright: ignore[reportCallIssue]
    return start(make(WorkerActor), name, options, make_worker, wanted.threads)


def begin_workers(make_worker: Callable[[], Any], resources: Resources, run: str, count: int) -> list[Any]:
    """The first workers' actors of a run, whose processes import what they need while it is still being prepared."""
    made = ray.put(make_worker)
    return [start_worker(made, resources, f"{run}-worker-{number}") for number in range(count)]


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
        run: str = "",
        alone: bool = False,
        begun: Sequence[Any] = (),
        **options: Any,
    ):
        look_as_usual()
        executor = RayExecutor(make_worker, resources, say, head_give_up_s, run, alone, begun)
        self._head, self._metrics = executor.head, RunMetrics(run) if run else None
        super().__init__(executor, target, min_workers, say=say, **options)

    def report(self, stats: Stats, seconds: float) -> None:
        """Among the metrics of Ray."""
        if self._metrics is None:
            return
        own = self.controller
        self._metrics.step(stats, seconds, self.num_workers, self.target, own.num_copies, own.num_lost)

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
