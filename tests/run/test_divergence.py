"""Runs and evaluations in which something stops being finite: told, counted, never chance, never the best."""

import json
import math
import textwrap
from pathlib import Path

import numpy as np
import pytest

import metadist
from metadist.checkpoint.store import CheckpointStore
from metadist.cli.report import report
from metadist.config import load_config
from metadist.core.errors import Diverged
from metadist.evaluation.protocol import count_diverged, interval, summary
from metadist.run.api import train
from metadist.tracking.jsonl import read_metrics

DIGITS = [
    "data.family=digits", "task.ways=3", "task.shots=2", "task.queries=3", "model.name=mlp", "model.hidden=[16]",
    "meta_batch_size=6", "meta_steps=4", "evaluation.every=2", "evaluation.tasks=5", "evaluation.test_tasks=6",
    "evaluation.baseline_tasks=0", "fleet.backend=local", "tracking.mlflow=false",
]  # fmt: skip

OWN = '''
import numpy as np
import torch
from metadist import Task


class Slopes:
    """The meta-gradient is as long as the query target says: `spike` at one meta-step, 1 at the others, `judged` in
    validation. Support targets are 0: nothing adapts."""

    outputs = 1

    def __init__(self, seed, spike=1.0, at=-1, judged=1.0, bad=()):
        self.spike, self.at, self.judged, self.bad = spike, at, judged, bad

    def __call__(self, task_id):
        train = task_id.split == "train"
        slope = self.judged if not train else self.spike if task_id.step == self.at else 1.0
        if not train and task_id.index in self.bad:
            slope = float("inf")
        x, zero = np.ones((2, 1), np.float32), np.zeros(2, np.float32)
        return Task.of(x, zero, x, np.full(2, slope, np.float32))


def loss(outputs, target):
    return (outputs[:, 0] * target).mean()
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "slopes.py").write_text(textwrap.dedent(OWN))
    monkeypatch.syspath_prepend(str(tmp_path))

    def job(name: str, *overrides: str):
        options = [
            "data.source=slopes:Slopes",
            "loss=slopes:loss",
            "model.name=mlp",
            "model.hidden=[3]",
            "meta_steps=6",
        ]
        options += [
            "meta_steps=6",
            "meta_batch_size=2",
            "evaluation.tasks=4",
            "evaluation.test_tasks=4",
            "evaluation.baselines=[]",
        ]
        options += ["evaluation.every=2", "fleet.backend=local", "tracking.mlflow=false", "tracking.log_every=1"]
        return load_config([], [*options, f"run_dir={tmp_path / name}", *overrides])

    return job


def test_an_interval_is_not_that_of_the_tasks_that_did_not_diverge():
    for bad in (math.nan, math.inf, -math.inf):
        assert all(map(math.isnan, interval(np.array([0.5, bad, 1.0]))))
    assert count_diverged(np.array([[1.0, math.nan], [1.0, 2.0], [math.inf, 0.0]]), np.array([0.0, math.nan, 1.0])) == 3


def test_a_summary_counts_the_tasks_that_diverged():
    own = {"accuracy": np.array([[0.5, 1.0], [0.5, math.nan], [0.0, 1.0]])}
    own["loss"] = np.array([[1.0, 2.0], [1.0, 3.0], [1.0, math.inf]])
    told = summary(own | {"ridge/loss": np.array([1.0, math.nan, 2.0])})
    assert told["diverged_tasks"] == 2 and told["baselines"]["ridge"]["diverged_tasks"] == 1
    assert [point["diverged_tasks"] for point in told["accuracy"]["by_inner_step"]] == [0, 1]
    assert told["accuracy"]["before"]["mean"] == pytest.approx(1 / 3) and math.isnan(told["accuracy"]["after"]["mean"])


def test_a_diverged_evaluation_is_no_chance_and_no_best(tmp_path, capfd):
    told = train(load_config([], [*DIGITS, "evaluation.inner_lr=1e25", f"run_dir={tmp_path / 'run'}"]), quiet=True)
    assert math.isnan(told["accuracy"]["after"]["mean"]) and told["diverged_tasks"] == 6
    assert "6 of 6 tasks diverged (an output or loss is not finite), so these figures have no mean: lower " in report(
        told
    )
    assert "none: 6 tasks diverged" in report(told)
    errors = capfd.readouterr().err
    assert errors.count("validation at step 2: 5 of 5 tasks diverged") == 1 and "validation at step 4" not in errors
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    assert saved["accuracy"]["after"]["mean"] is None and (tmp_path / "run" / "adaptation_curve.png").exists()
    assert not CheckpointStore(tmp_path / "run" / "checkpoints").has_best()
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "validation/accuracy" in row]
    assert [row["validation/diverged_tasks"] for row in rows] == [5, 5]
    assert all(math.isnan(row["validation/accuracy"]) for row in rows)
    learner = metadist.load(tmp_path / "run")
    x = np.random.default_rng(0).random((6, 1, 8, 8), np.float32)
    with pytest.raises(Diverged, match="lower inner_lr or inner_steps"):
        learner.adapt(x, np.arange(6) % 3).predict(x)


def test_a_partly_diverged_validation_is_never_the_best(own):
    """Two of four tasks have an infinite loss, in a regression, whose loss would else be the lowest ever."""
    told = train(own("run", "data.options={bad: [1, 3]}"), quiet=True)
    assert told["diverged_tasks"] == 2 and math.isnan(told["loss"]["after"]["mean"])
    rows = [row for row in read_metrics(_metrics(own("run"))) if "validation/loss" in row]
    assert [row["validation/diverged_tasks"] for row in rows] == [2, 2, 2]
    assert not CheckpointStore(_metrics(own("run")).parent / "checkpoints").has_best()


@pytest.mark.parametrize(("judged", "best"), [(1.0, 6), (-1.0, 2)])
def test_the_best_by_loss_is_the_lowest(own, judged, best):
    """Training lowers the outputs, so the loss on validation falls, or rises where its slope is the opposite."""
    config = own("run", f"data.options={{judged: {judged}}}", "meta_lr=0.05")
    told = train(config, quiet=True)
    losses = [row["validation/loss"] for row in read_metrics(_metrics(config)) if "validation/loss" in row]
    assert losses == sorted(losses, reverse=judged > 0) and len(set(losses)) == 3
    assert told["evaluated_step"] == best


def test_a_step_that_would_not_stay_finite_ends_the_run_and_saves_what_was_before(own):
    spiked = own("spiked", "data.options={spike: 1e22, at: 3}", "evaluation.every=0")
    with pytest.raises(Diverged, match=r"meta-step 3.*exp_avg_sq.*optimizer.clip_norm.*\S+(weight|bias)"):
        train(spiked, quiet=True)
    plain = train(own("plain", "meta_steps=3", "evaluation.every=0"), quiet=True)
    kept = CheckpointStore(_metrics(spiked).parent / "checkpoints").load("latest")
    other = CheckpointStore(_metrics(own("plain")).parent / "checkpoints").load("latest")
    assert kept.step == other.step == plain["meta_steps"] == 3
    assert all(np.array_equal(value, other.weights[name]) for name, value in kept.weights.items())
    train(own("clipped", "data.options={spike: 1e22, at: 3}", "optimizer.clip_norm=1"), quiet=True)


def test_a_gradient_a_thousand_times_the_usual_is_told_once_and_changes_no_bit(own, capfd):
    thetas = []
    for spike, told in ((1e6, 1), (100.0, 0)):
        train(own(f"run{told}", f"data.options={{spike: {spike}, at: 3}}"), quiet=True)
        errors = capfd.readouterr().err
        assert errors.count("meta-gradient of meta-step 3 has norm") == told
        assert errors.count("set optimizer.clip_norm to a few times the usual norm") == told
    for options in ("{spike: 1e6, at: 3}", "{spike: 1e6, at: 0}"):
        clipped = own(f"clipped{len(thetas)}", f"data.options={options}", "optimizer.clip_norm=5")
        thetas.append(train(clipped, quiet=True)["theta_sha256"])
        assert "meta-gradient of" not in capfd.readouterr().err
    train(own("first", "data.options={spike: 1e6, at: 0}"), quiet=True)
    assert capfd.readouterr().err.count("meta-gradient of meta-step 0 has norm") == 1


def test_a_joint_baseline_that_diverges_loses_no_other_figure(tmp_path):
    job = ["data.family=sinusoid", "data.options={groups: [50, 5, 5], points: 30}", "task.shots=10", "task.queries=10"]
    job += ["model.name=mlp", "model.hidden=[8]", "meta_batch_size=5", "meta_steps=2", "evaluation.every=0"]
    job += ["evaluation.test_tasks=4", "evaluation.baselines=[joint, ridge]", "evaluation.joint_steps=20"]
    job += ["evaluation.joint_lr=1e30", "fleet.backend=local", "tracking.mlflow=false", f"run_dir={tmp_path / 'run'}"]
    told = train(load_config([], job), quiet=True)
    assert told["baselines"]["joint"]["diverged_tasks"] == 4 and told["diverged_tasks"] == 0
    assert math.isfinite(told["loss"]["after"]["mean"]) and math.isfinite(told["baselines"]["ridge"]["loss"]["mean"])
    assert "4 of 4 tasks of the baseline joint diverged" in report(told)


@pytest.mark.parametrize(("damped", "told"), [([], 1), (["learner.damping=1", "learner.proximal_damping=10"], 0)])
def test_what_imamls_solver_leaves_is_logged_and_told(tmp_path, capfd, damped, told):
    imaml = ["learner.name=imaml", "learner.inner_steps=3", "learner.solver_steps=1", "learner.proximal=0.01", *damped]
    train(load_config([], [*DIGITS, *imaml, "evaluation.every=0", f"run_dir={tmp_path / 'run'}"]), quiet=True)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in row]
    assert rows and all((row["train/solver_residual"] > 0.1) == bool(told) for row in rows)
    assert all(0 <= row["train/negative_curvature"] <= 1 for row in rows)
    assert capfd.readouterr().err.count("iMAML's linear system is not solved: relative residual") == told


def _metrics(config):
    return Path(config.run_dir) / "metrics.jsonl"
