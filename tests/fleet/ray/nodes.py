"""Clusters whose nodes are processes of a test's own (`ray start --block`), which end with it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ray._raylet import GcsClient

RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
SMALL = ["--object-store-memory=100000000"]
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",  # else a busy machine starves the actors, which tests wait for
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "10",
}
SOURCE = '''
import time
import numpy as np
from metadist import Draws, Task

class Lines:
    """y = slope * x, at some seconds a task, so that what a step takes does not depend on the machine's cores."""
    outputs = 1
    def __init__(self, seed, sleep_s=0.0):
        self.seed, self.sleep_s = seed, sleep_s
    def __call__(self, task_id):
        time.sleep(self.sleep_s)
        draws = Draws(self.seed, task_id)
        x = draws.uniform(12).astype(np.float32)[:, None]
        y = (draws.normal(1) * x).astype(np.float32)
        return Task.of(x[:6], y[:6], x[6:], y[6:])
'''
JOB = [
    "data.source=sleepy:Lines", "model.name=mlp", "model.hidden=[8]", "engine.chunk_size=1", "evaluation.every=0",
    "evaluation.test_tasks=2", "evaluation.baselines=[]", "tracking.mlflow=false", "tracking.log_every=1",
    "engine.gradient_check=false", "checkpoint.every=100000",
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextmanager
def process(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """A process in a session of its own, all of which is killed at the end."""
    with log.open("w") as output:
        started = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, cwd=log.parent,
            env={**os.environ, **ENVIRONMENT, **environment},
        )  # fmt: skip
    try:
        yield started
    finally:
        if started.poll() is None:
            started.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                started.wait(20)
        with suppress(ProcessLookupError):  # also what an autoscaler's nodes leave behind
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


@contextmanager
def head(folder: Path, *options: str, port: int | None = None, **environment: str) -> Iterator[str]:
    """The head of a cluster, without CPUs: its address. `folder` must have a short path."""
    port = port or free_port()
    own = ["--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=0", "--include-dashboard=false"]
    own += [f"--temp-dir={folder}/ray", *agent(), *SMALL, *options]
    environment = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", **environment}
    with process([*RAY, *own], folder / "head.log", **environment) as started:
        wait_for(lambda: "Ray runtime started" in (folder / "head.log").read_text(), 120, started)
        yield f"127.0.0.1:{port}"


def agent() -> list[str]:
    """A port of its own for the agent that takes jobs: without one, beside another Ray of this machine, none does."""
    return [f"--dashboard-agent-listen-port={free_port()}"]


@contextmanager
def node(folder: Path, address: str, name: str, cpus: int = 1, **environment: str) -> Iterator[subprocess.Popen]:
    """A node of a cluster, with a resource of its name."""
    own = [f"--address={address}", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", *SMALL]
    own += [f'--resources={{"{name}": 1}}', *agent()]
    log = folder / f"{name}.log"
    with process([*RAY, *own], log, **environment) as started:
        wait_for(lambda: "Ray runtime started" in log.read_text(), 120, started)
        yield started


def alive(address: str) -> list[str]:
    """Ids of the nodes of a cluster that are alive."""
    found = GcsClient(address=address).get_all_node_info(timeout=10).values()
    return [each.node_id.hex() for each in found if each.state == 0]


def wait_for(holds, longest_s: float, running: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + longest_s
    while not holds():
        assert time.monotonic() < deadline
        assert running is None or running.poll() is None, "it has ended"
        time.sleep(0.2)
