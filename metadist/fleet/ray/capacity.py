"""What a Ray cluster has for workers, whether it can grow, and why workers have not joined yet."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
from ray._private import worker as ray_worker
from ray._private.state import available_resources_per_node
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # pyright: ignore[reportAttributeAccessIssue]

from metadist.core.errors import InputError

NODES_WAIT_S = 30.0  # at the start of a run: nodes that begin with it, as those of a Slurm job, join meanwhile
ANSWER_S = 3.0  # of the head
SETTINGS = {"CPU": "fleet.cpus_per_worker", "GPU": "fleet.gpus_per_worker"}
Amounts = Mapping[str, float]


@dataclass(frozen=True)
class Resources:
    """What each worker actor asks of the cluster, and its torch threads (None: it has no torch)."""

    cpus: float = 1
    gpus: float = 0
    threads: int | None = 1
    custom: dict[str, float] = field(default_factory=dict)

    @property
    def asked(self) -> dict[str, float]:
        """The amounts by Ray's names, without those that are 0."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, **self.custom}
        return {name: amount for name, amount in wanted.items() if amount}


class Autoscaler(NamedTuple):
    """What the autoscaler of a cluster says: how many nodes it is starting, why it could not start one, if so, and the
    requests that no type of node can hold."""

    num_starting: int
    failure: str
    infeasible: Sequence[Amounts]


def warn(wanted: Resources, say: Callable[[str], None]) -> None:
    """Say where no node of a cluster that was joined could hold a worker, and no autoscaler would start another."""
    if (problem := misfit(wanted.asked, _totals())) and find_autoscaler() is None:
        say(f"{problem}: waiting up to {NODES_WAIT_S:.0f} s for a node that has")


def announce(target: int, wanted: Resources, started: bool, say: Callable[[str], None], deadline: float = 0.0) -> None:
    """Say what the cluster has and the workers ask for. `started`: it was started on this machine by this run.

    Raises InputError where no node can hold a worker, and nobody would start another: no autoscaler runs. A cluster
    that was joined has until `deadline` (of time.monotonic) to get such a node, see `warn`.
    """
    asked, autoscaler = wanted.asked, None if started else find_autoscaler()
    problem = misfit(asked, _totals())
    while problem and not (started or autoscaler) and time.monotonic() < deadline:
        time.sleep(0.5)
        problem = misfit(asked, _totals())
    if problem and autoscaler is None:
        settings = " or ".join(SETTINGS.get(name, "fleet.resources") for name in asked)
        where = "give fleet.address of a cluster that has it" if started else "start such a node"
        raise InputError(f"{problem}: lower {settings}, or {where} (no autoscaler runs here that would)")
    nodes, ask = _totals(), words(asked)
    has = f"{_count(len(nodes), 'node')} with {_sum(nodes, 'CPU'):g} CPUs, {_sum(nodes, 'GPU'):g} GPUs"
    asks = f"{_count(target, 'worker')} {'asks' if target == 1 else 'ask'} for {ask}{' each' * (target > 1)}"
    free = nodes if started else available_resources_per_node().values()
    room = _room(asked, target, free)
    doing = "starting " + ("it" if target == 1 else "them")
    if room < target:
        more = "the autoscaler is asked for more nodes" if autoscaler else "waiting for room for the others"
        doing = f"room for {room} now, {more}"
    say(f"{'the Ray of this run' if started else 'the cluster'} has {has}; {asks}: {doing}")


def why_missing(wanted: Resources, unplaced: int, building: int, silent: int, joined: int | None = None) -> str:
    """Why workers have not joined: so many have no place to run yet, are being built, do not answer. `joined`: those
    that have, where what is taken may be so by workers alone, as nobody else uses this Ray, or none has been missing
    for long: if the nodes can hold all of them, those without a place are being started."""
    count = unplaced + building + (joined or 0)
    if joined is not None and _room(wanted.asked, count, _totals()) == count:
        unplaced, building = 0, unplaced + building
    room, waiting = _why_waiting(wanted.asked, unplaced) if unplaced else (0, "")
    causes = [f"{building + room} being started"] if building + room else []
    if silent:
        causes.append(f"{silent} not answering, or about to be replaced")
    return ", ".join([*causes, waiting] if waiting else causes)


