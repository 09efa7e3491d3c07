"""What tasks may hold: labels of any width, none outside the outputs, and numbers only."""

from dataclasses import replace
from functools import partial
from itertools import cycle

import numpy as np
import pytest
import torch

from metadist.core.errors import InputError
from metadist.core.task import Examples, Task, Tasks, stack
from metadist.engine import Engine
from metadist.models.losses import accuracy, cross_entropy
from tests.learners.family import CASES
from tests.learners.small import classification_task, engine_of

KINDS = ["loop", "vmap"]
WIDTHS = ["int8", "int16", "int32", "uint8", "uint16", "uint32", "uint64"]
NAMES = ["maml", "protonet", "task_adaptive"]
METRICS = {"accuracy": accuracy, "loss": cross_entropy}


def with_targets(task: Task, change) -> Task:
    return Task(*(part._replace(targets=(change(part.targets[0]),)) for part in task))


@pytest.mark.parametrize(("width", "name", "kind"), list(zip(WIDTHS, cycle(NAMES), cycle(KINDS))))
def test_labels_of_any_width_give_the_bits_of_int64(width, name, kind):
    engine, theta = engine_of(CASES[name].learner(), kind)
    tasks = [classification_task(0), classification_task(1)]
    narrow = [with_targets(task, lambda y: y.astype(width)) for task in tasks]
    stacked = Tasks(stack(narrow, np.stack))
    tensors = [with_targets(task, lambda y: torch.from_numpy(y.astype(width))) for task in tasks]
    expected, measured = engine.meta_gradients(theta, tasks), engine.evaluate(theta, tasks, METRICS)
    for given in (narrow, stacked, tensors, [narrow[0], tasks[1]]):
        assert torch.equal(engine.meta_gradients(theta, given).rows, expected.rows)
        assert torch.equal(engine.evaluate(theta, given, METRICS)["accuracy"], measured["accuracy"])
    query = tasks[0].query.inputs[0]
    found, same = (engine.adapt(theta, task.support)(query) for task in (narrow[0], tasks[0]))
    assert torch.equal(found, same)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("calls", "label"), [(0, -100), (20, -1), (20, 7), (0, 3)])  # also where it is played back
def test_a_label_that_is_no_output_is_named(kind, calls, label):
    engine, theta = engine_of(CASES["maml"].learner(), kind)
    good = classification_task(0)
    for number in range(calls):
        engine.meta_gradients(theta + 0.01 * number, [good])
        engine.evaluate(theta + 0.01 * number, [good], METRICS)
    for part in (0, 1):
        bad = Task(*(p._replace(targets=(p.targets[0].copy(),)) for p in good))
        bad[part].targets[0][1] = label
        for compute in (engine.meta_gradients, partial(engine.evaluate, metrics=METRICS)):
            with pytest.raises(InputError, match=rf"label {label} is none of the model's 3 outputs: .* from 0 to 2"):
                compute(theta, [bad])


def test_labels_beyond_int64_are_refused():
    engine, theta = engine_of(CASES["maml"].learner())
    with pytest.raises(InputError, match="label 9223372036854775810 is too large"):
        engine.meta_gradients(theta, [with_targets(classification_task(0), lambda y: y.astype("uint64") + 2**63)])


def without_some(outputs, target):
    return torch.nn.functional.cross_entropy(outputs, target, ignore_index=-100)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_of_ones_own_may_leave_examples_out(kind):
    engine, theta = engine_of(replace(CASES["maml"].learner(), loss=without_some), kind)
    task = classification_task(0)
    some = np.where(np.arange(9) < 6, task.query.targets[0], -100)
    marked = task._replace(query=task.query._replace(targets=(some,)))
    first = Examples((task.query.inputs[0][:6],), (task.query.targets[0][:6],))
    cut = task._replace(query=first)
    found, expected = (engine.meta_gradients(theta, [each]).rows for each in (marked, cut))
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("change", [lambda x: x.astype(object), lambda x: x.astype(complex), lambda x: x.astype(str),
                                    lambda x: torch.from_numpy(x.astype(np.complex64))],
                         ids=["object", "complex", "text", "complex tensor"])  # fmt: skip
@pytest.mark.parametrize(("where", "kind"), [("inputs", "loop"), ("targets", "vmap")])
def test_what_is_no_real_number_is_refused(change, where, kind):
    engine = Engine(CASES["maml"].learner(), kind, dtype=torch.float64)
    task = classification_task(0)
    task = Task(*(part._replace(**{where: tuple(map(change, getattr(part, where)))}) for part in task))
    with pytest.raises(InputError, match="a task holds an array of .*: give real numbers"):
        engine.meta_gradients(engine.initial_theta(), [task])


def test_whole_numbers_that_are_inputs_stay_as_they_are():
    engine = Engine(CASES["maml"].learner(), dtype=torch.float64)
    task = engine.tensors(Task.of(*(np.arange(3, dtype=np.int32) for _ in range(4))))
    assert task.support.inputs[0].dtype == torch.int32 and task.support.targets[0].dtype == torch.int64
