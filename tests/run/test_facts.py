import json
import shlex
from typing import Any

import numpy as np
import pytest

from metadist.config import load_config
from metadist.core.errors import SUBMITTED_BY
from metadist.core.task import Examples, Task
from metadist.data import importers, open_dataset
from metadist.data.description import far_from_zero
from metadist.run.api import train
from metadist.run.build import Job
from metadist.run.evaluate import evaluate
from metadist.run.facts import closed_form, columns, smaller_rates
from metadist.run.identity import train_command
from metadist.run.prepare import Prepared, prepare

DIGITS = [
    "data.family=digits", "task.ways=3", "task.shots=1", "task.queries=2", "model.name=mlp", "model.hidden=[4]",
    "meta_batch_size=4", "meta_steps=2", "learner.inner_lr=0.1", "learner.inner_steps=2", "evaluation.inner_steps=3",
    "evaluation.every=1", "evaluation.tasks=4", "evaluation.test_tasks=6", "fleet.backend=local",
    "evaluation.baseline_tasks=0", "tracking.mlflow=false",
]  # fmt: skip
SINUSOID = [
    "data.family=sinusoid", "data.options={groups: [60, 5, 5], points: 30}", "task.shots=10", "task.queries=5",
    "model.name=mlp", "meta_batch_size=4", "fleet.backend=local",
]  # fmt: skip


def prepared(*settings: str) -> Prepared:
    return prepare(Job(load_config([], list(settings))), ["test"])


def settings_of(advice: str) -> list[str]:
    """What is typed behind the command that a piece of advice has in it."""
    return [word for word in shlex.split(advice.split("`")[1])[2:] if "=" in word and not word.startswith("run_dir=")]


@pytest.mark.parametrize(
    ("job", "learner"),
    [
        ([*DIGITS, "model.name=conv4", "model.hidden=null", "model.channels=4", "learner.name=anil"], "r2d2"),
        ([*SINUSOID, "learner.name=meta_sgd"], "r2d2"),
    ],
)  # fmt: skip
def test_the_settings_of_a_closed_form_are_those_of_a_job_that_can_be_trained(job, learner):
    here = prepared(*job)
    typed = shlex.split(closed_form(here, here.job.training_groups()))
    other = prepared(*job, *typed)
    assert other.job.config.learner.name == learner
    assert other.engine.learner.inner_steps == 0 and np.isfinite(other.theta).all()


def test_many_classes_keep_their_model_and_get_class_means():
    typed = closed_form(prepared(*DIGITS), 900)
    assert typed.split()[0] == "learner.name=protonet" and "model." not in typed
    prepared(*DIGITS, *shlex.split(typed))


def test_numbers_of_things_are_no_sizes(tmp_path):
    """An identifier and an action of up to 200, beside a column from -1 to 1: nothing is far from 0."""
    n = 400
    text = "".join(f"u{i % 8},{(-1) ** i * (i % 5) / 4},i{i // 2},{i // 2},{i % 7 / 7}\n" for i in range(n))
    (tmp_path / "log.csv").write_text("user,x,item,shown,paid\n" + text)
    asked: dict[str, Any] = {
        "inputs": ["x", "item"],
        "identifiers": ["item"],
        "targets": ["shown", "paid"],
        "integers": ["shown"],
    }
    data = importers.table(tmp_path / "log.csv", tmp_path / "data", group="user", fractions=(1, 0, 0), **asked)
    assert far_from_zero(open_dataset(data)) == []
    plain = importers.table(tmp_path / "log.csv", tmp_path / "plain", group="user", inputs=["shown"], targets=["paid"])
    assert len(far_from_zero(open_dataset(plain))) == 1
    sizes = ["task.shots=5", "task.queries=5", "meta_batch_size=4", "fleet.backend=local", "evaluation.baselines=[]"]
    sizes += ["loss=tests.run.test_inputs:of_what_was_shown", "model.outputs=200"]
    here = prepare(Job(load_config([], [f"data.path={data}", *sizes])), ["train"])
    assert here.job.shapes.vocabularies == [None, 201]
    found = columns(here)
    assert found is not None and found[1] < 1


