"""Heads made from the support set, where labels have gaps or tasks differ in how many classes they have."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from metadist.core.errors import InputError
from metadist.core.task import Task
from metadist.learners import LEARNERS
from metadist.models import Model
from metadist.models.losses import accuracy, confidence, cross_entropy

from .family import CASES
from .small import classification_task, engine_of

MADE = ["protonet", "r2d2", "protomaml", "protomaml, head", "protomaml, body"]
METRICS = {"accuracy": accuracy, "confidence": confidence, "loss": cross_entropy}


def two_and_three_ways() -> list[Task]:
    """Six support and eight query examples each, of two classes and of three."""
    first, second = classification_task(0, ways=2, shots=3), classification_task(1, ways=3, shots=2)
    query = second.query._replace(inputs=(second.query.inputs[0][:8],), targets=(second.query.targets[0][:8],))
    return [first, second._replace(query=query)]


def relabelled(task: Task, labels: list[int]) -> Task:
    """The task with its labels 0, 1, ... called otherwise."""
    parts = [part._replace(targets=(np.array(labels)[part.targets[0]],)) for part in task]
    return Task(*parts)


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "vmap") for name in [*MADE, "task_adaptive"]), ("protomaml", "loop")]
)
def test_a_task_does_not_depend_on_how_many_classes_its_neighbours_have(name, kind):
    engine, theta = engine_of(CASES[name].learner(), kind)
    tasks = two_and_three_ways()
    alone = [engine.meta_gradients(theta, [task]) for task in tasks]
    for order in ([0, 1], [1, 0], [0, 1, 1, 0]):
        found = engine.meta_gradients(theta, [tasks[t] for t in order])
        for place, t in enumerate(order):
            assert torch.allclose(found.rows[place], alone[t].rows[0], rtol=1e-9, atol=1e-15)
            assert found.losses[place] == pytest.approx(float(alone[t].losses[0]), rel=1e-12)
            assert kind == "vmap" or torch.equal(found.rows[place], alone[t].rows[0])
    measured = engine.evaluate(theta, [tasks[1], tasks[0]], METRICS)
    for name, values in engine.evaluate(theta, [tasks[0]], METRICS).items():
        assert torch.allclose(measured[name][1], values[0], rtol=1e-12)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(("labels", "kind"), [([0, 2], "loop"), ([3, 7], "vmap")])
def test_a_gap_in_the_labels_changes_nothing(name, kind, labels):
    """Loss and meta-gradient are those of the same task with labels 0 and 1, and no class is predicted that has no
    support example."""
    engine, theta = engine_of(CASES[name].learner(), kind)
    task = classification_task(0, ways=2, shots=3)
    expected, found = (engine.meta_gradients(theta, [each]) for each in (task, relabelled(task, labels)))
    assert torch.allclose(found.losses, expected.losses, rtol=1e-12)
    assert torch.allclose(found.rows, expected.rows, rtol=1e-9, atol=1e-13)
    far = np.concatenate([scale * np.random.default_rng(0).normal(size=(20, 4)) for scale in (0, 0.1, 1, 10)])
    outputs = engine.adapt(theta, relabelled(task, labels).support)(far)
    assert set(outputs.argmax(dim=1).tolist()) <= set(labels)
    assert torch.equal(outputs.softmax(dim=1)[:, 1], torch.zeros(80, dtype=torch.float64)) and outputs.isfinite().all()


def test_protonets_probabilities_with_a_gap_are_those_of_two_distances():
    learner = CASES["protonet"].learner()
    engine, theta = engine_of(learner)
    task = classification_task(0, ways=2, shots=3)
    network: Any = learner.model.module.double()
    rows = [network.features(torch.from_numpy(part.inputs[0])).detach().numpy() for part in task]
    near = [((rows[1] - rows[0][task.support.targets[0] == c].mean(axis=0)) ** 2).sum(axis=1) for c in (0, 1)]
    expected = 1 / (1 + np.exp(near[0] - near[1]))
    found = engine.adapt(theta, relabelled(task, [0, 4]).support)(task.query.inputs[0]).softmax(dim=1)
    assert np.allclose(found[:, 0], expected, rtol=1e-9) and np.allclose(found[:, 4], 1 - expected, rtol=1e-9)


@pytest.mark.parametrize(("name", "kind"), [("protonet", "loop"), ("protonet", "vmap"), ("protomaml", "vmap")])
@pytest.mark.parametrize("asked", [1, 5])
def test_a_query_of_a_class_without_support_is_refused(name, kind, asked):
    engine, theta = engine_of(CASES[name].learner(), kind)
    task = relabelled(classification_task(0, ways=2, shots=3), [0, 2])
    task = task._replace(query=task.query._replace(targets=(np.full(8, asked),)))
    for compute in (engine.meta_gradients, partial(engine.evaluate, metrics=METRICS)):
        with pytest.raises(InputError, match=f"query set has label {asked}, its support set has none"):
            compute(theta, [classification_task(0, ways=2, shots=3), task])


def test_labels_that_number_no_classes_are_refused_before_memory_ends():
    engine, theta = engine_of(CASES["protonet"].learner())
    with pytest.raises(InputError, match="label 3000000000 in a support set"):
        engine.meta_gradients(theta, [relabelled(classification_task(0, ways=2), [0, 3_000_000_000])])


class Linear(nn.Module):
    """A head alone: features are the inputs themselves."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


def test_without_a_body_ridge_regression_learns_its_numbers_and_prototypes_have_nothing_to_learn():
    engine, theta = engine_of(LEARNERS["r2d2"][0](model=Model(Linear()), loss=cross_entropy))
    assert engine.layout.names == ("ridge/log_lambda", "ridge/scale", "ridge/shift")
    assert engine.meta_gradients(theta, [classification_task()]).rows.isfinite().all()
    for name in ("protonet", "protomaml"):
        with pytest.raises(InputError, match="nothing to meta-learn.* hidden layer"):
            engine_of(LEARNERS[name][0](model=Model(Linear()), loss=cross_entropy))
