"""What is told to change fits the learner and the data: whatever is named can be typed."""

from pathlib import Path

import numpy as np
import pytest

from metadist.config import load_config
from metadist.core.errors import Diverged
from metadist.data import importers
from metadist.run.api import train
from metadist.run.build import Job
from metadist.run.prepare import Prepared, prepare
from metadist.run.remedies import joined, steadier

SMALL = ["model.name=mlp", "model.hidden=[4]", "meta_batch_size=2", "task.queries=2", "fleet.backend=local"]
DIGITS = ["data.family=digits", "task.ways=3", *SMALL]
FAR = "input 'x' goes from -1000 to 5000, and models learn badly from numbers so far from 0: import with --standardize"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Fifteen users of ten rows: a column from -1000 to 5000, the same divided by 1000, and its double as a value."""
    root, rng = tmp_path_factory.mktemp("tables"), np.random.default_rng(0)
    values = rng.uniform(-900, 4900, size=(15, 10))
    values[:, 0], values[:, 1] = -1000, 5000
    lines = [f"u{user},{x},{x / 1000},{x / 500}" for user, row in enumerate(values) for x in row]
    (root / "table.csv").write_text("\n".join(["user,far,near,value", *lines]) + "\n")
    for name, column, targets, standardize in (
        ("far", "far", (), False), ("near", "near", (), False), ("scaled", "far", (), True),
        ("values", "near", ("value",), False),
    ):  # fmt: skip
        importers.table(
            root / "table.csv", root / name, group="user", inputs=(f"x={column}",), targets=targets,
            standardize=standardize,
        )  # fmt: skip
    return root


def prepared(*settings: str) -> Prepared:
    return prepare(Job(load_config([], [*settings])), ["test"])


def of(folder: Path, name: str, *settings: str) -> Prepared:
    ways = [] if name == "values" else ["task.ways=2"]
    return prepared(f"data.path={folder / name}", "task.shots=2", *ways, *SMALL, *settings)


def test_numbers_far_from_zero_are_scaled_first(folder):
    assert steadier(of(folder, "far"), updated=False) == f"{FAR}; if that is not enough, lower learner.inner_lr"
    assert steadier(of(folder, "far", "learner.name=protonet"), updated=False) == FAR


def test_other_numbers_are_scaled_last_where_they_can_be_and_were_not(folder):
    assert joined(of(folder, "near"), ["A"]) == "A, or scale inputs (`--standardize` at import)"
    assert joined(of(folder, "values"), ["A"]) == "A, or scale inputs and targets (`--standardize` at import)"
    assert joined(of(folder, "scaled"), ["A", "B"]) == "A, or B"
    assert joined(prepared(*DIGITS), ["A"]) == "A"


def test_only_rates_that_the_learner_takes_are_named():
    plain = prepared(*DIGITS)
    assert steadier(plain) == "lower learner.inner_lr or meta_lr, or set optimizer.clip_norm"
    assert steadier(plain, evaluation=True).startswith("lower evaluation.inner_lr or learner.inner_lr or meta_lr")
    assert steadier(plain, updated=False) == "lower learner.inner_lr"
    learned = steadier(prepared(*DIGITS, "learner.name=meta_sgd"), evaluation=True)
    assert learned == "lower learner.highest_rate or meta_lr, or set optimizer.clip_norm"
    closed = prepared(*DIGITS, "learner.name=protonet")
    assert steadier(closed, evaluation=True) == "lower meta_lr, or set optimizer.clip_norm"
    assert "data" in steadier(closed, updated=False) and "inner_lr" not in steadier(closed, updated=False)


def test_a_run_that_diverges_at_its_first_step_on_raw_columns_says_first_that_they_are_to_be_scaled(folder, tmp_path):
    job = [
        f"data.path={folder / 'far'}", "task.ways=2", "task.shots=2", *SMALL, "learner.inner_lr=1e30",
        "learner.inner_steps=3", "evaluation.every=0", "evaluation.baselines=[]", "engine.gradient_check=false",
        "tracking.mlflow=false", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    with pytest.raises(Diverged, match="meta-step 0: input 'x' goes from .* --standardize; if that is not enough, low"):
        train(load_config([], job), quiet=True)