def test_columns_are_judged_as_tasks_have_them():
    """Deviations 2 and 500, the second column around 1000; a constant one has no deviation; pictures none of these."""
    x = np.array([[-2.0, 500, 7], [2.0, 1500, 7]], np.float32)
    here = prepared(*SINUSOID)
    task = Task.of(x, np.zeros((2, 1)), x, np.zeros((2, 1)))
    largest = np.sqrt((500**2 + 1500**2) / 2)
    found = columns(here.__class__(**{**vars(here), "chunk": [task]}))
    assert found == pytest.approx((2.0, largest))
    pictures = Task(*(Examples((np.zeros((2, 1, 8, 8), np.float32),), (np.zeros((2, 1)),)) for _ in range(2)))
    assert columns(here.__class__(**{**vars(here), "chunk": [pictures]})) is None


@pytest.mark.parametrize(
    ("learner", "typed"),
    [
        (["learner.name=maml"], "learner.inner_lr=0.01"),
        (["learner.name=meta_sgd", "learner.inner_lr=null"], "learner.lowest_rate=0.0005 learner.highest_rate=0.01"),
    ],
)
def test_smaller_inner_rates_are_settings_that_the_learner_takes(learner, typed):
    here = prepared(*DIGITS, *learner)
    assert smaller_rates(here.engine.learner) == typed
    prepared(*DIGITS, *learner, *typed.split())


def test_a_run_that_is_not_ahead_says_what_to_try_and_that_can_be_typed(tmp_path):
    config = load_config([], [*DIGITS, f"run_dir={tmp_path / 'run'}"])
    results = train(config, quiet=True)
    assert results["verdict"].startswith(("behind", "level"))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["advice"] == results["advice"]
    assert results["few_tasks"].startswith("6 tasks of split 'test' are drawn from only 1 different set of classes")
    retrained = next(text for text in results["advice"] if "`metadist train" in text and "learner.name" in text)
    saved = tmp_path / "run" / "config.yaml"
    assert f"`metadist train {saved} run_dir={tmp_path / 'run_next'} " in retrained
    other = load_config([saved], [*settings_of(retrained), f"run_dir={tmp_path / 'next'}"])
    assert train(other, quiet=True)["protocol"]["learner"] == "r2d2"


def test_an_evaluation_says_it_too_and_a_run_without_a_comparison_says_nothing(tmp_path):
    run = tmp_path / "run"
    assert "advice" not in train(load_config([], [*DIGITS, f"run_dir={run}", "evaluation.baselines=[]"]), quiet=True)
    config = load_config([run / "config.yaml"], ["evaluation.baselines=[logistic_regression]"])
    results = evaluate(config, run, say=lambda text: None)
    assert results["verdict"].startswith(("behind", "level")) and str(run) in str(results["advice"])


def test_where_labels_mean_the_same_for_all_one_model_of_all_rows_is_a_baseline(tmp_path):
    """The sign of a column is the label of every user: trees know it before they see one of his rows."""
    rng = np.random.default_rng(0)
    lines = [f"u{user},{x},{rng.normal()},{int(x > 0)}" for user in range(20) for x in rng.uniform(-1, 1, 24)]
    (tmp_path / "table.csv").write_text("\n".join(["user,a,b,sign", *lines]) + "\n")
    importers.table(tmp_path / "table.csv", tmp_path / "users", group="user", inputs=("x=a,b",), targets=("sign",))
    job = [
        f"data.path={tmp_path / 'users'}", "task.scheme=labelled", "task.ways=2", "task.shots=1", "task.queries=3",
        "model.name=mlp", "model.hidden=[4]", "meta_batch_size=4", "meta_steps=2", "evaluation.every=0",
        "evaluation.test_tasks=20", "evaluation.baseline_tasks=0", "fleet.backend=local", "tracking.mlflow=false",
    ]  # fmt: skip
    assert "pooled" not in Job(load_config([], job)).baselines()
    results = train(load_config([], [*job, "task.permute_labels=false", f"run_dir={tmp_path / 'run'}"]), quiet=True)
    assert results["baselines"]["pooled"]["accuracy"]["mean"] > 0.9
    assert results["verdict"].startswith("behind its best baseline, pooled")
    assert any("one model for all may do" in text for text in results["advice"])


def test_what_goes_on_with_a_submitted_job_is_submitting(monkeypatch):
    config = load_config([], ["data.family=digits", "loss=own:loss"])
    assert train_command(config, "runs/a b/") == "metadist train 'runs/a b/config.yaml' --trust-code"
    resumed = train_command(config, "runs/a", resume=True)
    assert resumed == "metadist train runs/a/config.yaml --trust-code --resume auto"
    monkeypatch.setenv(SUBMITTED_BY, "1.0")
    assert train_command(config, "s3://b/runs/a", resume=True) == "metadist submit JOB.yaml --address URL"
