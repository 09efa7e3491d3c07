"""What surrounds the loop: stopping early, the best weights, MLflow's record of it all."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from safetensors.numpy import save_file

from metadist.checkpoint.journal import read_journal
from metadist.checkpoint.store import CheckpointStore
from metadist.config import Config, load_config
from metadist.core.errors import Diverged, InputError, Interrupted
from metadist.evaluation.protocol import measure
from metadist.run.api import train
from metadist.run.build import Job
from metadist.run.identity import bound_settings, check_settings
from metadist.run.prepare import prepare
from metadist.tracking.jsonl import read_metrics

JOB = [
    "data.family=digits", "task.ways=3", "task.shots=2", "task.queries=3", "model.name=mlp", "model.hidden=[16]",
    "learner.inner_lr=0.1", "meta_batch_size=6", "meta_steps=6", "evaluation.every=2", "evaluation.tasks=5",
    "evaluation.test_tasks=5", "evaluation.baseline_tasks=0", "fleet.backend=local",
]  # fmt: skip


def job(run_dir: Path, *overrides: str, mlflow: bool = False) -> Config:
    return load_config([], [*JOB, f"run_dir={run_dir}", f"tracking.mlflow={mlflow}", *overrides])


def test_training_stops_when_validation_no_longer_improves(tmp_path, capsys):
    told = train(job(tmp_path / "run", "meta_lr=1e-12", "meta_steps=100", "evaluation.patience=2"))
    assert "stopped at step 6 of 100: 2 validations brought no improvement" in capsys.readouterr().err
    assert told["ended_by"] == "no improvement"
    assert told["meta_steps"] == 6  # validated at 2 (the best), 4 and 6
    assert told["evaluated_step"] == 2


def test_training_stops_at_the_time_limit_and_resumes_from_there(tmp_path):
    limited = job(tmp_path / "run", "max_time_s=0.2", "meta_steps=100000", "evaluation.every=0")
    told = train(limited, quiet=True)
    assert told["ended_by"] == "time limit"
    assert 0 < told["meta_steps"] < 100000
    further = train(limited, resume="auto", quiet=True)
    assert further["meta_steps"] > told["meta_steps"]


def test_the_best_weights_by_validation_are_evaluated(tmp_path):
    told = train(job(tmp_path / "run"), quiet=True)
    scores = {row["step"]: row["validation/accuracy"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")
              if "validation/accuracy" in row}  # fmt: skip
    best = max(scores, key=lambda step: (scores[step], -step))
    assert told["evaluated_step"] == best
    assert CheckpointStore(tmp_path / "run" / "checkpoints").load("best").step == best


CONSTANTS = """
import numpy as np
import torch
from torch import nn

from metadist import Task


class Constants:
    \"\"\"Every task of a split has the same targets: 0 in training, 1 in validation, 2 in test.\"\"\"

    outputs = 1

    def __init__(self, seed: int):
        pass

    def __call__(self, task_id):
        y = np.full((3, 1), {"train": 0.0, "validation": 1.0, "test": 2.0}[task_id.split], np.float32)
        return Task.of(np.zeros((3, 1), np.float32), y, np.zeros((3, 1), np.float32), y)


class Level(nn.Module):
    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.level.expand(len(x), 1)
"""


@pytest.mark.parametrize(("split", "before"), [("train", 0.0), ("validation", 1.0), ("test", 4.0)])
def test_each_split_is_used_for_what_the_job_says_and_scored_after_adaptation(tmp_path, monkeypatch, split, before):
    """The level 0 is off by the split's own target; one inner step of rate 1/2 on its square goes there exactly."""
    (tmp_path / "tests_constants.py").write_text(CONSTANTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ["data.family=null", "data.source=tests_constants:Constants", "model.name=tests_constants:Level"]
    own += ["model.hidden=null", "learner.inner_lr=0.5", "evaluation.baselines=[]", f"evaluation.split={split}"]
    told = train(job(tmp_path / "run", *own), quiet=True)
    assert (told["loss"]["before"]["mean"], told["loss"]["after"]["mean"]) == (before, 0.0)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "validation/loss" in row]
    assert {(row["validation/loss_before"], row["validation/loss"]) for row in rows} == {(1.0, 0.0)}


def test_data_that_is_not_there_is_told_before_ray_is_started(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("ray.init", lambda *arguments, **options: asked.append(arguments))
    own = ["data.family=null", f"data.path={tmp_path / 'nowhere'}", "fleet.backend=ray"]
    with pytest.raises(InputError, match="there is no data in"):
        train(job(tmp_path / "run", *own), quiet=True)
    assert not asked


def test_a_resumed_run_deals_the_batches_that_its_journal_has(tmp_path):
    """The journal has 2 tasks for each step, dealt when there was one worker to be; with three it would be 6."""
    growing = ["meta_batch_size=null", "tasks_per_worker=2", "meta_steps=4", "evaluation.every=0", "checkpoint.every=2"]
    first = train(job(tmp_path / "run", *growing, "num_workers=1"), quiet=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    (tmp_path / "run" / "results.json").unlink()
    again = train(job(tmp_path / "run", *growing, "num_workers=3"), resume="auto", quiet=True)
    assert again["theta_sha256"] == first["theta_sha256"]
    assert [row["tasks"] for row in read_journal(tmp_path / "run" / "journal.jsonl") if "tasks" in row] == [2] * 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory, mlflow_database) -> Path:
    """A directory of runs, which share a database of MLflow."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copy(mlflow_database, folder)
    return folder


def recorded(run_dir: Path):
    """MLflow's client, and what it holds of a run."""
    client = MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("metadist")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    (run,) = [run for run in found if run.data.tags["metadist.run_dir"] == str(run_dir)]
    return client, run


def test_mlflow_holds_the_run_and_a_resume_continues_it(runs, figures):
    train(job(runs / "one", "meta_steps=4", mlflow=True), quiet=True)
    train(job(runs / "one", "meta_steps=6", mlflow=True), resume="auto", quiet=True)
    client, run = recorded(runs / "one")
    assert run.info.status == "FINISHED"
    assert run.data.params["learner.inner_lr"] == "0.1"
    assert run.inputs.dataset_inputs[0].dataset.digest
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "validation/accuracy")]
    assert steps == [2, 4, 6]
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert artifacts >= {"config.yaml", "results.json", "adaptation_curve.png", "training_curve.png", "tasks.arrow"}


