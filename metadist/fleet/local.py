"""The executor in one process, under a virtual clock: the same fleet, actors and results, without Ray.

Workers take turns in this process, so more of them are not faster; they exist so that a run can be repeated without a
cluster, and so that whatever can happen to one can be scripted, and tested in milliseconds.
"""

import heapq
import itertools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import inf
from typing import Any, Literal, NamedTuple
from weakref import WeakSet

from metadist.core.garbage import look_as_usual
from metadist.core.messages import Weights
from metadist.fleet.actors import Bundle, Ready, WorkerActor
from metadist.fleet.dispatch import Fleet
from metadist.fleet.executor import Failure
from metadist.fleet.server import Shard, server_proof

SPAWN_S, CHUNK_S, ANSWER_S = 1.0, 1.0, 0.01  # virtual seconds that things take
LEAVE_S, CUT_S, LATE_S = 5.0, 25.0, 3.0  # and that faults last
SLOW = 40.0  # times as long
IDLE_S = 10.0  # the longest step of the clock where nothing is due
NODES = ("a", "b", "c")

Kind = Literal[
    "kill", "hang", "unreachable", "cut", "slow", "lose", "repeat", "late weights", "drain", "node", "target",
    "server", "server before", "server after", "results", "weights",
]  # fmt: skip


class Fault(NamedTuple):
    """Something scripted, at a virtual time.

    To a worker: kill; hang (it answers no more); unreachable (its calls fail on the way, the worker is well); cut
    (nothing of it arrives for some seconds); slow; lose (the next result never comes), repeat (a call is carried out
    twice), late weights (they arrive after the call that needs them next). To the node of that number: drain (its
    workers are killed some seconds later), node (its workers are killed now, and the results it holds are lost). To the
    fleet: target (that many workers from then on). To the shard of that number: server (it dies now), server before,
    server after (it dies when theta is to move, before or after that). To the server's next call that takes results:
    results (they are lost). To all weights that there are: weights (they are lost).
    """

    at_s: float
    kind: Kind
    number: int = 0


@dataclass(eq=False, slots=True, weakref_slot=True)
class Ref:
    """Stands for an object in this process, once there is one, and says on which node it would be."""

    node: str = ""
    value: Any = None
    there: bool = False


@dataclass(eq=False)
class Actor:
    """A plain object that is called as an actor is: one call after another, by the virtual clock."""

    thing: WorkerActor | Shard
    number: int
    node: str = ""
    alive: bool = True
    free_at: float = 0.0
    cut_until: float = 0.0
    trouble: str = ""
    calls: dict["Call", None] = field(default_factory=dict)
    """Under way, in order."""
    waiting: list["Call"] = field(default_factory=list)
    """Of these, those that wait for weights."""
    last_method: str = ""


@dataclass(eq=False, slots=True)
class Call:
    """A call under way, which takes so long once it has begun; `bundle`: it is to compute something."""

    actor: Actor
    method: str
    arguments: tuple[Any, ...]
    refs: list[Ref]
    takes_s: float = 0.0
    outcome: tuple[Any] | None = None

    @property
    def bundle(self) -> Bundle:
        return self.arguments[2] if self.method in ("meta_gradients", "evaluate") else ()


class WeightsMissing(Exception):
    """A call cannot go on before the one that brings its weights."""


class LocalWorkerActor(WorkerActor):
    """A worker actor without threads, that shares its worker with the others."""

    def __init__(self, make_worker: Callable[[], Any], node: str, proof: Callable[[], str]):
        super().__init__(make_worker, None)
        self._node, self._proof, self._map = node, proof, map

    def ready(self) -> Ready:
        self._worker = self._make_worker()
        self._ready = Ready(os.getpid(), self._node, self._node, self._proof())
        return self._ready

    def _wait_until(self, holds: Callable[[], bool]) -> None:
        if not holds():
            raise WeightsMissing


