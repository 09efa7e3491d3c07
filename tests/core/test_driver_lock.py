"""Two drivers, one run directory: the second is told who the first is, readers are not asked."""

import os
import signal
import subprocess
import sys
import time

import pytest

from metadist.checkpoint.journal import read_journal
from metadist.config import load_config
from metadist.core.errors import InputError
from metadist.core.files import DriverLock
from metadist.run.api import train
from metadist.run.evaluate import evaluate
from metadist.run.saved import scale

HOLD = "import sys, time; from pathlib import Path; from metadist.core.files import DriverLock\n" \
       "with DriverLock(Path(sys.argv[1])) as lock: lock.take(); print('held', flush=True); time.sleep(60)"  # fmt: skip
JOB = [
    "data.family=digits", "task.ways=3", "task.shots=2", "task.queries=3", "model.name=mlp", "model.hidden=[16]",
    "meta_batch_size=4", "evaluation.every=0", "evaluation.test_tasks=4", "evaluation.baselines=[]",
    "checkpoint.every=5", "fleet.backend=local", "tracking.mlflow=false", "run_dir=run",
]  # fmt: skip


def test_a_second_driver_is_told_who_the_first_is_and_a_killed_one_lets_go(tmp_path):
    folder = tmp_path / "deep" / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"deep/run is in use by another driver \(process {holder.pid} on .+\): "):
        DriverLock(folder).__enter__()
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()  # closes the pipe
    for _ in range(2):
        with DriverLock(folder) as lock:
            lock.take()
            with pytest.raises(InputError, match=f"process {os.getpid()} on"), DriverLock(folder):
                pass


def test_a_folder_that_appears_meanwhile_or_cannot_be_made_is_refused(tmp_path):
    with DriverLock(tmp_path / "run") as late:
        (tmp_path / "run").mkdir()
        with pytest.raises(InputError, match="another driver has just begun"):
            late.take()
    (tmp_path / "file").write_text("")
    with DriverLock(tmp_path / "file" / "run") as lock, pytest.raises(InputError, match="cannot be written to"):
        lock.take()


def test_a_run_is_written_by_one_driver_and_read_by_any(tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "metadist", "train", *JOB, "meta_steps=1000000", "-q"]
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not any("done" in record for record in read_journal(run_dir / "journal.jsonl")):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGSTOP)
        config = load_config([run_dir / "config.yaml"], ["evaluation.test_tasks=2"])
        with pytest.raises(InputError, match=rf"is in use by another driver \(process {first.pid} on"):
            train(config, resume="auto", quiet=True)
        scale(run_dir, 3)
        assert evaluate(config, run_dir, say=lambda text: None)["evaluated_step"] >= 5
    finally:
        os.kill(first.pid, signal.SIGCONT)
        first.terminate()
    assert first.wait(60) == 143


@pytest.mark.ray
def test_a_place_without_lock_files_is_claimed_in_the_cluster(ray_cluster):
    from metadist.fleet.ray.cluster import claim

    claimed = claim("s3://bucket/runs", "the first")
    other = claim("s3://bucket/others", "the first")
    with pytest.raises(InputError, match=r"s3://bucket/runs is in use by another driver \(the first\)"):
        claim("s3://bucket/runs", "the second", patience_s=0)
    del claimed, other
    claim("s3://bucket/runs", "the second")
