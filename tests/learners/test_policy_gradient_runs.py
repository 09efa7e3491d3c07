"""Meta-reinforcement learning as whole runs: one theta on any number of workers, whoever dies, wherever resumed."""

from pathlib import Path

import pytest

import metadist
from metadist.config import Config, load_config
from metadist.run.api import train
from metadist.run.build import Job
from metadist.run.evaluate import evaluate
from metadist.run.preflight import preflight
from metadist.run.replay import replay
from tests.killed import theta_with_a_worker_killed

JOB = [
    "data.source=metadist.environments:Goals", "model.name=gaussian_policy", "model.hidden=[8]",
    "model.initial_std=0.1",
    "learner.name=policy_gradient", "learner.environment=metadist.environments:Navigation", "learner.trajectories=4",
    "learner.horizon=4", "learner.inner_lr=0.05", "meta_batch_size=8", "engine.chunk_size=2", "meta_steps=20",
    "evaluation.every=0", "evaluation.tasks=3", "evaluation.test_tasks=4", "evaluation.baselines=[]",
    "checkpoint.every=10", "tracking.mlflow=false",
]  # fmt: skip
"""Long enough for what is computed to be recorded."""
LOCAL = "fleet.backend=local"


def job(run_dir: Path, *overrides: str) -> Config:
    return load_config([], [*JOB, f"run_dir={run_dir}", *overrides])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict]:
    """The run on one worker."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    return run_dir, train(job(run_dir, LOCAL, "num_workers=1"), quiet=True)


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_change_no_bit(whole, tmp_path, workers):
    found = train(job(tmp_path / "run", LOCAL, f"num_workers={workers}"), quiet=True)
    assert (found["theta_sha256"], found["return"]) == (whole[1]["theta_sha256"], whole[1]["return"])


def test_resuming_and_replaying_change_no_bit(whole, tmp_path):
    train(job(tmp_path / "run", LOCAL, "num_workers=2", "meta_steps=10"), quiet=True)
    parts = train(job(tmp_path / "run", LOCAL, "num_workers=3"), resume="auto", quiet=True)
    assert (parts["theta_sha256"], parts["return"]) == (whole[1]["theta_sha256"], whole[1]["return"])
    assert replay(tmp_path / "run", print)["theta_sha256"] == parts["theta_sha256"]


def test_a_run_on_environments_of_metadist_is_read_again_without_trust(whole):
    again = evaluate(load_config([whole[0] / "config.yaml"]), whole[0], say=lambda text: None)
    assert again["return"] == whole[1]["return"]
    metadist.load(whole[0])


def test_the_return_is_judged_before_and_after_each_step_against_what_was_asked_for(whole, tmp_path):
    asked = "evaluation.baselines=[initial,joint,tests.examples.meta_rl:knowing_goal]"
    longer = ["evaluation.inner_steps=2", "evaluation.joint_steps=3", "meta_steps=2"]
    found = train(job(tmp_path / "run", LOCAL, asked, *longer), quiet=True)
    assert found["measure"] == {"name": "return", "better": "higher"}
    assert len(found["return"]["by_inner_step"]) == 3
    baselines = {name: own["return"] for name, own in found["baselines"].items()}
    assert baselines["knowing_goal"]["mean"] > found["return"]["after"]["mean"]
    assert len(baselines["initial"]) == len(baselines["joint"]) == 3


@pytest.mark.parametrize("sampling", ["low_variance", "score", "fixed"])
def test_an_estimate_is_neither_refused_nor_warned_of(tmp_path, sampling):
    config = job(tmp_path / "run", LOCAL, f"learner.sampling={sampling}")
    prepared = preflight(Job(config), ["test"], gradient=True)
    assert "estimate" in prepared.gradient and prepared.notes == []


@pytest.mark.ray
def test_a_worker_killed_on_ray_changes_no_bit(ray_cluster, whole, tmp_path):
    assert theta_with_a_worker_killed(job(tmp_path / "run"), 7) == (whole[1]["theta_sha256"], 1)
