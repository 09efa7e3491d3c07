"""`ray job submit` on a cluster of this machine's, as the README says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = "model.name=mlp model.channels=null meta_steps=3 evaluation.test_tasks=4 evaluation.baseline_tasks=0"


@pytest.fixture
def cluster(tmp_path):
    """A head node with its job server; ended by its own address."""
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}
    environment |= {"RAY_ADDRESS": "", "HOME": str(tmp_path), "METADIST_CACHE": str(tmp_path / "cache")}
    start = ["ray", "start", "--head", "--port=6399", "--dashboard-port=8299", "--num-cpus=4", "--temp-dir=/tmp/mdray"]
    done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    yield environment | {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8299"}
    subprocess.run(["ray", "stop", "--force"], env=environment, capture_output=True, timeout=60)


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_submitted_to_a_cluster_trains_there(cluster, tmp_path):
    run_dir = tmp_path / "run"
    entry = f"{sys.executable} -m metadist train jobs/digits.yaml run_dir={run_dir} {SMALL}"
    environment = {name: value for name, value in cluster.items() if name != "RAY_ADDRESS"}
    command = ["ray", "job", "submit", "--working-dir", ".", "--", *entry.split()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run_dir / "results.json").read_text())["meta_steps"] == 3
