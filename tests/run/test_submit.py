"""`ray job submit` to a cluster with a job server, as the README says."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = "model.name=mlp model.channels=null meta_steps=3 evaluation.test_tasks=4 evaluation.baseline_tasks=0"


@pytest.fixture
def job_server(tmp_path, monkeypatch):
    """Address of the job server of a one-node cluster of this test's own, which runs jobs with this Python."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "cache"))
    server, agent = free_port(), free_port()
    head = {"num_cpus": 4, "include_dashboard": True, "dashboard_port": server, "dashboard_agent_listen_port": agent}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield f"http://127.0.0.1:{server}"
    cluster.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.ray
@pytest.mark.wide
def test_a_job_submitted_to_a_cluster_trains_there(job_server, tmp_path):
    run_dir = tmp_path / "run"
    entry = f"python -m metadist train jobs/digits.yaml run_dir={run_dir} {SMALL}"
    command = ["ray", "job", "submit", "--address", job_server, "--working-dir", ".", "--", *entry.split()]
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            break
        time.sleep(2)  # the node's agent is still starting
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run_dir / "results.json").read_text())["meta_steps"] == 3
