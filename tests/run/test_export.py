"""Models as MLflow keeps them: of every kind of task described before the first step; what fails ends no run."""

import errno
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException

from metadist.checkpoint.format import Checkpoint
from metadist.config import dump_config, load_config
from metadist.core.task import Examples, Task, TaskId
from metadist.learners.maml import MAML
from metadist.run.api import train
from metadist.run.build import Job
from metadist.run.export import export_model, unlogged
from metadist.run.pictures import draw_task
from metadist.run.prepare import prepare
from metadist.tracking.logged_model import FewShotModel
from metadist.tracking.models import signature

SMALL = ["meta_batch_size=2", "model.name=mlp", "model.hidden=[8]", "fleet.backend=local"]
DIGITS = [*SMALL, "data.family=digits", "task.ways=3", "task.shots=2", "task.queries=3"]
SINUSOID = [*SMALL, "data.family=sinusoid", "task.shots=5", "task.queries=5"]
UNLIKE = ["maml", "meta_sgd", "maml++", "platipus", "cavia", "r2d2", "protomaml"]
"""Learners that differ in what of them may be changed, or what they compute for a new task."""
OWN = {"cavia": ["model.context=3"]}


class Made:
    """Tasks out of random numbers: fields by the names of their arrays."""

    def __init__(self, seed: int, inputs: str = "values", targets: str = "classes") -> None:
        self.inputs, self.targets = inputs.split("+"), targets.split("+")
        self.outputs = 1 if targets == "one" else 3

    def __call__(self, task: TaskId) -> Task:
        rng = np.random.default_rng([task.step, task.index])
        return Task(self._examples(rng, 6), self._examples(rng, 9))

    def _examples(self, rng: np.random.Generator, n: int) -> Examples:
        arrays = {
            "values": rng.normal(size=(n, 4)).astype("f4"), "doubles": rng.normal(size=(n, 2)),
            "tokens": rng.integers(0, 20, (n, 7)), "mask": np.arange(7) < rng.integers(1, 8, (n, 1)),
            "classes": np.arange(n) % 3, "pair": rng.normal(size=(n, 2)), "one": rng.normal(size=n),
        }  # fmt: skip
        fields = (tuple(arrays[name] for name in names) for names in (self.inputs, self.targets))
        return Examples(*fields)


class Frozen(Made):
    """Gives what numpy refuses, in its evaluation alone."""

    def __call__(self, task: TaskId) -> Task:
        support, query = super().__call__(task)
        if task.split == "test":
            support = support._replace(inputs=tuple(torch.tensor(x, requires_grad=True) for x in support.inputs))
        return Task(support, query)


class Needy(MAML):
    """Looks at the query's targets, which new examples do not have."""

    def predict_query(self, theta, fast, task, transductive):
        assert task.query.targets
        return super().predict_query(theta, fast, task, transductive)


def made(inputs: str, targets: str = "classes", *more: str) -> list[str]:
    options = f"data.options={{inputs: {inputs}, targets: {targets}}}"
    return [*SMALL, "data.source=tests.run.test_export:Made", options, *more]


def prepared_of(job, tmp_path):
    return prepare(Job(load_config([], [*job, f"run_dir={tmp_path / 'run'}"])), ["test"])


KINDS = {
    **{name: [*DIGITS, f"learner.name={name}", *OWN.get(name, [])] for name in UNLIKE},
    "fewer classes": [*DIGITS, "learner.name=protonet", "evaluation.ways=2"],
    "regression": SINUSOID,
    "two inputs": made("values+doubles"),
    "text": made("tokens+mask", "classes", "model.name=bag", "model.vocabulary_size=20", "model.hidden=null"),
    "two targets": made("values", "pair+one"),
    "a target of no dimension": made("doubles", "one"),
}


def exported(prepared, tmp_path):
    job = prepared.job
    weights = prepared.engine.layout.named_arrays(prepared.theta) | prepared.constants
    saved = Checkpoint(0, weights, {}, dump_config(job.config), {}, {"shapes": job.shapes._asdict()})
    return export_model(saved, "best", tmp_path, job.evaluation_source(TaskId("test", 0, 0)), evaluated=True)


def served(model):
    found = FewShotModel()
    found.load_context(SimpleNamespace(artifacts={"checkpoint": str(model.folder)}))
    return found


@pytest.mark.parametrize("kind", ["maml", "regression"])
def test_answers_that_are_not_finite_are_refused(kind, tmp_path):
    prepared = prepared_of(KINDS[kind], tmp_path)
    model = exported(replace(prepared, theta=np.full_like(prepared.theta, np.inf)), tmp_path)
    with pytest.raises(MlflowException, match="params: .*lower lr") as raised:
        served(model).predict(None, model.example)  # pyright: ignore[reportArgumentType]
    assert raised.value.get_http_status_code() == 400


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_every_kind_takes_its_own_example_and_gives_what_it_says(kind, tmp_path):
    prepared = prepared_of(KINDS[kind], tmp_path)
    assert unlogged(prepared) == []
    model = exported(prepared, tmp_path)
    assert set(signature(model).inputs.input_names()) == set(model.inputs) == set(model.example)
    for name, array in model.example.items():
        dtype, shape = model.inputs[name]
        assert array.dtype == dtype and [-1, *array.shape[1:]] == shape
    found = served(model).predict(None, model.example, dict(model.settings))  # pyright: ignore[reportArgumentType]
    assert set(found) == set(model.outputs)
    for name, array in found.items():
        dtype, shape = model.outputs[name]
        assert array.dtype == dtype and array.ndim == len(shape) and len(array) == 1


def test_what_cannot_be_described_is_said_before_the_first_step(tmp_path):
    job = [*SMALL, "data.source=tests.run.test_export:Frozen"]
    (why,) = unlogged(prepared_of(job, tmp_path))
    assert "requires grad" in why
    assert unlogged(prepared_of([*job, "tracking.mlflow=false"], tmp_path)) == []
    own = [*DIGITS, "learner.name=tests.run.test_export:Needy"]
    (why,) = unlogged(prepared_of(own, tmp_path))
    assert "learner.name=tests.run.test_export:Needy" in why


def test_a_model_that_cannot_be_copied_does_not_end_the_run(tmp_path, mlflow_database, monkeypatch, capsys):
    shutil.copy(mlflow_database, tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sync = os.fsync

    def full(descriptor):
        if "/models/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    few = ["meta_steps=1", "evaluation.test_tasks=2", "evaluation.baselines=[]", "evaluation.every=0"]
    results = train(load_config([], [*DIGITS, *few, f"run_dir={tmp_path / 'run'}"]), quiet=True)
    assert "accuracy" in results and (tmp_path / "run" / "results.json").exists()
    said = capsys.readouterr().err
    assert "No space left" in said and "metadist.load" in said


def test_a_task_that_cannot_be_pictured_is_said_and_does_not_end_the_run(tmp_path):
    said: list[str] = []
    whole = prepared_of(DIGITS, tmp_path)
    assert draw_task(whole, whole.theta, tmp_path, said.append) == ["task.png"] and said == []
    assert draw_task(whole, np.full_like(whole.theta, np.nan), tmp_path, said.append) == []
    needy = prepared_of([*DIGITS, "learner.name=tests.run.test_export:Needy"], tmp_path)
    assert draw_task(needy, needy.theta, tmp_path, said.append) == []
    assert [text.startswith("task.png") for text in said] == [True, True]
