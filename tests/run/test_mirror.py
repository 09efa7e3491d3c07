"""A run directory at a URI: the same run, wherever it goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

import metadist
from metadist.checkpoint.journal import read_journal
from metadist.checkpoint.store import CheckpointStore
from metadist.cli.main import main
from metadist.config import Config, load_config
from metadist.core.errors import InputError, PlaceLost, StorageFailed
from metadist.core.files import DriverLock, join
from metadist.core.storage import open_location, read
from metadist.data import cached
from metadist.run import mirror
from metadist.run.api import dry_run, train
from metadist.run.mirror import Mirror, run_file, working_folder
from metadist.run.saved import scale
from metadist.run.status import status
from metadist.tracking.jsonl import read_metrics

JOB = [
    "data.family=digits", "task.ways=3", "task.shots=2", "task.queries=3", "model.name=mlp", "model.hidden=[8]",
    "tasks_per_worker=2", "num_workers=2", "meta_steps=12", "evaluation.every=3", "evaluation.tasks=3",
    "evaluation.test_tasks=3", "evaluation.baselines=[]", "checkpoint.every=2", "fleet.backend=local",
    "tracking.mlflow=false", "tracking.log_every=1",
]  # fmt: skip


def job(run_dir: str | Path, *overrides: str) -> Config:
    return load_config([], [*JOB, f"run_dir={run_dir}", *overrides])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    return train(job(tmp_path_factory.mktemp("undisturbed") / "run"), quiet=True)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Calling it makes this process one on another machine, whose cache is empty but for the built-in data."""
    built = cached("digits")

    def another(name: str) -> Path:
        cache = tmp_path / name
        shutil.copytree(built, cache / built.name)
        monkeypatch.setenv("METADIST_CACHE", str(cache))
        return cache

    another("first")
    return another


def steps_logged(run: str) -> list[int]:
    return [row["step"] for row in read_metrics(run_file(run, "metrics.jsonl")) if "train/loss" in row]


def steps_planned(run: str) -> list[int]:
    return [record["step"] for record in read_journal(run_file(run, "journal.jsonl")) if "tasks" in record]


@pytest.mark.parametrize("where", ["file", "s3"])
def test_a_run_goes_on_from_its_uri_on_another_machine(tmp_path, request, machine, undisturbed, where):
    run = (tmp_path / "runs" / "the é one").as_uri()
    if where == "s3":
        run = request.getfixturevalue("s3")("runs/the é one")
    train(job(run, "meta_steps=5"), quiet=True)
    files, root = open_location(run)
    there = {info.base_name for info in files.get_file_info(fs.FileSelector(root))}
    assert there == {
        "config.yaml", "journal.jsonl", "metrics.jsonl", "results.json", "tasks.arrow", "checkpoints",
        "adaptation_curve.png", "training_curve.png", "task.png",
    }  # fmt: skip
    with pytest.raises(InputError, match="--resume auto"):
        train(job(run), quiet=True)
    cache = machine("second")
    told = train(job(run), quiet=True, resume="auto")
    assert working_folder(run).is_relative_to(cache)
    kept = ("theta_sha256", "evaluated_step", "evaluated_theta_sha256", "identity")
    assert [told[key] for key in kept] == [undisturbed[key] for key in kept]
    assert steps_logged(run) == list(range(1, 13)) and steps_planned(run) == list(range(12))
    assert json.loads(run_file(run, "results.json").read_text())["meta_steps"] == 12


def test_commands_read_a_run_at_a_uri(tmp_path, machine, capsys):
    run = (tmp_path / "runs" / "one").as_uri()
    told = train(job(run, "meta_steps=4"), quiet=True)
    machine("second")
    assert main(["evaluate", run, "evaluation.inner_steps=2", "--json"]) == 0
    folder = json.loads(capsys.readouterr().out)["folder"]
    files, root = open_location(folder)
    assert json.loads(read(files, f"{root}/results.json"))["evaluated_step"] == told["evaluated_step"]
    assert main(["replay", run]) == main(["replay", run, "--task", "train:2:1"]) == 0
    learner = metadist.load(run, "latest")
    weights = CheckpointStore(join(run, "checkpoints")).load().weights
    assert learner.theta.numpy().tobytes() == np.concatenate([w.ravel() for w in weights.values()]).tobytes()
    assert metadist.load(join(run, "checkpoints/step_00000002")).theta.shape == learner.theta.shape
    found = status(run)
    assert (found["step"], found["meta_steps"], found["state"]) == (4, 4, "finished")
    with pytest.raises(InputError, match="config.yaml"):
        scale((tmp_path / "none").as_uri(), 3)
    assert dry_run(job(run))["run_dir"] == run