def _why_waiting(asked: Amounts, waiting: int) -> tuple[int, str]:
    """For how many of those that have no place there is room, and why the others wait."""
    nodes, autoscaler = _totals(), find_autoscaler()
    if problem := misfit(asked, nodes):
        if autoscaler is None:
            return 0, f"{problem}: waiting for a node that has"
        if any(_includes(request, asked) for request in autoscaler.infeasible):
            return 0, f"{problem}, and no type of node that the autoscaler can start has"
        return 0, f"{problem}: {_growth(autoscaler)}"
    room = _room(asked, waiting, available_resources_per_node().values())
    if room == waiting:
        return room, ""
    free = available_resources_per_node().values()
    has = " and ".join(f"{_sum(free, name):g} of {_sum(nodes, name):g} {name}" for name in asked)
    full = f"{waiting - room} for want of room: each asks for {words(asked)}, and the cluster has {has} free"
    return room, f"{full}; {_growth(autoscaler)}" if autoscaler else full


def _growth(autoscaler: Autoscaler) -> str:
    if autoscaler.num_starting:
        return f"the autoscaler is starting {_count(autoscaler.num_starting, 'node')}"
    if autoscaler.failure:
        return f"the autoscaler could not start a node ({autoscaler.failure})"
    return "the autoscaler is asked for more nodes, and may have as many as it is allowed (`ray status` tells)"


def misfit(asked: Amounts, nodes: Sequence[Amounts]) -> str:
    """Why no node could hold a worker even if it were empty; nothing where one could."""
    if any(_includes(node, asked) for node in nodes) or not asked:
        return ""
    largest = {name: max((node.get(name, 0) for node in nodes), default=0) for name in asked}
    lacking = {name: most for name, most in largest.items() if most < asked[name]}
    has = f"the largest node has {words(lacking)}" if lacking else "no node has all of that"
    return f"each worker asks for {words(asked)} and {has}"


def words(amounts: Amounts) -> str:
    """Amounts of resources, as "4 CPU and 1 GPU"."""
    return " and ".join(f"{amount:g} {name}" for name, amount in amounts.items()) or "nothing"


def find_autoscaler() -> Autoscaler | None:
    """The autoscaler that can start nodes of this cluster; None where there is none. Raises Ray's RpcError where the
    head does not answer within seconds.

    Without one Ray runs a monitor that calls every node a type of its own, `node_<id>`.
    """
    worker: Any = ray_worker.global_worker
    client = worker.gcs_client  # a new one would try for long to reach a head that hangs
    reply = GetClusterStatusReply()
    reply.ParseFromString(client.get_cluster_status(timeout_s=ANSWER_S))
    if reply.HasField("autoscaling_state"):
        found = reply.autoscaling_state
        starting = sum(each.count for each in found.pending_instance_requests) + len(found.pending_instances)
        failures = [each.reason for each in found.failed_instance_requests]
        infeasible = [dict(each.resources_bundle) for each in found.infeasible_resource_requests]
        return Autoscaler(starting, failures[-1] if failures else "", infeasible)
    status = client.internal_kv_get(b"__autoscaling_status", None, timeout=ANSWER_S)  # that of version 1
    report = json.loads(status or b"{}").get("autoscaler_report") or {}
    types = {**report.get("active_nodes", {}), **(report.get("idle_nodes") or {}), **report.get("pending_launches", {})}
    if not any(not name.startswith("node_") for name in types):
        return None
    return Autoscaler(len(report.get("pending_nodes", [])) + sum(report.get("pending_launches", {}).values()), "", [])


def _includes(larger: Amounts, smaller: Amounts) -> bool:
    return all(larger.get(name, 0) >= amount for name, amount in smaller.items())


def _totals() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _room(asked: Amounts, most: int, nodes: Iterable[Amounts]) -> int:
    """For how many workers nodes with so much have room, as far as `most`."""
    room = 0
    for free in nodes:
        room += int(min((free.get(name, 0) / amount for name, amount in asked.items()), default=most) + 1e-9)
    return min(room, most)


def _sum(nodes: Iterable[Amounts], name: str) -> float:
    return sum(node.get(name, 0) for node in nodes)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
