"""A run directory that is removed, replaced or moved while a run writes to it, or a place of two runs."""

import importlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import metadist
from metadist.checkpoint.format import Checkpoint
from metadist.checkpoint.journal import read_journal
from metadist.checkpoint.store import CheckpointStore
from metadist.config import load_config
from metadist.core.errors import InputError, PlaceLost
from metadist.core.files import DriverLock, JsonLines, read_file
from metadist.run.api import train
from metadist.tracking.jsonl import read_metrics
from tests.cli.command import run

JOB = [
    "data.family=digits", "task.ways=3", "task.shots=1", "task.queries=2", "model.name=mlp", "model.hidden=[4]",
    "meta_batch_size=2", "evaluation.every=0", "evaluation.test_tasks=2", "evaluation.baselines=[]",
    "checkpoint.every=2", "fleet.backend=local", "tracking.mlflow=false",
]  # fmt: skip


def config_of(path: Path):
    return load_config([path])


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"w": np.zeros(3, np.float32)}, {"t": 1}, "", {}, {"run_dir": "/runs/one"})


def saved(journal: Path, step: int) -> bool:
    return any(record.get("done") == step for record in read_journal(journal))


LINES = """
import numpy as np
from metadist import Draws, Task

struck = None  # called once, while the tasks of step 6 are made: after the checkpoint of step 4

class Lines:
    outputs = 1

    def __init__(self, seed):
        self.seed = seed

    def __call__(self, task_id):
        global struck
        if task_id.split == "train" and task_id.step == 6 and struck:
            strike, struck = struck, None
            strike()
        x = Draws(self.seed, task_id).uniform(8).astype(np.float32)[:, None]
        return Task.of(x[:4], x[:4], x[4:], x[4:])
"""


