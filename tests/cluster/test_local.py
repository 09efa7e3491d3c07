"""`cluster/local.sh`, as a user types it."""

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.files import CLUSTER

ROOT = CLUSTER.parent
SMALL = "model.name=mlp model.channels=null meta_steps=3 evaluation.every=0 evaluation.test_tasks=4"
SMALL += " evaluation.baseline_tasks=0 tracking.mlflow=false num_workers=2"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the script has its files: a short path."""
    folder = Path(f"/tmp/md-{os.getpid()}")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def local(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LOCAL_CLUSTER": str(folder), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    command = ["bash", str(CLUSTER / "local.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def processes(folder: Path) -> set[str]:
    """Those of the cluster that has its files there."""
    found = subprocess.run(["ps", "-A", "-o", "pid=,args="], capture_output=True, text=True).stdout
    return {line for line in found.splitlines() if f"{folder}/" in line}


def test_a_process_that_it_did_not_start_is_left_alone(folder):
    """Its number may be that of a worker that ended long ago."""
    folder.mkdir()
    with subprocess.Popen(["sleep", "60"]) as other:
        (folder / "worker-1.pid").write_text(f"{other.pid}\nThu Jan  1 00:00:00 1970\n")
        assert local(folder, "down", "worker-1").returncode == 2
        assert local(folder, "down").returncode == 0
        assert other.poll() is None
        other.kill()


def test_what_it_does_not_know_is_answered_by_its_usage(folder):
    done = local(folder, "start")
    assert done.returncode == 2 and "local.sh up [WORKERS]" in done.stderr


@pytest.mark.ray
@pytest.mark.wide
@pytest.mark.timeout(600)
def test_a_cluster_of_processes_takes_a_job_a_worker_and_leaves_nothing(folder, tmp_path):
    try:
        made = local(folder, "up", "1")
        assert made.returncode == 0, made.stderr
        assert made.stderr.splitlines() == ["starting the head", "starting worker-1"]
        assert (folder / "token").stat().st_mode & 0o777 == 0o600
        exports = local(folder, "env").stdout.replace("export ", "").split()
        environment = {**os.environ, **dict(word.split("=", 1) for word in exports)}
        address = environment["RAY_API_SERVER_ADDRESS"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{address}/api/jobs/", timeout=10)
        assert "worker-2: runs" in local(folder, "add").stdout
        entry = f"{sys.executable} -m metadist train {ROOT}/jobs/digits.yaml run_dir={tmp_path / 'run'} {SMALL}"
        command = [shutil.which("ray", path=str(Path(sys.executable).parent)), "job", "submit", "--", *entry.split()]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads((tmp_path / "run" / "results.json").read_text())["meta_steps"] == 3
        assert local(folder, "down", "worker-1").returncode == 0
        assert "worker-1" not in local(folder, "status").stdout
    finally:
        ended = local(folder, "down")
    assert ended.returncode == 0 and not processes(folder), ended.stderr