def test_divergence_is_a_failed_run_with_its_weights_saved(runs):
    with pytest.raises(Diverged, match="learner.inner_lr"):
        train(job(runs / "two", "learner.inner_lr=1e30", "learner.inner_steps=3", mlflow=True), quiet=True)
    assert recorded(runs / "two")[1].info.status == "FAILED"
    assert CheckpointStore(runs / "two" / "checkpoints").steps()


def test_given_weights_are_where_training_starts(tmp_path):
    config = job(tmp_path / "run")
    layout = prepare(Job(config), []).engine.layout
    named = {name: np.full(shape, 0.5, np.float32) for name, shape in zip(layout.names, layout.shapes, strict=True)}
    save_file(named, tmp_path / "start.safetensors")
    prepared = prepare(Job(job(tmp_path / "run", f"model.weights={tmp_path / 'start.safetensors'}")), [])
    assert np.all(prepared.theta == 0.5)
    with pytest.raises(InputError, match="start.safetensors"):
        prepare(Job(job(tmp_path / "run", f"model.weights={tmp_path / 'start.safetensors'}", "model.hidden=[17]")), [])


def test_a_run_from_before_a_setting_existed_goes_on_while_that_is_at_its_default(tmp_path):
    settings = bound_settings(job(tmp_path / "run"))
    del settings["optimizer"]["delay"], settings["engine"], settings["seed"]
    check_settings({"settings": settings}, job(tmp_path / "run"))
    with pytest.raises(InputError, match=r"engine.kind 'auto' -> 'loop'; optimizer.delay 0 -> 1"):
        check_settings({"settings": settings}, job(tmp_path / "run", "optimizer.delay=1", "engine.kind=loop"))


def test_a_validation_that_was_cut_off_is_made_up_for(tmp_path, monkeypatch):
    """Else another step would be the best, or the last would not count."""
    whole = train(job(tmp_path / "whole"), quiet=True)
    measured = []

    def cut_off(*given, **more):
        measured.append(1)
        if len(measured) == 2:
            raise Interrupted(15)
        return measure(*given, **more)

    monkeypatch.setattr("metadist.run.trainer.measure", cut_off)
    with pytest.raises(Interrupted):
        train(job(tmp_path / "run"), quiet=True)
    told = train(job(tmp_path / "run"), resume="auto", quiet=True)
    kept = ("theta_sha256", "evaluated_step", "evaluated_theta_sha256")
    assert [told[key] for key in kept] == [whole[key] for key in kept]
    validated = [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "validation/loss" in row]
    assert validated == [2, 4, 6]


def test_a_run_goes_on_where_it_was_moved_to(tmp_path):
    train(job(tmp_path / "run", "meta_steps=4"), quiet=True)
    before = CheckpointStore(tmp_path / "run" / "checkpoints").load("latest").trainer["progress"]
    (tmp_path / "run").rename(tmp_path / "moved")
    train(job(tmp_path / "moved"), resume="auto", quiet=True)
    progress = CheckpointStore(tmp_path / "moved" / "checkpoints").load("latest").trainer["progress"]
    assert progress["best"] >= before["best"] and progress["since_best"] <= before["since_best"] + 1


def test_what_goes_on_from_another_run_needs_a_place_of_its_own(tmp_path):
    train(job(tmp_path / "one", "meta_steps=2"), quiet=True)
    train(job(tmp_path / "two", "meta_steps=2"), quiet=True)
    with pytest.raises(InputError, match=r"two .*run_dir"):
        train(job(tmp_path / "two"), resume=tmp_path / "one", quiet=True)


def test_checkpoints_in_a_relative_place_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = job(tmp_path / "run", "checkpoint.location=kept")
    theta = train(own, quiet=True)["theta_sha256"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resolved = load_config([tmp_path / "run" / "config.yaml"], [])
    assert train(resolved, resume="auto", quiet=True)["theta_sha256"] == theta
    assert not list((tmp_path / "elsewhere").iterdir())


def test_bits_that_may_differ_once_may_differ_ever_after(tmp_path):
    train(job(tmp_path / "run", "meta_steps=2"), quiet=True)
    told = train(job(tmp_path / "run", "meta_steps=4", "fleet.mixed_devices=true"), resume="auto", quiet=True)
    assert not told["bit_identical"]
    told = train(job(tmp_path / "run"), resume="auto", quiet=True)
    assert not told["bit_identical"]


def test_results_hold_the_protocol_and_the_identity(tmp_path):
    train(job(tmp_path / "run"), quiet=True)
    told = json.loads((tmp_path / "run" / "results.json").read_text())
    assert told["protocol"]["queries"] == 3
    assert told["protocol"]["transductive"] is True
    assert len(told["identity"]) == 16
    assert told["accuracy"]["before"]["ci95"] > 0