@pytest.mark.parametrize("what", ["run", "kept"])
@pytest.mark.parametrize("loss", ["removed", "moved", "replaced"])
def test_a_run_ends_where_its_directory_is_no_longer_the_one_it_took(tmp_path, monkeypatch, what, loss):
    """With exit code 1 and one sentence, and without making it again or writing to the one in its place."""
    (tmp_path / "tests_lines.py").write_text(LINES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tests_lines", raising=False)
    before: list[tuple[Path, int]] = []

    def sizes() -> list[tuple[Path, int]]:
        return sorted((path, path.stat().st_size) for path in (tmp_path / what).rglob("*"))

    def strike() -> None:
        while not saved(tmp_path / "run" / "journal.jsonl", 4):
            time.sleep(0.01)
        (tmp_path / what).rename(tmp_path / "elsewhere")
        if loss == "removed":
            shutil.rmtree(tmp_path / "elsewhere")
        if loss == "replaced":
            shutil.copytree(tmp_path / "elsewhere", tmp_path / what)
        before.extend(sizes())

    importlib.import_module("tests_lines").struck = strike
    own = [setting for setting in JOB if setting.partition("=")[0] not in ("data.family", "checkpoint.every")]
    own += ["data.source=tests_lines:Lines", "checkpoint.every=4", "meta_steps=1000", "run_dir=run"]
    done = run("train", *own, "checkpoint.location=kept", "-q", cwd=tmp_path)
    assert done.returncode == 1
    *_, sentence = done.stderr.splitlines()
    assert "was removed, replaced or moved while a run was writing to it" in sentence and "--resume auto" in sentence
    assert sizes() == before
    assert (tmp_path / what).exists() == (loss == "replaced")


def test_a_line_is_appended_to_the_file_at_its_path_only(tmp_path):
    lines = JsonLines(tmp_path / "f")
    lines.append({"a": 1})
    (tmp_path / "f").rename(tmp_path / "g")
    with pytest.raises(PlaceLost):
        lines.append({"a": 2})
    (tmp_path / "f").write_text("other")
    with pytest.raises(PlaceLost):
        lines.append({"a": 2})
    lines.close()
    assert (tmp_path / "f").read_text() == "other" and (tmp_path / "g").read_text() == '{"a":1}\n'


def test_a_lock_tells_whether_it_is_still_that_of_the_folder(tmp_path):
    with DriverLock(tmp_path / "run") as lock:
        lock.take()
        lock.check()
        (tmp_path / "run" / "driver.lock").unlink()
        with pytest.raises(PlaceLost):
            lock.check()


@pytest.mark.parametrize("uri", [False, True])
def test_checkpoints_are_not_written_to_a_place_that_was_made_anew(tmp_path, uri):
    place = tmp_path / "deep" / "kept"
    store = CheckpointStore(place.as_uri() if uri else place)
    store.save(checkpoint(1))
    shutil.rmtree(tmp_path / "deep")
    for _ in range(2):
        with pytest.raises(PlaceLost):
            store.save(checkpoint(2))
    assert not (tmp_path / "deep").exists()
    place.mkdir(parents=True)
    with pytest.raises(PlaceLost):
        store.save(checkpoint(2))
    assert not list(place.iterdir())


def test_who_takes_over_a_place_at_a_uri_ends_the_run_before(tmp_path):
    first, second = (CheckpointStore(tmp_path.as_uri()) for _ in range(2))
    first.claim("/runs/one")
    first.save(checkpoint(1))
    second.claim("/runs/two")
    with pytest.raises(PlaceLost, match="/runs/two"):
        first.save(checkpoint(2))
    second.save(checkpoint(2))
    assert second.steps() == [1, 2]


@pytest.mark.parametrize("uri", [False, True])
def test_a_place_with_another_runs_checkpoints_is_refused(tmp_path, uri):
    place = (tmp_path / "kept").as_uri() if uri else tmp_path / "kept"

    def run(name: str, *more: str, resume: str | Path | None = "auto") -> str:
        config = load_config([], [*JOB, f"run_dir={tmp_path / name}", f"checkpoint.location={place}", *more])
        return train(config, resume=resume, quiet=True)["theta_sha256"]

    run("one", "meta_steps=2")
    for resume in ("auto", tmp_path / "one"):
        with pytest.raises(InputError, match=f"{tmp_path / 'one'}.*checkpoint.location"):
            run("two", "meta_steps=4", resume=resume)
    assert not (tmp_path / "two").exists()
    (tmp_path / "one").rename(tmp_path / "moved")
    theta = run("moved", "meta_steps=4")
    shutil.rmtree(tmp_path / "moved")
    assert run("moved", "meta_steps=4") == theta


def test_a_checkpoint_without_its_mark_is_told(tmp_path):
    said: list[str] = []
    store = CheckpointStore(tmp_path, say=said.append)
    store.save(checkpoint(1))
    store.save(checkpoint(2))
    (tmp_path / "step_00000002" / "meta.json").unlink()
    assert store.load("latest").step == 1
    assert len(said) == 1 and "step_00000002" in said[0] and "is passed over: no meta.json in it" in said[0]


def test_a_run_whose_only_checkpoint_lost_its_mark_does_not_start_anew_unsaid(tmp_path):
    config = load_config([], [*JOB, "meta_steps=2", f"run_dir={tmp_path / 'run'}"])
    train(config, quiet=True)
    (tmp_path / "run" / "checkpoints" / "step_00000002" / "meta.json").unlink()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="meta.json of step_00000002"):
        train(config, resume="auto", quiet=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_submitted_job_is_refused_where_its_run_would_be_thrown_away(tmp_path, monkeypatch):
    package = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    own = [*JOB, "meta_steps=1"]
    train(load_config([], [*own, "run_dir=runs/here"]), quiet=True)  # by hand, in such a directory
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for setting in ("run_dir=runs/one", "run_dir=null", "checkpoint.location=kept", "model.weights=w.safetensors"):
        with pytest.raises(InputError, match=setting.partition("=")[0]):
            train(load_config([], [*own, f"run_dir={tmp_path / 'run'}", setting]), quiet=True)
    assert not (package / "runs" / "one").exists()
    train(load_config([], [*own, f"run_dir={tmp_path / 'run'}"]), quiet=True)


def test_only_regular_files_of_reasonable_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 40)
    for name in ("pipe", "zero", "."):
        with pytest.raises((InputError, IsADirectoryError)):
            read_file(tmp_path / name)
    with pytest.raises(InputError, match="large .*1099511627776"):
        read_file(tmp_path / "large")
    with pytest.raises(InputError, match="pipe"):
        load_config([tmp_path / "pipe"])
    (tmp_path / "run").mkdir()
    for name, read in (("journal.jsonl", read_journal), ("metrics.jsonl", read_metrics), ("config.yaml", config_of)):
        os.mkfifo(tmp_path / "run" / name)
        with pytest.raises(InputError, match=name):
            read(tmp_path / "run" / name)
    with pytest.raises(InputError, match="config.yaml"):
        metadist.load(tmp_path / "run")


@pytest.mark.parametrize("name", ["meta.json", "weights.safetensors", "trainer.pt", "config.yaml"])
def test_a_checkpoint_of_pipes_and_devices_is_refused_at_once(tmp_path, name):
    folder = Path(CheckpointStore(tmp_path).save(checkpoint(1)))
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (folder / name).unlink()
        make(folder / name)
        with pytest.raises(InputError):
            CheckpointStore(tmp_path, say=print).load("step_00000001")


def test_results_do_not_depend_on_being_watched(tmp_path):
    """What is held is compared, not written: the journal's lines are as before."""
    train(load_config([], [*JOB, "meta_steps=2", f"run_dir={tmp_path / 'run'}"]), quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "tasks" in line] == [0, 1]
