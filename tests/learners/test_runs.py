"""Learners as whole runs: the same theta on any number of workers, and wherever it was resumed.

The three are those that a run could treat differently: one with phases, one that draws, one without inner steps.
"""

from pathlib import Path

import pytest
import yaml

from metadist.config import load_config
from metadist.learners import LEARNERS
from metadist.run.api import train
from metadist.run.evaluate import evaluate

JOB = [
    "data.family=digits", "task.ways=3", "task.shots=2", "task.queries=3", "model.name=mlp", "model.hidden=[8]",
    "meta_batch_size=6", "engine.chunk_size=2", "meta_steps=4", "evaluation.every=0", "evaluation.tasks=4",
    "evaluation.test_tasks=4", "evaluation.baselines=[]", "checkpoint.every=2", "tracking.mlflow=false",
]  # fmt: skip
OWN = {
    "maml++": ["learner.inner_steps=2", "learner.multi_step_until=3", "learner.first_order_until=2"],
}
JOBS = Path(__file__).resolve().parents[2] / "jobs" / "learners"


def go(learner: str, run_dir: Path, *overrides: str, resume: str | None = None, job: list[str] = JOB) -> dict:
    own = [f"learner.name={learner}", f"run_dir={run_dir}", *OWN.get(learner, [])]
    return train(load_config([], [*job, *own, *overrides]), resume=resume, quiet=True)


@pytest.mark.parametrize("learner", ["maml++", "platipus", "r2d2"])
def test_workers_and_resuming_change_no_bit(learner, tmp_path):
    whole = go(learner, tmp_path / "whole", "fleet.backend=local", "num_workers=1")
    go(learner, tmp_path / "parts", "fleet.backend=local", "num_workers=2", "meta_steps=2")
    parts = go(learner, tmp_path / "parts", "fleet.backend=local", "num_workers=3", resume="auto")
    assert parts["theta_sha256"] == whole["theta_sha256"]
    assert parts["accuracy"] == whole["accuracy"]
    config = load_config([tmp_path / "whole" / "config.yaml"], ["num_workers=2"])
    again = evaluate(config, tmp_path / "whole", say=lambda text: None)
    assert again["accuracy"] == whole["accuracy"]


STATISTICS = [
    *(setting for setting in JOB if not setting.startswith("model.")), "model.name=conv4", "model.channels=4",
    "learner.per_step_statistics=true",
    "learner.inner_steps=2", "evaluation.transductive=false", "evaluation.inner_steps=3",
]  # fmt: skip


def test_statistics_are_bits_like_all_others(tmp_path):
    whole = go("maml++", tmp_path / "whole", "fleet.backend=local", "num_workers=1", job=STATISTICS)
    go("maml++", tmp_path / "parts", "fleet.backend=local", "num_workers=2", "meta_steps=2", job=STATISTICS)
    parts = go("maml++", tmp_path / "parts", "fleet.backend=local", resume="auto", job=STATISTICS)
    assert (parts["theta_sha256"], parts["accuracy"]) == (whole["theta_sha256"], whole["accuracy"])
    assert whole["protocol"]["transductive"] is False


@pytest.mark.wide
@pytest.mark.ray
def test_so_it_is_on_ray(ray_cluster, tmp_path):
    """Of a learner that draws from the task's key."""
    local = go("platipus", tmp_path / "local", "fleet.backend=local", "num_workers=1")
    assert go("platipus", tmp_path / "ray", "num_workers=2")["theta_sha256"] == local["theta_sha256"]


def test_every_learner_has_a_job():
    paths = [*JOBS.glob("*.yaml"), *(JOBS.parent / "domains").glob("*.yaml")]
    named = {yaml.safe_load(path.read_text())["learner"]["name"] for path in paths}
    assert named >= set(LEARNERS)


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_jobs_are_valid(path):
    config = load_config([path], [])
    assert config.data.path == "data/omniglot"
