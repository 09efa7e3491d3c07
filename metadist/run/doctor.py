"""`metadist doctor`: whether this machine, or each node of a cluster, is fit for runs."""

import json
import os
import re
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from metadist.core.errors import InputError
from metadist.fleet.ray.cluster import check_cluster, connect, disconnect
from metadist.run import machine
from metadist.run.machine import GIB, Finding
from metadist.tracking.reach import unwritable

ANSWER_S, NODES_S, JOB_S = 5.0, 60.0, 180.0
MOST_SKEW_S = 1.0  # signatures of object stores and Slurm's credentials bear minutes and seconds
DOCTOR = "python -m metadist doctor --address auto --json"


def examine(address: str | None = None, mlflow: str | None = None) -> list[Finding]:
    """What is well and what is not, on this machine alone, or on each node of the cluster at `address`: host:port or
    auto, which is joined; or http://..., its job server, where the same command is run as a job. `mlflow`: the tracking
    URI to try, by default MLFLOW_TRACKING_URI."""
    own = [*_mlflow(mlflow), Finding("ok", _versions(machine.versions()), node=socket.gethostname())]
    if address is None:
        return [*own, *machine.examine()]
    try:
        found = _by_job(address.rstrip("/")) if address.startswith(("http://", "https://")) else _by_joining(address)
    except InputError as error:
        found = [Finding("fail", str(error))]
    return [*own, *found]


def _mlflow(uri: str | None) -> Iterator[Finding]:
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        yield Finding("ok", "MLflow: a file beside the run directories (MLFLOW_TRACKING_URI is not set)")
    elif problem := unwritable(uri):
        yield Finding(
            "fail", f"MLflow: {problem}", "start it, correct the address, or train with tracking.mlflow=false"
        )
    else:
        yield Finding("ok", "MLflow can be reached and written to")


def _versions(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


class Examiner:
    """An actor that looks at its node."""

    def examine(self) -> tuple[str, dict[str, str], list[Finding]]:
        """Host, versions and findings."""
        return socket.gethostname(), machine.versions(), machine.examine()

    def clock(self) -> float:
        """Seconds since 1970."""
        return time.time()


def _by_joining(address: str) -> list[Finding]:
    check_cluster(address)  # which `connect` leaves out where this process has joined one already
    joined = connect(address, 0, lambda text: None)
    try:
        return list(_examine_nodes([node for node in ray.nodes() if node["Alive"]]))
    finally:
        if joined:
            disconnect()


def _examine_nodes(nodes: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    yield Finding("ok", f"the cluster has {len(nodes)} node{'s' * (len(nodes) > 1)}")
    actors, asked = {}, {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        examiner: Any = ray.remote(Examiner)
        actor = examiner.options(num_cpus=0, scheduling_strategy=there).remote()
        actors[node["NodeID"]] = actor
        asked[actor.examine.remote()] = node
    done, silent = ray.wait(list(asked), num_returns=len(asked), timeout=NODES_S)
    by_versions: dict[str, list[str]] = defaultdict(list)
    for ref in done:
        node = asked[ref]
        try:
            host, versions, found = ray.get(ref)
        except RayError as error:
            problem = str(error).strip().splitlines()[-1]
            yield Finding(
                "fail", f"no process can be started ({problem})", "install metadist there, as here", _name(node)
            )
            continue
        by_versions[_versions(versions)].append(host)
        yield from found
        yield _object_store(node, host)
        actor = actors[node["NodeID"]]
        yield _skew(host, lambda actor=actor: ray.get(actor.clock.remote(), timeout=ANSWER_S))
    for ref in silent:
        remedy = "look into its raylet.out, or `ray status`"
        yield Finding("fail", f"no answer within {NODES_S:.0f} s", remedy, _name(asked[ref]))
    yield from _compare(by_versions)


def _name(node: dict[str, Any]) -> str:
    return node.get("NodeManagerHostname") or node["NodeManagerAddress"]


def _compare(by_versions: dict[str, list[str]]) -> Iterator[Finding]:
    """Versions of all nodes: equal, or which has which."""
    by_versions.setdefault(_versions(machine.versions()), []).append("here")
    for versions, hosts in by_versions.items():
        alike = len(by_versions) == 1
        remedy = "" if alike else "install the same on every node and here, as by one image: else the bits may differ"
        where = "every node and here" if alike else ", ".join(sorted(set(hosts)))
        yield Finding("ok" if alike else "fail", f"{versions}: {where}", remedy)


def _object_store(node: dict[str, Any], host: str) -> Finding:
    size = node["Resources"].get("object_store_memory", 0)
    return Finding("ok", f"object store of {size / GIB:.2f} GiB", node=host)


def _skew(host: str, clock: Callable[[], float]) -> Finding:
    """A node's clock against this one's, by the quickest of a few calls."""
    measured = []
    for _ in range(5):
        began = time.time()
        there = clock()
        ended = time.time()
        measured.append((ended - began, there - (began + ended) / 2))
    within_s, skew_s = min(measured)
    text = f"clock {skew_s:+.2f} s from here, to within {within_s / 2:.2f} s"
    if abs(skew_s) > MOST_SKEW_S:
        return Finding("warn", text, "set it by NTP (chrony): signatures of S3 and of Slurm need equal clocks", host)
    return Finding("ok", text, node=host)


def _by_job(url: str) -> list[Finding]:
    """What the doctor finds there, run as a job through the job server. Raises InputError."""
    # it imports torch, which the actors that examine nodes, and `doctor` of this machine, do without
    from metadist.run.submission import OVER, check_versions, job_server, submit_when_ready

    server = job_server(url)
    check_versions(server)
    found = [Finding("ok", f"{url} answers: ray {ray.__version__}")]
    job = submit_when_ready(server, entrypoint=DOCTOR)
    logs, deadline = f"ray job logs --address {url} {job}", time.monotonic() + JOB_S
    while (there := server.info(job)) is not None and there.status not in OVER:
        if time.monotonic() > deadline:
            server.stop_job(job)
            return [*found, Finding("fail", f"job {job} did not end within {JOB_S:.0f} s", logs)]
        time.sleep(1)
    return [*found, *_read(server.get_job_logs(job), there.status if there else "lost", logs)]


def _read(logs: str, ended: str, command: str) -> list[Finding]:
    """The findings that the doctor printed there."""
    begins = re.search(r"^.*\[\n  \{", logs, re.MULTILINE)
    if begins:
        found, _ = json.JSONDecoder().raw_decode(logs, begins.end() - len("[\n  {"))
        return [Finding(**each) for each in found]
    lines = [line for line in logs.splitlines() if line.strip()]
    problem = lines[-1] if lines else "it printed nothing"
    remedy = f"install this metadist on the cluster's nodes; all it printed: {command}"
    return [Finding("fail", f"`{DOCTOR}` ended there as {ended}: {problem}", remedy)]
