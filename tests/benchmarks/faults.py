"""Everything that can die, on real Ray: `python tests/benchmarks/faults.py [FAULT ...]`.

Several logical nodes on this machine, each with a logical GPU. A short run on the real digits is disturbed in the
middle of a meta-step, once for each kind of fault; it must end with the hash of the undisturbed run. Prints a table:
how long a step took before the fault, at most after it, and until there were as many workers again; ends with 1 if a
hash differs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

JOB = [
    "data.family=digits", "task.ways=3", "task.shots=1", "task.queries=5", "model.name=conv4", "model.channels=52",
    "model.pool=false", "meta_batch_size=24", "engine.chunk_size=2", "meta_steps=60", "num_workers=2",
    "evaluation.every=0", "evaluation.test_tasks=4", "evaluation.baselines=[]", "checkpoint.every=8",
    "tracking.mlflow=false", "engine.device=cpu", "fleet.gpus_per_worker=1",
]  # fmt: skip
HIT = 8  # the step that is disturbed
SOON = {  # so that a node that was killed counts as dead within a second or two, not after ten
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 1500,
    "health_check_failure_threshold": 3,
}  # fmt: skip
RPC_FAILURES = {
    "CoreWorkerService.grpc_client.PushTask": {
        "num_failures": 30, "req_failure_prob": 3, "resp_failure_prob": 3, "in_flight_failure_prob": 3,
    }
}  # fmt: skip


@dataclass
class Stage:
    """A cluster with a fleet on it, and what a fault needs to get at."""

    cluster: Any
    nodes: list[Any]
    fleet: Any = None
    later: list[Callable[[], None]] = field(default_factory=list)

    def take_node(self) -> Any:
        """One on which a worker is, but not the driver, without whose node there is no run."""
        import ray

        used = {member.node for member in self.fleet.controller.working.values()}
        used.discard(ray.get_runtime_context().get_node_id())
        node = next(node for node in self.nodes if node.node_id in used)
        self.nodes.remove(node)
        return node


def kill_worker(stage: Stage) -> None:
    os.kill(next(iter(stage.fleet.pids.values())), signal.SIGKILL)


def stop_worker(stage: Stage) -> None:
    """It does not die; it just does not go on for a while."""
    pid = next(iter(stage.fleet.pids.values()))
    os.kill(pid, signal.SIGSTOP)
    stage.later.append(lambda: wake(pid))


def wake(pid: int) -> None:
    with suppress(ProcessLookupError):  # on a busy machine it has been replaced, for not answering
        os.kill(pid, signal.SIGCONT)


def kill_server(stage: Stage) -> None:
    os.kill(stage.fleet.server_pids()[0], signal.SIGKILL)


def kill_node(stage: Stage) -> None:
    stage.cluster.remove_node(stage.take_node(), allow_graceful=False)


def remove_node(stage: Stage) -> None:
    stage.cluster.remove_node(stage.take_node(), allow_graceful=True)


def drain_node(stage: Stage) -> None:
    """With notice: marked as draining, its processes gone three seconds later."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    node = stage.take_node()
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + 3) * 1000)
    accepted, why = GcsClient(stage.cluster.address).drain_node(node.node_id, reason, "spot", deadline_ms)
    assert accepted, why
    timer = threading.Timer(8, lambda: stage.cluster.remove_node(node, allow_graceful=False))
    timer.start()
    stage.later.append(timer.join)


def add_node(stage: Stage) -> None:
    """And a worker more than there is room for otherwise. By a process of its own: Ray wants a main thread for that."""
    stage.fleet.resize(4)
    command = [str(Path(sys.executable).parent / "ray"), "start", f"--address={stage.cluster.address}"]
    subprocess.run([*command, "--num-cpus=1", "--num-gpus=1"], check=True, stdout=subprocess.DEVNULL)


@dataclass(frozen=True)
class Fault:
    """What is done, what the fleet must say about it (if anything), whether it is done when a step's results have come
    and before they are added up, and on how many servers and with which delay the run is."""

    strike: Callable[[Stage], None]
    said: str = ""
    late: bool = False
    servers: int = 1
    lag: int = 0


FAULTS = {
    "worker process killed": Fault(kill_worker, "was lost"),
    "worker stopped for a while": Fault(stop_worker),
    "node killed": Fault(kill_node, "was lost"),
    "node killed, with results of a step": Fault(kill_node, "meta-step", late=True, servers=2, lag=1),
    "node removed gracefully": Fault(remove_node),
    "node drained, then taken away": Fault(drain_node, "being taken away"),
    "node added": Fault(add_node),
    "server killed": Fault(kill_server, "server was lost"),
}
OWN = ("driver killed, resumed", "RPC failures")


