from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

from metadist.engine import Engine
from metadist.engine.frozen_trunk import trunk_of
from metadist.learners import MAML, Learner
from metadist.models import MLP, Model
from metadist.models.losses import accuracy, cross_entropy
from tests.engine.networks import model_of, tasks_of
from tests.learners.small import distance
from tests.learners.unusual import OwnHead

METRICS = {"accuracy": accuracy, "loss": cross_entropy}
SPLIT = ["mlp", "conv4", "pooled", "bag", "resnet12"]


def small(kind: type[MLP]) -> Model:
    torch.manual_seed(0)
    return Model(kind([[4]], 3, hidden=(5,)))


def anil(model: Model, **options) -> Learner:
    return MAML(model=model, loss=cross_entropy, adapted="head.*", **({"inner_steps": 3} | options))


def pair(make: Callable[[], Learner], kind: str = "loop") -> tuple[Engine, Engine]:
    """An engine that may split the model, and one that may not: a learner of a class of one's own is left whole."""
    learner = make()
    own = type("Own", (type(learner),), {"__module__": __name__})
    whole = own(**{field.name: getattr(learner, field.name) for field in fields(learner)})
    return Engine(make(), kind, dtype=torch.float64), Engine(whole, kind, dtype=torch.float64)


def has_trunk(learner: Learner, network: str = "mlp") -> bool:
    engine = Engine(learner, dtype=torch.float64)
    theta = engine.layout.unflatten(engine.initial_theta())
    return trunk_of(learner, theta, engine.tensors(tasks_of(network)[0])) is not None


class FeaturesIsALayer(nn.Module):
    """As torchvision's networks: `features` is a layer, and forward does more than head(features(x))."""

    def __init__(self, *_, **__):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class AnotherForward(MLP):
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.features(*inputs)))


class TiedHead(MLP):
    def __init__(self, *_, **__):
        super().__init__([[4]], 3, hidden=(5, 3, 5))
        self.head.weight = self.body[2].weight