class LocalExecutor:
    """Runs actors as plain objects: a worker's call is carried out when its virtual time has come, that
    of a shard at once."""

    def __init__(self, make_worker: Callable[[], Any], faults: Sequence[Fault] = ()):
        self.happened: Counter[str] = Counter()
        """How often each kind of fault did something."""
        self.resize: Callable[[int], None] = lambda target: None
        """What a scripted change of the target calls."""
        self.wakes_in: Callable[[float], float | None] = lambda now: None
        """For how long, from a time on, nothing matters but what is scripted or under way."""
        self._worker, self._proof = cache(make_worker), cache(lambda: self._worker().proof())
        self._time = 0.0
        self._order = itertools.count()
        self._due: list[tuple[float, int, Call | Fault]] = []
        self._workers: dict[int, Actor] = {}
        self._shards: list[Actor] = []
        self._server_faults: list[Fault] = []
        self._draining: frozenset[str] = frozenset()
        self._objects: WeakSet[Ref] = WeakSet()
        for fault in faults:
            self._schedule(fault.at_s, fault)

    def now(self) -> float:
        return self._time

    def check(self) -> None:
        """There is no head."""

    def draining(self) -> frozenset[str]:
        return self._draining

    def shortage(self, unplaced: int, building: int, silent: int, joined: int = 0) -> str:
        del joined
        starting = unplaced + building
        return f"{starting} being started" if starting else f"{silent} not answering, or about to be replaced"

    def start_worker(self, worker: int, avoid: frozenset[str]) -> Actor:
        """On a node that is not to be avoided; while there is none, it waits."""
        nodes = [node for node in NODES if node not in avoid | self._draining]
        node = nodes[worker % len(nodes)] if nodes else ""
        self._workers[worker] = Actor(LocalWorkerActor(self._worker, node, self._proof), worker, node)
        return self._workers[worker]

    def start_shards(self, arguments: Sequence[tuple[Any, ...]]) -> list[Actor]:
        self._shards = [Actor(Shard(*each), number) for number, each in enumerate(arguments)]
        return self._shards

    def call(self, actor: Actor, method: str, *arguments: Any, returns: int = 1, control: bool = False) -> list[Ref]:
        call = Call(actor, method, arguments, [Ref(actor.node) for _ in range(returns)])
        self._objects.update(call.refs)
        if not actor.alive:
            self._fail(call, "died")
        elif isinstance(actor.thing, Shard):
            self._carry_out_on_server(call)
        elif call.bundle and actor.trouble == "unreachable":
            self._strike(actor)
            self._fail(call, "unavailable")
        elif actor.node:
            actor.calls[call] = None
            self._schedule(self._begins_at(call, control), call)
        return call.refs

    def wait(self, refs: Sequence[Ref], longest_s: float) -> list[Ref]:
        """Where nothing is due within `longest_s`, the clock is put forward to when something is, or matters."""
        until = self._time + longest_s
        while not (done := [ref for ref in refs if ref.there]) and longest_s:
            next_s = self._due[0][0] if self._due else inf
            if next_s > until:
                wakes_s = self.wakes_in(self._time)
                until = max(until, self._time + (IDLE_S if wakes_s is None else wakes_s))
            if next_s > until:
                self._time = until
                break
            self._time, due = max(self._time, next_s), heapq.heappop(self._due)[2]
            if isinstance(due, Fault):
                self._happen(due)
                break
            self._go_on(due)
        return done

    def get(self, refs: Sequence[Ref]) -> list[Any]:
        assert all(ref.there for ref in refs), "nothing else can bring it"
        return [ref.value for ref in refs]

    def put(self, value: Any) -> Ref:
        ref = Ref(value=value, there=True)
        self._objects.add(ref)
        return ref

    def end(self, actor: Actor) -> None:
        actor.alive = False
        actor.calls.clear()

    def close(self) -> None:
        """Nothing to end."""

    def _schedule(self, time_s: float, due: Call | Fault) -> None:
        heapq.heappush(self._due, (time_s, next(self._order), due))

    def _begins_at(self, call: Call, control: bool) -> float:
        if not call.bundle:
            return self._time + (ANSWER_S if control else SPAWN_S)
        actor, begins_at, slow = call.actor, max(self._time, call.actor.free_at), call.actor.trouble == "slow"
        self.happened["slow"] += slow
        call.takes_s = CHUNK_S * len(call.bundle) * (SLOW if slow else 1)
        actor.free_at = begins_at + call.takes_s
        if actor.trouble == "late weights" and isinstance(call.arguments[-1], Ref):
            actor.trouble = ""
            return begins_at + LATE_S
        return begins_at

    def _go_on(self, call: Call) -> None:
        """Begin or end a worker's call, now that its time has come, unless something is the matter with the worker."""
        actor = call.actor
        if call not in actor.calls:
            return
        if actor.cut_until > self._time:
            self.happened["cut"] += 1
            self._schedule(actor.cut_until, call)
        elif actor.trouble == "hang" and call.method != "node":
            self.happened["hang"] += 1
        elif call.outcome is None:
            self._begin(call)
        elif actor.trouble == "lose" and call.bundle:
            self._strike(actor)
        else:
            del actor.calls[call]
            self._finish(call, call.outcome[0])

    def _begin(self, call: Call) -> None:
        actor = call.actor
        call.outcome = self._value(call)
        if call.outcome is None:
            actor.waiting.append(call)
            self.happened["late weights"] += 1
            return
        if actor.trouble == "repeat" and call.bundle:
            self._strike(actor)
            call.outcome = self._value(call)
        for waiting in actor.waiting:  # for weights that may have come, or to be cancelled
            self._schedule(self._time, waiting)
        actor.waiting.clear()
        self._schedule(self._time + call.takes_s, call)

    def _value(self, call: Call) -> tuple[Any] | None:
        """What a call returns, or its failure; None where it has to wait for weights."""
        arguments = [each.value if isinstance(each, Ref) else each for each in call.arguments]
        for failure in arguments:
            if isinstance(failure, Failure):
                self.happened[f"lost argument of {call.method}"] += failure.kind == "lost"
                return (failure if failure.kind == "error" else failure._replace(kind="lost"),)
        call.actor.last_method = call.method
        try:
            return (getattr(call.actor.thing, call.method)(*arguments),)
        except WeightsMissing:
            return None
        except Exception as error:
            return (Failure("error", type(error).__name__, error=error),)

    def _finish(self, call: Call, value: Any) -> None:
        several = len(call.refs) > 1 and not isinstance(value, Failure)
        for ref, each in zip(call.refs, value if several else [value] * len(call.refs), strict=True):
            ref.value, ref.there = each, True
        self.happened["cancelled"] += bool(call.bundle) and call.refs[0].value is None

    def _fail(self, call: Call, kind: Literal["died", "unavailable"]) -> None:
        self._finish(call, Failure(kind, "scripted"))

    def _carry_out_on_server(self, call: Call) -> None:
        results = [each for each in call.arguments if isinstance(each, Ref)]
        takes, moves = call.method in ("take", "fold", "apply"), call.method in ("apply", "move")
        for fault in list(self._server_faults):
            here = fault.number % len(self._shards) == call.actor.number
            if fault.kind == "results" and takes and results:
                self._server_faults.remove(fault)
                self._lose(results)
                self.happened["results sent ahead" if call.method == "take" else "results"] += 1
            elif moves and here and call.actor.alive and fault.kind != "results":
                self._server_faults.remove(fault)
                self.happened[fault.kind] += 1
                if fault.kind == "server after":
                    self._value(call)
                self._kill(call.actor)
        if call.actor.alive:
            value = self._value(call)
            assert value is not None
            self._finish(call, value[0])
        else:
            self._fail(call, "died")

    def _happen(self, fault: Fault) -> None:
        worker, node = self._workers.get(fault.number), NODES[fault.number % len(NODES)]
        match fault.kind:
            case "target":
                self.happened["target"] += 1
                self.resize(fault.number)
            case "drain" if self._draining | {node} != set(NODES):  # the last one is left
                self.happened["drain"] += 1
                self._draining |= {node}
                for each in self._on_node(node):
                    self._schedule(self._time + LEAVE_S, Fault(self._time, "kill", each.number))
            case "node":
                for each in self._on_node(node):
                    self._kill(each)
                self.happened["node"] += self._lose([ref for ref in self._objects if ref.node == node])
            case "weights":
                self.happened["weights"] += self._lose([r for r in self._objects if isinstance(r.value, Weights)])
            case "server" if self._shards and (shard := self._shards[fault.number % len(self._shards)]).alive:
                self.happened["server with results" if shard.last_method == "take" else "server"] += 1
                self._kill(shard)
            case "server before" | "server after" | "results":
                self._server_faults.append(fault)
            case "kill" if worker is not None and worker.alive:
                self.happened["kill"] += 1
                self._kill(worker)
            case "cut" if worker is not None:
                worker.cut_until = self._time + CUT_S
            case "unreachable" if worker is not None and (computing := [c for c in worker.calls if c.bundle]):
                self.happened["unreachable"] += 1
                for call in computing:
                    del worker.calls[call]
                    self._fail(call, "unavailable")
            case "hang" | "slow" | "lose" | "repeat" | "late weights" | "unreachable" if worker is not None:
                worker.trouble = fault.kind

    def _strike(self, actor: Actor) -> None:
        """Count what is the matter with a worker, and end it."""
        self.happened[actor.trouble] += 1
        actor.trouble = ""

    def _on_node(self, node: str) -> list[Actor]:
        return [worker for worker in self._workers.values() if worker.node == node and worker.alive]

    def _kill(self, actor: Actor) -> None:
        for call in actor.calls:
            self._fail(call, "died")
        self.end(actor)

    def _lose(self, refs: Sequence[Ref]) -> int:
        """Lose objects; how many of them there were."""
        present = [ref for ref in refs if ref.there and not isinstance(ref.value, Failure)]
        for ref in present:
            ref.value = Failure("lost", "scripted")
        return len(present)


class LocalFleet(Fleet):
    """A fleet in this process; see `LocalExecutor` and `Fleet`, whose `options` are."""

    def __init__(
        self,
        make_worker: Callable[[], Any],
        target: int = 1,
        min_workers: int = 1,
        faults: Sequence[Fault] = (),
        **options: Any,
    ):
        look_as_usual()
        self.local = LocalExecutor(make_worker, faults)
        super().__init__(self.local, target, min_workers, server_proof=server_proof(), **options)
        self.local.resize, self.local.wakes_in = self.resize, self.controller.wakes_in