@contextmanager
def stage_of(workers: int) -> Iterator[Stage]:
    """A head without room for workers, and a node for each worker and one to spare."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 200 * 2**20, "_system_config": SOON}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = [cluster.add_node(num_cpus=1, num_gpus=1, wait=False) for _ in range(workers + 1)]
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield Stage(cluster, nodes)
    finally:
        ray.shutdown()
        cluster.shutdown()


def prepared_job() -> tuple[Any, Any]:
    from metadist.config import load_config
    from metadist.fleet.worker import set_up_process
    from metadist.run.build import Job
    from metadist.run.prepare import prepare

    config = load_config([], JOB)
    set_up_process(config.fleet.threads_per_worker)
    return config, prepare(Job(config), [])


def train(
    fleet: Any, config: Any, prepared: Any, lag: int, before: Callable[[int, bool], None]
) -> tuple[str, list[float], list[float]]:
    """The run's hash, and when each step began and ended. `before(step, late)` is called before its tasks are dealt,
    and before its results are added up."""
    from metadist.checkpoint.format import theta_sha256
    from metadist.core.messages import plan
    from metadist.fleet.dispatch import Ahead
    from metadist.run.build import Job

    server = fleet.start_server(prepared.theta, Job(config).optimization(prepared.engine), None, lag=lag)
    began, ended = [], []
    tasks = [plan("train", step, 24, 2) for step in range(config.meta_steps)]
    for step in range(config.meta_steps):
        began.append(time.monotonic())
        before(step, False)
        ahead = Ahead(server.weights(), tasks[step + 1 : step + 2]) if lag and step + 1 < len(tasks) else None
        gradients = fleet.meta_gradients(server.used(), tasks[step], ahead)
        before(step, True)
        server.apply(step, *gradients, num_tasks=24)
        ended.append(time.monotonic())
    return theta_sha256(fleet.fetch(server.weights()).theta), began, ended


def undisturbed(lag: int) -> str:
    """By one worker in this process."""
    from metadist.fleet.local import LocalFleet
    from metadist.run.build import Job

    config, prepared = prepared_job()
    return train(LocalFleet(Job(config).worker_factory({})), config, prepared, lag, lambda step, late: None)[0]


def disturbed(name: str) -> dict[str, Any]:
    """A run through Ray with one fault in the middle of step HIT, or at its end."""
    from metadist.fleet.ray.fleet import RayFleet, Resources
    from metadist.run.build import Job

    (config, prepared), fault, said = prepared_job(), FAULTS[name], list[str]()
    with stage_of(2) as stage, ThreadPoolExecutor(1) as thread:
        stage.fleet = RayFleet(
            Job(config).worker_factory({}), 2, resources=Resources(1, 1, 1), say=said.append, servers=fault.servers
        )
        full: list[float] = []
        struck: list[Future[float]] = []

        def strike(after_s: float) -> float:
            time.sleep(after_s)
            at = time.monotonic()
            fault.strike(stage)
            return at

        def before(step: int, late: bool) -> None:
            if step == HIT and late == fault.late:
                struck.append(thread.submit(strike, 0.05))
                if late or name == "node added":
                    struck[0].result()
            missing = len(stage.fleet.controller.working) < stage.fleet.target
            if missing:
                full.clear()
            elif struck and not full:
                full.append(time.monotonic())

        theta, began, ended = train(stage.fleet, config, prepared, fault.lag, before)
        for act in stage.later:
            act()
        stage.fleet.close()
    assert any(fault.said in line for line in ["", *said]), f"{name}: nothing was said of it, but {said}"
    usual = median(end - start for start, end in zip(began[2:HIT], ended[2:HIT], strict=True))
    slowest = max(end - start for start, end in zip(began[HIT:], ended[HIT:], strict=True))
    full_s = full[0] - struck[0].result() if full else float("nan")
    return {"theta": theta, "usual_s": usual, "slowest_s": slowest, "full_s": full_s, "said": said}


def driver_killed() -> dict[str, Any]:
    """`metadist train` killed in the middle, and the same command again."""
    with stage_of(2) as stage, tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "metadist", "train", *JOB, f"run_dir={run_dir}",
                   f"fleet.address={stage.cluster.address}", "--resume", "auto", "-q"]  # fmt: skip
        first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        last = wait_for_step(run_dir, HIT + 2, first)
        first.kill()
        first.wait()
        killed = time.monotonic()
        again = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_for_step(run_dir, last, again)
        resumed_s = time.monotonic() - killed
        assert again.wait() == 0
        results = json.loads((run_dir / "results.json").read_text())
        return {"theta": results["theta_sha256"], "usual_s": float("nan"), "slowest_s": resumed_s, "full_s": resumed_s,
                "said": []}  # fmt: skip


def wait_for_step(run_dir: Path, step: int, driver: subprocess.Popen[Any]) -> int:
    """Until the driver has computed something beyond that step; which."""
    from metadist.checkpoint.journal import read_journal

    while (
        last := max((entry.get("applied", -1) for entry in read_journal(run_dir / "journal.jsonl")), default=0)
    ) < step:
        assert driver.poll() is None, "the driver ended early"
        time.sleep(0.02)
    return last + 1


def rpc_failures() -> dict[str, Any]:
    """The run in a process of its own, where one in eleven calls of an actor, or its answer, is lost."""
    environment = os.environ | {"RAY_testing_rpc_failure": json.dumps(RPC_FAILURES)}
    command = [sys.executable, __file__, "--json", "worker process killed"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", choices=[[], *FAULTS, *OWN], default=[])
    parser.add_argument("--json", action="store_true", help="one result, as JSON")
    args = parser.parse_args()
    if args.json:
        print(json.dumps(disturbed(args.faults[0])))
        return
    expected, wrong = {lag: undisturbed(lag) for lag in (0, 1)}, 0
    print("| fault | a step takes | the longest step from then on | workers complete again after | theta |")
    print("|---|---|---|---|---|", flush=True)
    for fault in args.faults or [*FAULTS, *OWN]:
        own = {"driver killed, resumed": driver_killed, "RPC failures": rpc_failures}
        told = own[fault]() if fault in own else disturbed(fault)
        equal = told["theta"] == expected[FAULTS[fault].lag if fault in FAULTS else 0]
        wrong += not equal
        full = f"{told['full_s']:.1f} s" if told["full_s"] > 0 else "-"  # where none was ever missing
        print(f"| {fault} | {told['usual_s']:.2f} s | {told['slowest_s']:.2f} s | {full} | "
              f"{'equal' if equal else 'DIFFERS'} |", flush=True)  # fmt: skip
        for line in told["said"]:
            print(f"    {line}", file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
