"""Dropout is a function of the task's key: the same in every engine, another in every task, step and inner step."""

import numpy as np
import pytest
import torch
from torch import nn

from metadist.core.errors import InputError
from metadist.core.random import Draws
from metadist.core.task import TaskId
from metadist.engine import Engine, Method
from metadist.learners import MAML, ProtoNet
from metadist.models import Model
from metadist.models.layers import Dropout
from metadist.models.losses import accuracy, cross_entropy
from tests.learners.small import classification_task, distance

LOOP, VMAP = Method("loop"), Method("vmap")
KEYS = [Draws, (0, TaskId("train", 0, 0), 1)]


class Net(nn.Module):
    def __init__(self, p: float = 0.4):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(p), nn.Linear(8, 8), nn.Tanh(), nn.Dropout(p))
        self.head = nn.Linear(8, 3)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.features(x))


def learner(p: float = 0.4, **options) -> MAML:
    torch.manual_seed(0)
    return MAML(model=Model(Net(p)), loss=cross_entropy, inner_lr=0.2, **({"inner_steps": 3} | options))


def rows(method: Method, p: float = 0.4, step: int = 0, dtype=torch.float64, **options):
    engine = Engine(learner(p, **options), method, dtype=dtype)
    return engine.meta_gradients(engine.initial_theta(), [classification_task(0), classification_task(0)], step).rows


@pytest.mark.parametrize("options", [{}, {"adapted": "head.*"}, {"first_order": True}])
def test_every_method_drops_the_same(options):
    expected = rows(LOOP, **options)
    for method in (VMAP, Method("loop", "remat"), Method("vmap", "remat")):
        assert distance(rows(method, **options), expected) < 1e-9


def test_tasks_and_meta_steps_differ_and_a_repetition_does_not():
    first, same, other = (
        rows(VMAP),
        rows(VMAP),
        rows(VMAP, step=1),
    )
    assert torch.equal(first, same)
    assert distance(first[0], first[1]) > 0.01  # equal examples, another key
    assert distance(first[0], other[0]) > 0.01
    assert distance(first[0], rows(VMAP, p=0.0)[0]) > 0.01


def test_playback_draws_anew():
    engine = Engine(learner(), "vmap")
    plain = Engine(learner(), "loop")
    theta, task = engine.initial_theta(), classification_task(0)
    for step in range(20):
        found, expected = (each.meta_gradients(theta, [task], step).rows for each in (engine, plain))
        assert distance(found, expected) < 1e-4


def test_the_mask_is_another_in_every_inner_step():
    masks = []
    net = learner()

    class Spying(MAML):
        def inner_loss(self, theta, fast, support, k):
            masks.append(fast.state["key of dropout"].item())
            return super().inner_loss(theta, fast, support, k)

    spying = Spying(model=net.model, loss=cross_entropy, inner_steps=3)
    engine = Engine(spying, "loop")
    engine.meta_gradients(engine.initial_theta(), [classification_task(0)])
    assert len(masks) == 3 and len(set(masks)) == 3


def test_evaluation_and_predictions_drop_nothing():
    task, found = classification_task(0), []
    for p in (0.0, 0.4):
        engine = Engine(learner(p), "vmap", dtype=torch.float64)
        theta = engine.initial_theta()
        found.append(engine.evaluate(theta, [task], {"loss": cross_entropy, "accuracy": accuracy})["loss"])
        found.append(engine.adapt(theta, task.support)(*task.query.inputs))
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_the_layer_keeps_the_mean_and_drops_the_share():
    layer = Dropout(0.3)
    layer.key = torch.tensor(5)
    out = layer(torch.ones(400, 500))
    assert abs(float((out == 0).float().mean()) - 0.3) < 0.01
    assert abs(float(out.mean()) - 1) < 0.01
    whole = Dropout(0.3, whole=True)
    whole.key = torch.tensor(5)
    maps = whole(torch.ones(50, 40, 3, 3)).flatten(2)
    assert torch.equal(maps.amin(2), maps.amax(2)) and {0.0} < set(np.unique(maps.numpy()).round(4).tolist())


def test_learners_that_take_features_by_themselves_refuse_it():
    torch.manual_seed(0)
    with pytest.raises(InputError, match="without dropout: set its p to 0"):
        ProtoNet(model=Model(Net()), loss=cross_entropy).layout()
