"""`cluster/slurm.sbatch` on a Slurm of two nodes that this test starts."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.command import run
from tests.cluster.slurm import Slurm, slurm, why_not

ROOT = Path(__file__).resolve().parents[2]
JOB = "model.name=mlp model.channels=null meta_steps=300 meta_batch_size=64 num_workers=2 evaluation.every=0"
JOB += " evaluation.test_tasks=4 evaluation.baseline_tasks=0 tracking.mlflow=false checkpoint.every=20"


@pytest.fixture
def cluster() -> Iterator[Slurm]:
    """Two nodes with two CPUs each."""
    if reason := why_not():
        pytest.skip(reason)
    with slurm(Path(f"/tmp/slurm-{os.getpid()}"), nodes=2, cpus=2) as cluster:
        yield cluster


def wait(what: Callable[[], bool], cluster: Slurm, job: str, seconds: float) -> None:
    """Until `what` holds; fails with the end of the job's log when time is up, or when the job has ended without."""
    end = time.monotonic() + seconds
    while not what():
        ended = cluster.field(job, "JobState") in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        assert not ended and time.monotonic() < end, Path(cluster.field(job, "StdOut")).read_text()[-5000:]
        time.sleep(1)


@pytest.mark.wide
@pytest.mark.timeout(900)
def test_a_job_that_is_told_to_stop_is_requeued_and_ends_as_if_nothing_had_been(cluster, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    job = cluster.run(
        "sbatch", "--parsable", "--cpus-per-task=2", f"--output={log}", str(ROOT / "cluster" / "slurm.sbatch"),
        str(ROOT / "jobs" / "digits.yaml"), f"run_dir={run_dir}", *JOB.split(),
    )  # fmt: skip
    wait(lambda: any(run_dir.glob("checkpoints/*/meta.json")), cluster, job, 240)
    cluster.run("scancel", "--batch", "--signal=TERM", job)  # what Slurm does two minutes before the end
    wait(lambda: cluster.field(job, "JobState") == "PENDING", cluster, job, 90)
    assert cluster.field(job, "Restarts") == "1" and not (run_dir / "results.json").exists()
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # else Slurm waits two minutes
    wait(lambda: cluster.field(job, "JobState") == "COMPLETED", cluster, job, 240)
    assert "continues at step" in log.read_text()
    alone = run(
        "train", "jobs/digits.yaml", f"run_dir={tmp_path / 'alone'}", "fleet.backend=local", *JOB.split(), cwd=ROOT
    )
    assert alone.returncode == 0, alone.stderr
    thetas = [
        json.loads((folder / "results.json").read_text())["theta_sha256"] for folder in (run_dir, tmp_path / "alone")
    ]
    assert thetas[0] == thetas[1]