class FeaturesOfAnotherSort(MLP):
    def features(self, x: Tensor, layer: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.body[:layer](x)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.head(self.features(x, 2))


class SeveralFeatures(MLP):
    def features(self, x: Tensor) -> list[Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return [self.body(x)]

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.head(self.features(x)[0])


class FixedBody(MLP):
    """A pretrained network of which only the head is learned, with a buffer in the head."""

    def __init__(self, *_, **__):
        super().__init__([[4]], 3, hidden=(5,))
        self.body.requires_grad_(False)
        self.head = Scaled(5, 3)


class Scaled(nn.Linear):
    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


class Decayed(MAML):
    """Its outer loss has a penalty on all of theta."""

    def outer_loss(self, theta, fast, query, context):
        return super().outer_loss(theta, fast, query, context) + sum(value.square().sum() for value in theta.values())


class ClassMeans(MAML):
    """Begins with a head made of the features' means."""

    def begin(self, theta, support, context):
        shift = self.model.features(theta, *support.inputs).mean(dim=0)
        fast = super().begin(theta, support, context)
        return fast._replace(weights=fast.weights | {"head.weight": fast.weights["head.weight"] + shift})


class Reflected(MAML):
    """Reads the inputs themselves: it predicts for an example and its mirror image."""

    def predict(self, theta, fast, inputs):
        return super().predict(theta, fast, inputs) + super().predict(theta, fast, tuple(-x for x in inputs))


@pytest.mark.parametrize("network", SPLIT)
def test_where_only_the_head_adapts_the_built_in_networks_are_split(network):
    assert has_trunk(anil(model_of(network)), network)
    assert not has_trunk(MAML(model=model_of(network), loss=cross_entropy), network)
    assert not has_trunk(MAML(model=model_of(network), loss=cross_entropy, adapted="head.*,body.*"), network)


def test_a_learner_with_mathematics_of_its_own_is_left_whole():
    assert not has_trunk(OwnHead(model=model_of("mlp"), loss=cross_entropy))


@pytest.mark.parametrize("kind", [FeaturesIsALayer, AnotherForward, TiedHead])
def test_a_module_that_is_not_a_head_on_features_is_left_whole(kind):
    assert not has_trunk(anil(small(kind)))


@pytest.mark.parametrize("kind", [FeaturesOfAnotherSort, SeveralFeatures])
def test_a_method_called_features_may_be_something_else(kind):
    assert not has_trunk(anil(small(kind)))


@pytest.mark.parametrize("kind", ["loop", "vmap"])
@pytest.mark.parametrize(("network", "steps"), [("mlp", 0), *((network, 3) for network in SPLIT)])
def test_a_split_network_has_the_meta_gradients_of_the_whole(network, steps, kind):
    split, whole = pair(lambda: anil(model_of(network), inner_steps=steps), kind)
    theta, tasks = split.initial_theta(), tasks_of(network)
    one, other = split.meta_gradients(theta, tasks), whole.meta_gradients(theta, tasks)
    assert has_trunk(split.learner, network) and not has_trunk(whole.learner, network)
    assert torch.allclose(one.losses, other.losses, rtol=1e-12)
    assert all(distance(row, same) < 1e-12 for row, same in zip(one.rows, other.rows, strict=True))


def unaware(kind: type[Learner], reason: str):
    return pytest.param(kind, {"adapted": "head.*"}, id=reason)


@pytest.mark.parametrize("kind", ["loop", "vmap"])
@pytest.mark.parametrize(("learner", "options"), [
    (MAML, {"adapted": "head.*", "first_order": True}),
    (OwnHead, {"inner_steps": 3}),
    unaware(Decayed, "theta lacks the trunk, and holds the features, where a learner reads it whole"),
    unaware(ClassMeans, "the model given to a learner of the head has no features()"),
    unaware(Reflected, "a learner that computes with its inputs computes with row numbers"),
])  # fmt: skip
def test_a_learner_need_not_know_of_the_split(learner, options, kind):
    split, whole = pair(lambda: learner(model=model_of("conv4"), loss=cross_entropy, **options), kind)
    theta, tasks = split.initial_theta(), tasks_of("conv4")
    rows = [engine.meta_gradients(theta, tasks).rows for engine in (split, whole)]
    assert distance(*rows) < 1e-12


@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_a_fixed_body_and_a_head_with_a_buffer_are_split(kind):
    split, whole = pair(lambda: anil(small(FixedBody)), kind)
    theta, tasks = split.initial_theta(), tasks_of("mlp")
    rows = [engine.meta_gradients(theta, tasks).rows for engine in (split, whole)]
    assert has_trunk(split.learner) and rows[0].shape == (2, 18) and distance(*rows) < 1e-12


@pytest.mark.parametrize("transductive", [True, False])
@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_a_split_network_evaluates_as_the_whole(kind, transductive):
    split, whole = pair(lambda: anil(model_of("conv4"), inner_lr=0.5), kind)
    theta, tasks = split.initial_theta(), tasks_of("conv4")
    one, other = (engine.evaluate(theta, tasks, METRICS, transductive) for engine in (split, whole))
    assert has_trunk(split.learner, "conv4") and one["loss"].shape == (2, 4)
    assert torch.equal(one["accuracy"], other["accuracy"])
    assert torch.allclose(one["loss"], other["loss"], rtol=1e-12)


@pytest.mark.parametrize("kind", ["loop", "vmap"])
@pytest.mark.parametrize("steps", [1, 7])
def test_the_trunk_is_computed_once_for_each_set_of_a_task(steps, kind):
    learner = anil(model_of("conv4"), inner_steps=steps)
    calls: list[int] = []
    learner.model.module.body.register_forward_hook(lambda *_: calls.append(1))
    engine = Engine(learner, kind)
    theta, tasks = engine.initial_theta(), tasks_of("conv4", 3)
    engine.meta_gradients(theta, tasks)
    for compute in (lambda: engine.meta_gradients(theta, tasks), lambda: engine.evaluate(theta, tasks, METRICS)):
        calls.clear()
        compute()
        assert len(calls) == 2 * (3 if kind == "loop" else 1)
