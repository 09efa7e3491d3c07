"""How a run stands, while it goes on and afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metadist.config import load_config
from metadist.core.errors import InputError
from metadist.core.files import DriverLock, here, lock_holder
from metadist.run.api import train
from metadist.run.status import described, status, stop_here

ROOT = Path(__file__).resolve().parents[2]
JOB = ["data.family=digits", "task.ways=3", "task.queries=3", "fleet.backend=local", "tracking.mlflow=false",
       "model.name=mlp", "evaluation.baselines=[]", "evaluation.test_tasks=4", "evaluation.tasks=8"]  # fmt: skip


def test_a_finished_run(tmp_path):
    run = tmp_path / "run"
    job = [*JOB, f"run_dir={run}", "meta_steps=30", "evaluation.every=10", "checkpoint.every=10"]
    train(load_config([], job), quiet=True)
    found = status(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max((row["validation/accuracy"], -row["step"]) for row in rows if "validation/accuracy" in row)
    assert {key: found[key] for key in ("state", "step", "meta_steps", "saved_step")} == {
        "state": "finished", "step": 30, "meta_steps": 30, "saved_step": 30,
    }  # fmt: skip
    assert found["best"] == best[0] and found["metric"] == "accuracy"
    assert 0 <= found["age_s"] <= found["saved_age_s"] + 60 < 120
    text = described(found)
    assert "30/30" in text and "at step 30" in text and f"{best[0]:.1%}" in text


def test_a_run_that_has_not_logged_yet(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {family: digits}\n")
    assert status(tmp_path)["state"] == "stopped"
    with DriverLock(tmp_path):
        found = status(tmp_path)
    assert found["state"] == "running" and found["driver"] == here() and found["step"] == 0
    assert "running" in described(found)


def test_who_has_a_folder(tmp_path):
    assert lock_holder(tmp_path) is None
    with DriverLock(tmp_path):
        assert lock_holder(tmp_path) == here()
        assert lock_holder(tmp_path) == here()  # looking takes nothing
    assert lock_holder(tmp_path) is None


def test_no_run_at_all(tmp_path):
    with pytest.raises(InputError, match=r"config\.yaml"):
        status(tmp_path)
    (tmp_path / "config.yaml").write_text("data: {family: digits}\n")
    with pytest.raises(InputError, match="--address"):
        stop_here(tmp_path)


def test_a_run_of_another_machine_is_not_stopped_here(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {family: digits}\n")
    with DriverLock(tmp_path):
        (tmp_path / "driver.lock").write_text(f"process {os.getpid()} on elsewhere\n")
        with pytest.raises(InputError, match="elsewhere"):
            stop_here(tmp_path)


def test_a_run_of_this_machine_is_stopped_and_saved(tmp_path):
    run = tmp_path / "run"
    line = [sys.executable, "-m", "metadist", "train", *JOB, f"run_dir={run}", "meta_steps=100000", "-q"]
    process = subprocess.Popen([*line, "evaluation.every=0"], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 200
        while not (run / "metrics.jsonl").exists() or "train/loss" not in (run / "metrics.jsonl").read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        assert status(run)["state"] == "running"
        found = stop_here(run)
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert found["state"] == "stopped" and found["saved_step"] >= found["step"] > 0
