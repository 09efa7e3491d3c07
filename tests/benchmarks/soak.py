"""Ten minutes in which something dies every few seconds: `python tests/benchmarks/soak.py DATASET`.

DATASET is what `metadist data omniglot` made. First the run undisturbed, then on several logical nodes of this machine
with one fault after another: workers killed or stopped for a while, the parameter server killed, nodes killed and
replaced, once the driver. The end must have the hash of the undisturbed run, and the resident memory of driver and
server and the use of the object stores must not grow. Ends with 1 otherwise.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

JOB = [
    "task.ways=5", "task.shots=1", "task.queries=5", "model.name=conv4", "learner.inner_lr=0.4", "meta_batch_size=16",
    "engine.chunk_size=2", "evaluation.every=0", "evaluation.test_tasks=8", "evaluation.baselines=[]",
    "checkpoint.every=100", "tracking.mlflow=false", "num_workers=2", "fleet.max_losses=100000",
]  # fmt: skip
FAULTS = {"worker killed": 5, "worker stopped": 3, "server killed": 1, "node killed": 1}
ALLOWED_GROWTH = 1.15


def train(dataset: Path, steps: int, run_dir: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "metadist", "train", *JOB, f"data.path={dataset.resolve()}", f"meta_steps={steps}",
            f"run_dir={run_dir}", *more, "-q"]  # fmt: skip


def results(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "results.json").read_text())


def children(cluster: Any, kind: str) -> list[int]:
    """Processes of this cluster's actors of a class."""
    raylets = {process.process.pid for node in cluster.list_all_nodes() for process in node.all_processes["raylet"]}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, parent = (
                (folder / "cmdline").read_bytes(),
                int((folder / "stat").read_text().split(")")[-1].split()[1]),
            )
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent in raylets and command.startswith(f"ray::{kind}".encode()):
            found.append(int(folder.name))
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[1])


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def stores_mib(cluster: Any) -> float:
    """What the nodes' object stores hold."""
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    return (total["object_store_memory"] - free.get("object_store_memory", 0)) / 2**20


class Chaos:
    """Does one thing after another to a cluster."""

    def __init__(self, cluster: Any, nodes: list[Any], seed: int):
        self.cluster, self.nodes, self.draw = cluster, nodes, random.Random(seed)
        self.done: dict[str, int] = dict.fromkeys([*FAULTS, "driver killed"], 0)
        self.stopped: list[int] = []

    def strike(self) -> None:
        for pid in self.stopped:
            self.send(pid, signal.SIGCONT)
        self.stopped.clear()
        kind = self.draw.choices(list(FAULTS), list(FAULTS.values()))[0]
        workers, servers = children(self.cluster, "WorkerActor"), children(self.cluster, "ServerActor")
        if kind == "node killed":
            held = {
                parent(pid) for pid in servers
            }  # the node that the driver is attached to: without it there is no run
            free = [node for node in self.nodes if node.all_processes["raylet"][0].process.pid not in held]
            self.nodes.remove(node := self.draw.choice(free))
            self.cluster.remove_node(node, allow_graceful=False)
            self.nodes.append(self.cluster.add_node(num_cpus=1, num_gpus=1, wait=False))
        elif kind == "server killed" and servers:
            self.send(self.draw.choice(servers), signal.SIGKILL)
        elif kind == "worker stopped" and workers:
            self.stopped.append(self.draw.choice(workers))
            self.send(self.stopped[0], signal.SIGSTOP)
        elif kind == "worker killed" and workers:
            self.send(self.draw.choice(workers), signal.SIGKILL)
        else:
            return
        self.done[kind] += 1

    @staticmethod
    def send(pid: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def disturbed(
    dataset: Path, steps: int, run_dir: Path, every_s: float, seed: int
) -> tuple[Chaos, dict[str, list[float]]]:
    """The run with faults; what they were, and memory over time since the driver's death, in MiB."""
    import ray
    from faults import SOON
    from ray.cluster_utils import Cluster

    from metadist.checkpoint.journal import read_journal

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 200 * 2**20, "_system_config": SOON}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1, wait=False) for _ in range(3)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    chaos, memory = Chaos(cluster, nodes, seed), {"driver": [], "server": [], "object stores": []}
    command = train(dataset, steps, run_dir, f"fleet.address={cluster.address}", "--resume", "auto")
    try:
        with (run_dir.parent / "driver.log").open("w") as log:
            driver = subprocess.Popen(command, stdout=log, stderr=log)
            while driver.poll() is None:
                time.sleep(every_s)
                step = max((entry.get("step", 0) for entry in read_journal(run_dir / "journal.jsonl")), default=0)
                if step > steps / 4 and not chaos.done["driver killed"]:
                    driver.kill()
                    driver.wait()
                    chaos.done["driver killed"] += 1
                    driver = subprocess.Popen(command, stdout=log, stderr=log)
                elif step > 2:
                    chaos.strike()
                servers = children(cluster, "ServerActor")
                if chaos.done["driver killed"] and servers and step > steps / 4 + 20 and driver.poll() is None:
                    memory["driver"].append(resident_mib(driver.pid))
                    memory["server"].append(resident_mib(servers[0]))
                    memory["object stores"].append(stores_mib(cluster))
                print(f"step {step}: {chaos.done}", file=sys.stderr)
        assert driver.returncode == 0, (run_dir.parent / "driver.log").read_text()[-2000:]
    finally:
        for pid in chaos.stopped:
            chaos.send(pid, signal.SIGCONT)
        ray.shutdown()
        cluster.shutdown()
    return chaos, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--every-s", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--theta", help="hash of the undisturbed run, where it is known")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        quiet, hit, began = Path(folder, "quiet"), Path(folder, "hit"), time.monotonic()
        if not args.theta:
            subprocess.run(train(args.dataset, args.steps, quiet), check=True, stdout=subprocess.DEVNULL)
        expected = args.theta or results(quiet)["theta_sha256"]
        alone_s, began = time.monotonic() - began, time.monotonic()
        chaos, memory = disturbed(args.dataset, args.steps, hit, args.every_s, args.seed)
        hit_s, equal = time.monotonic() - began, results(hit)["theta_sha256"] == expected
    print(f"{args.steps} meta-steps: {alone_s:.0f} s undisturbed, {hit_s:.0f} s with {sum(chaos.done.values())} faults "
          f"({', '.join(f'{count} {kind}' for kind, count in chaos.done.items())})")  # fmt: skip
    flat = True
    for name, values in memory.items():
        third = max(1, len(values) // 3)
        first, last = median(values[:third]), median(values[-third:])
        flat &= last <= first * ALLOWED_GROWTH + 5
        print(f"{name}: {first:.0f} MiB in the first third, {last:.0f} MiB in the last ({len(values)} samples)")
    print(f"theta {'equal' if equal else 'DIFFERS'}; memory {'flat' if flat else 'GROWS'}")
    sys.exit(0 if equal and flat else 1)


if __name__ == "__main__":
    main()
