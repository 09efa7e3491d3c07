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
    assert 0 <= found["age_s"] < 60 and 0 <= found["saved_age_s"] < 60
    text = described(found)
    assert "30/30" in text and "at step 30" in text and f"{best[0]:.1%}" in text


def noted(run, name, *rows):
    with (run / name).open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def applied(first, end):
    return [{"applied": step} for step in range(first, end)]


def measured(step, at, loss, **validation):
    values = {f"validation/{name}": value for name, value in validation.items()}
    return {"step": step, "time": at, "train/loss": loss, "workers/alive": 2.0, "workers/target": 2.0, **values}


def test_a_run_that_went_on_from_before_its_newest_checkpoint(tmp_path):
    """That one was damaged, or all were removed: what it had reached then is not what it has now."""
    (tmp_path / "config.yaml").write_text("data: {family: digits}\n")
    now = time.time()
    saved = {step: {"done": step, "theta_sha256": "a", "time": now - age} for step, age in ((10, 500.0), (20, 90.0))}
    noted(tmp_path, "journal.jsonl", *applied(0, 10), saved[10], *applied(10, 25), saved[20])
    noted(tmp_path, "metrics.jsonl", measured(5, now - 600, 3.0), measured(20, now - 100, 2.0, accuracy=0.9))
    found = status(tmp_path)
    assert (found["step"], found["saved_step"], found["best_step"]) == (25, 20, 20)
    assert 90 <= found["saved_age_s"] < 95
    noted(tmp_path, "journal.jsonl", *applied(10, 11))
    noted(tmp_path, "metrics.jsonl", measured(11, now, 2.5, accuracy=0.5))
    found = status(tmp_path)
    assert (found["step"], found["loss"], found["best"], found["best_step"]) == (11, 2.5, 0.5, 11)
    assert found["saved_step"] == 10 and 500 <= found["saved_age_s"] < 505
    noted(tmp_path, "journal.jsonl", *applied(0, 1))
    assert status(tmp_path)["step"] == 1 and "saved_step" not in status(tmp_path)


def test_of_equal_validations_the_first_is_the_best_as_for_the_run_itself(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {family: digits}\n")
    noted(tmp_path, "metrics.jsonl", *(measured(step, 0.0, 1.0, accuracy=0.5) for step in (10, 20)))
    assert status(tmp_path)["best_step"] == 10


def test_a_driver_that_writes_nothing_is_silent_and_one_that_has_just_begun_is_not(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {family: digits}\n")
    before = time.time() - 600
    noted(tmp_path, "metrics.jsonl", measured(5, before, 3.0))
    os.utime(tmp_path / "metrics.jsonl", (before, before))
    with DriverLock(tmp_path):
        assert status(tmp_path)["silent_s"] < 60 and "silent" not in described(status(tmp_path))
        os.utime(tmp_path / "driver.lock", (before, before))
        assert 600 <= status(tmp_path)["silent_s"] < 660 and "silent" in described(status(tmp_path))


def test_a_driver_that_evaluates_is_not_taken_for_one_that_hangs(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {family: digits}\nmeta_steps: 6\n")
    before = time.time() - 600
    texts = {}
    for step in (5, 6):
        done = {"done": step, "theta_sha256": "a", "time": before}
        noted(tmp_path, "journal.jsonl", *applied(step - 1, step), *([done] if step == 6 else []))
        with DriverLock(tmp_path):
            for name in ("driver.lock", "journal.jsonl"):
                os.utime(tmp_path / name, (before, before))
            texts[step] = described(status(tmp_path))
            assert status(tmp_path).get("doing") == ("evaluating" if step == 6 else None)
    assert "10 min ago: see the job's log" in texts[5] and "evaluating" not in texts[5]
    assert "evaluating" in texts[6] and "silent" not in texts[6]
    assert status(tmp_path)["state"] == "stopped" and "doing" not in status(tmp_path)  # nobody has it
    (tmp_path / "config.yaml").write_text("data: {family: digits}\nmeta_steps: 9\n")  # ended by its patience
    with DriverLock(tmp_path):
        os.utime(tmp_path / "driver.lock", (before, before))
        assert "it evaluates if training has ended early, else see" in described(status(tmp_path))


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


def test_a_run_of_another_user_is_not_stopped_in_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("data: {family: digits}\n")

    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    with DriverLock(tmp_path):
        monkeypatch.setattr(os, "kill", refused)
        with pytest.raises(InputError, match="another user's: stop it as that user"):
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