def test_a_run_follows_the_number_of_workers_asked_for_at_its_uri(tmp_path, machine, monkeypatch):
    monkeypatch.setattr(mirror, "LOOK_EVERY_S", 0.01)
    run, asked = (tmp_path / "run").as_uri(), []
    cut = Mirror.cut

    def ask_and_wait(self):
        if not asked:
            asked.append(scale(run, 3))
            deadline = time.monotonic() + 30
            while not (working_folder(run) / "target_workers").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        return cut(self)

    monkeypatch.setattr(Mirror, "cut", ask_and_wait)
    train(job(run, "evaluation.every=0"), quiet=True)
    tasks = {r["step"]: r["tasks"] for r in read_journal(run_file(run, "journal.jsonl")) if "tasks" in r}
    assert asked == [False]
    assert [tasks[step] for step in range(12)] == [4] * 3 + [6] * 9  # the next one has been begun when it is asked for
    monkeypatch.setattr(Mirror, "cut", cut)
    machine("second")
    train(job(run, "meta_steps=14", "evaluation.every=0"), quiet=True, resume="auto")
    planned = read_journal(run_file(run, "journal.jsonl"))
    assert [record["tasks"] for record in planned if record.get("step") == 13] == [6]


def test_a_run_that_began_before_is_forgotten_at_the_uri_too(tmp_path, machine):
    run = (tmp_path / "run").as_uri()
    train(job(run, "meta_steps=2"), quiet=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    machine("second")
    train(job(run, "meta_steps=3", "seed=1"), quiet=True, resume="auto")
    assert steps_logged(run) == [1, 2, 3] and steps_planned(run) == [0, 1, 2]


def failing_put(monkeypatch, first: int, last: int) -> None:
    count, put = [0], mirror.put

    def failing(files, path, source, num_bytes):
        count[0] += path.endswith("journal.jsonl")
        if path.endswith("journal.jsonl") and first <= count[0] <= last:
            raise OSError(28, "No space left on device")
        put(files, path, source, num_bytes)

    monkeypatch.setattr(mirror, "put", failing)
    monkeypatch.setattr("metadist.checkpoint.saver.PAUSE_S", 0.0)


def test_a_place_that_takes_nothing_ends_the_run_and_one_that_does_again_loses_nothing(
    tmp_path, machine, undisturbed, monkeypatch, capsys
):
    run = (tmp_path / "run").as_uri()
    with monkeypatch.context() as patch, pytest.raises(StorageFailed, match="3rd failure in a row"):
        failing_put(patch, 3, 1000)
        train(job(run), quiet=True)
    assert "1 of 3" in capsys.readouterr().err
    machine("second")
    failing_put(monkeypatch, 2, 3)
    told = train(job(run), quiet=True, resume="auto")
    assert told["theta_sha256"] == undisturbed["theta_sha256"]
    assert steps_logged(run) == list(range(1, 13)) and steps_planned(run) == list(range(12))


def test_a_second_driver_is_refused_here_and_elsewhere_ends_the_first(tmp_path, machine, monkeypatch):
    run = (tmp_path / "run").as_uri()
    train(job(run, "meta_steps=2"), quiet=True)
    with DriverLock(working_folder(run)), pytest.raises(InputError, match="in use by another driver"):
        train(job(run), quiet=True, resume="auto")
    other = CheckpointStore(join(run, "checkpoints"))
    begin = Mirror.begin

    def taken_over(self, guard, say):
        begin(self, guard, say)
        other.claim("the other run")

    monkeypatch.setattr(Mirror, "begin", taken_over)
    with pytest.raises(PlaceLost, match="the other run"):
        train(job(run), quiet=True, resume="auto")
    assert steps_planned(run) == [0, 1]  # nothing was written over what is the other's now


def test_mlflows_own_database_has_no_place_beside_a_uri(tmp_path, machine, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for call in (train, dry_run):
        with pytest.raises(InputError, match=r"tracking\.uri.*tracking\.mlflow=false"):
            call(job((tmp_path / "run").as_uri(), "tracking.mlflow=true"))


@pytest.mark.parametrize("setting", ["run_dir", "data.path", "checkpoint.location", "model.weights"])
def test_a_place_that_does_not_answer_is_named_with_its_setting(tmp_path, machine, setting):
    place = "s3://key:hunter2@bucket/x?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    own = [f"{setting}={place}"] + ["data.family=null"] * (setting == "data.path")
    began = time.monotonic()
    with pytest.raises(InputError, match=f"{setting}=s3://.*endpoint_override") as raised:
        train(load_config([], [*JOB, f"run_dir={tmp_path / 'run'}", *own]), quiet=True)
    assert "hunter2" not in str(raised.value) and time.monotonic() - began < 10


def test_a_saved_run_has_nobody_asked_whom_its_reader_did_not_name(tmp_path, machine):
    """Data elsewhere than the run itself is an address like any other."""
    data = (tmp_path / "data").as_uri()
    shutil.copytree(cached("digits"), tmp_path / "data")
    train(job(tmp_path / "run", "data.family=null", f"data.path={data}", "meta_steps=1"), quiet=True)
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert main(["evaluate", str(tmp_path / "run"), f"data.path={data}"]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--trust-code"]) == 0


@pytest.mark.wide
def test_a_killed_run_goes_on_elsewhere_as_the_same_run_of_mlflow(tmp_path, machine, s3, mlflow_database):
    database = tmp_path / "mlflow.db"
    shutil.copy(mlflow_database, database)
    run = s3("runs/killed")
    own = [f"tracking.uri=sqlite:///{database}", "tracking.mlflow=true", "meta_steps=300", "checkpoint.every=20"]
    own += ["evaluation.every=0"]
    told = train(job(tmp_path / "whole", *own, "tracking.mlflow=false"), quiet=True)
    command = [sys.executable, "-m", "metadist", "train", *JOB, f"run_dir={run}", *own, "-q"]
    for number in (signal.SIGKILL, signal.SIGTERM):
        machine(f"until {number}")
        known = CheckpointStore(join(run, "checkpoints")).steps()
        process = subprocess.Popen([*command, "--resume", "auto"], env=dict(os.environ), stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while CheckpointStore(join(run, "checkpoints")).steps()[-1:] == known[-1:] or not (
            run_file(run, "mlflow_run_id").exists()
        ):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(number)
        process.communicate(timeout=120)
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    machine("last")
    assert train(job(run, *own), quiet=True, resume="auto")["theta_sha256"] == told["theta_sha256"]
    assert steps_logged(run) == list(range(1, 301)) and sorted(set(steps_planned(run))) == list(range(300))
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{database}")
    (logged,) = client.search_runs([client.get_experiment_by_name("metadist").experiment_id])
    assert logged.info.status == "FINISHED" and logged.info.run_name == "killed"
    measured = {metric.step for metric in client.get_metric_history(logged.info.run_id, "train/loss")}
    assert measured == set(range(1, 301))


@pytest.mark.wide
@pytest.mark.ray
def test_workers_of_a_cluster_need_no_shared_file_system(tmp_path, machine, s3, ray_cluster):
    """Data, run directory and checkpoints on S3 alone, two workers on Ray: the theta of a run on local files."""
    built = cached("digits")
    files, root = open_location(s3("data/digits"))
    fs.copy_files(str(built), root, fs.LocalFileSystem(), files)
    own = ["data.family=null", "meta_steps=6", "fleet.backend=ray"]
    whole = train(job(tmp_path / "run", *own, f"data.path={built}", "fleet.backend=local"), quiet=True)
    run = s3("runs/on a cluster")
    train(job(run, *own, f"data.path={s3('data/digits')}", "meta_steps=3"), quiet=True)
    machine("second")
    told = train(job(run, *own, f"data.path={s3('data/digits')}"), quiet=True, resume="auto")
    kept = ("theta_sha256", "data_digest", "identity", "bit_identical")
    assert [told[key] for key in kept] == [whole[key] for key in kept]
    assert steps_logged(run) == list(range(1, 7))
