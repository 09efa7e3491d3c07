"""What holds of every learner: its meta-gradient is the derivative of its loss, whatever engine computes it."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from metadist.core.random import Draws
from metadist.core.task import Task, TaskId
from metadist.engine import Engine, Method
from metadist.engine.gradient_check import ValueOnly
from metadist.learners import Learner
from metadist.models.losses import accuracy

from .family import CASES, FIRST_ORDER, OWN_ESTIMATOR, Case
from .small import differences, distance

EXACT = [name for name in CASES if name not in OWN_ESTIMATOR + FIRST_ORDER]
METHODS = [Method("vmap"), Method("loop", "remat"), Method("vmap", "remat", spacing=2)]
OF_EACH_KIND = {case.kind: name for name, case in reversed(CASES.items()) if "inner_steps" not in case.options}.values()
STEP = 2


def moved(learner: Learner, engine: Engine) -> Tensor:
    """A theta away from the initial one, where parts of a learner are often zero or equal."""
    generator = torch.Generator().manual_seed(5)
    theta = engine.initial_theta()
    return theta + 0.05 * torch.randn(len(theta), generator=generator, dtype=theta.dtype)


def rows(learner: Learner, method: Method, tasks: list[Task], step: int = STEP) -> Tensor:
    engine = Engine(learner, method, dtype=torch.float64)
    return engine.meta_gradients(moved(learner, engine), tasks, step).rows


@cache
def numeric(name: str) -> Tensor:
    """Central differences of the outer loss, an element of theta at a time."""
    learner, task = CASES[name].learner(), CASES[name].task()
    engine = Engine(learner, "loop", dtype=torch.float64)

    def loss(at: Tensor) -> Tensor:
        draws = Draws(0, TaskId("train", STEP, 0), stream=1)
        return torch.tensor(engine.outer_loss(at, task, ValueOnly(), draws, STEP), dtype=torch.float64)

    return differences(loss, moved(learner, engine))


def descended(case: Case) -> int:
    """How many elements of theta are no statistics."""
    engine = Engine(case.learner(), "loop")
    return engine.layout.size - engine.num_statistics


@pytest.mark.parametrize("name", EXACT)
def test_the_meta_gradient_is_the_derivative_of_the_outer_loss(name):
    case = CASES[name]
    expected, cut = numeric(name), descended(case)
    assert expected.norm() > 1e-3
    for kind in ("loop", "vmap"):
        assert distance(rows(case.learner(), Method(kind), [case.task()])[0, :cut], expected[:cut]) < 1e-6


@pytest.mark.parametrize("name", EXACT)
def test_a_first_order_gradient_would_be_found_out(name):
    case = CASES[name]
    learner = case.learner()
    if not learner.inner_steps:
        pytest.skip("it has no inner loop")
    first, cut = rows(case.learner(first_order=True), Method("loop"), [case.task()])[0], descended(case)
    assert distance(first[:cut], numeric(name)[:cut]) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_every_method_gives_the_same(name):
    case = CASES[name]
    tasks = [case.task(seed) for seed in range(2)]
    expected = rows(case.learner(), Method("loop"), tasks)
    assert expected.norm() > 1e-4
    for method in METHODS:
        for row, same in zip(rows(case.learner(), method, tasks), expected, strict=True):
            assert distance(row, same) < 1e-9


@pytest.mark.parametrize("name", CASES)
def test_evaluation_is_the_same_in_both_engines_and_as_adapt_predicts(name):
    case = CASES[name]
    tasks = [case.task(seed) for seed in range(2)]
    metric = {"m": case.learner().loss if case.regression else accuracy}
    draws = [Draws(0, TaskId("test", 0, 0), 1) for _ in tasks]
    measured = {}
    for kind in ("loop", "vmap"):
        learner = case.learner()
        engine = Engine(learner, kind, dtype=torch.float64)
        theta = moved(learner, engine)
        again = [Draws(0, TaskId("test", 0, 0), 1) for _ in draws]
        measured[kind] = engine.evaluate(theta, tasks, metric, draws=again)["m"]
        assert measured[kind].shape == (2, learner.inner_steps + 1)
        outputs = engine.adapt(theta, tasks[0].support)(*tasks[0].query.inputs)
        target = engine.tensors(tasks[0]).query.targets[0]
        assert torch.allclose(metric["m"](outputs, target), measured[kind][0, -1], rtol=1e-9)
    assert torch.allclose(measured["loop"], measured["vmap"], rtol=1e-9)


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_evaluation_may_take_more_inner_steps_than_training(name):
    case = CASES[name]
    learner = case.learner()
    if not learner.inner_steps:
        pytest.skip("it has no inner loop")
    longer = replace(learner, inner_steps=7)
    assert [(n, v.shape) for n, v in longer.layout().items()] == [(n, v.shape) for n, v in learner.layout().items()]
    engine = Engine(longer, "vmap", dtype=torch.float64)
    metric = {"m": learner.loss}
    assert engine.evaluate(engine.initial_theta(), [case.task()], metric)["m"].shape == (1, 8)


@pytest.mark.parametrize("name", ["fomaml", "maml++, first order", "reptile", "reptile, adam", "imaml", "evolution"])
def test_meta_training_lowers_the_outer_loss(name):
    """Of learners whose meta-gradient is no derivative of it: this catches a sign or a scale that is wrong."""
    learner = CASES[name].learner()
    engine = Engine(learner, "vmap", dtype=torch.float64)
    theta = engine.initial_theta()
    tasks = [CASES[name].task(seed) for seed in range(4)]
    before = engine.meta_gradients(theta, tasks, 20).losses.mean()
    for _ in range(12):
        theta = theta - 0.03 * engine.meta_gradients(theta, tasks, 20).rows.mean(dim=0)
    assert engine.meta_gradients(theta, tasks, 20).losses.mean() < before
