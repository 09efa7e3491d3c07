"""Ways through the inner loop: all give the full unroll's meta-gradients, for learners and networks of every kind."""

from functools import cache
from itertools import cycle

import numpy as np
import pytest
import torch
from torch import Tensor

from metadist.core.errors import InputError
from metadist.engine import Engine, Method
from metadist.learners import MAML, Learner
from metadist.models.losses import cross_entropy, mean_squared_error
from tests.engine.live_bytes import LiveBytes
from tests.engine.networks import NETWORKS, model_of, tasks_of
from tests.learners.small import distance, finite_difference, meta_gradient, regression_task, smooth_model
from tests.learners.unusual import Anchored, Counting, FromSupport, LearnedRates, Nesterov, OwnHead

UNROLL = Method("loop")
METHODS = [
    Method("vmap"),
    *(Method(kind, "remat", n) for kind, n in (("loop", 1), ("loop", 3), ("vmap", 1), ("vmap", 2))),
]
LEARNERS: dict[str, tuple[type[Learner], dict]] = {
    "no step": (MAML, {"inner_steps": 0}),
    "1 step": (MAML, {"inner_steps": 1}),
    "first order": (MAML, {"first_order": True}),
    "head, first order": (MAML, {"adapted": "head.*", "first_order": True}),
    "learned rates": (LearnedRates, {}),
    "momentum": (Nesterov, {}),
    "momentum, first order": (Nesterov, {"first_order": True}),
    "integer state": (Counting, {}),
    "state kept": (Anchored, {}),
    "begins from its support set": (FromSupport, {}),
    "own head": (OwnHead, {}),
}
"""What `tests/learners/family.py` does not have."""
SMOOTH = [name for name in LEARNERS if "first order" not in name and name != "no step"]


def rows(learner: Learner, network: str, method: Method, dtype: torch.dtype = torch.float64) -> Tensor:
    engine = Engine(learner, method, dtype=dtype)
    return engine.meta_gradients(engine.initial_theta(), tasks_of(network)).rows


@pytest.mark.parametrize("name", LEARNERS)
def test_every_method_gives_the_full_unrolls_meta_gradients(name):
    kind, options = LEARNERS[name]

    def learner() -> Learner:
        return kind(model=model_of("mlp"), loss=cross_entropy, **({"inner_steps": 5} | options))

    expected = rows(learner(), "mlp", UNROLL)
    assert expected.norm() > 1e-3
    for method in METHODS:
        for row, same in zip(rows(learner(), "mlp", method), expected, strict=True):
            assert distance(row, same) < 1e-9


@pytest.mark.parametrize("network", [network for network in NETWORKS if network != "mlp"])
def test_every_network_is_differentiated_alike(network):
    def learner() -> Learner:
        return MAML(model=model_of(network), loss=cross_entropy, inner_steps=3)

    expected = rows(learner(), network, UNROLL)
    for method in (Method("vmap"), Method("loop", "remat"), Method("vmap", "remat", 2)):
        for row, same in zip(rows(learner(), network, method), expected, strict=True):
            assert distance(row, same) < 1e-9


@pytest.mark.parametrize(
    ("name", "method"), list(zip(SMOOTH, cycle([Method("loop", "remat"), Method("vmap", "remat", 2)])))
)
def test_a_cheaper_gradient_is_the_derivative_of_the_adapted_models_loss(name, method):
    kind, options = LEARNERS[name]
    own = {"loss": mean_squared_error, "inner_lr": 0.2, "inner_steps": 3} | options
    expected = finite_difference(kind(model=smooth_model(), **own), regression_task())
    assert distance(meta_gradient(kind(model=smooth_model(), **own), regression_task(), method), expected) < 1e-7


def test_an_update_that_returns_other_names_than_began_is_refused():
    class Growing(MAML):
        def update(self, theta, fast, gradient, k):
            after = super().update(theta, fast, gradient, k)
            return after._replace(state={"more": torch.zeros(())})

    engine = Engine(Growing(model=model_of("mlp"), loss=cross_entropy), Method("loop", "remat"))
    with pytest.raises(InputError, match="names"):
        engine.meta_gradients(engine.initial_theta(), tasks_of("mlp"))


def few_digits(method: Method, network: str, seed: int, dtype: torch.dtype) -> Tensor:
    """Meta-gradients of examples that float32 represents exactly."""
    learner = MAML(model=model_of(network, seed), loss=cross_entropy, inner_steps=4, inner_lr=0.3)
    engine = Engine(learner, method, dtype=dtype)
    tasks = [task.map(lambda x: x.astype(np.float32).astype(x.dtype)) for task in tasks_of(network, 2, 10 * seed)]
    return engine.meta_gradients(engine.initial_theta(), tasks).rows.double()


@cache
def unrolled(network: str, seed: int, dtype: torch.dtype) -> Tensor:
    return few_digits(UNROLL, network, seed, dtype)


@pytest.mark.parametrize(
    ("method", "network"),
    [(Method("loop", "remat"), "mlp"), (Method("vmap", "remat", 2), "mlp"), (Method("loop", "remat"), "conv4")],
)
def test_in_float32_a_cheaper_gradient_is_as_exact_as_the_unrolled_one(method, network):
    unroll = cheap = 0.0
    for seed in range(4):
        exact = unrolled(network, seed, torch.float64)
        unroll += distance(unrolled(network, seed, torch.float32), exact)
        cheap += distance(few_digits(method, network, seed, torch.float32), exact)
    assert 0 < cheap < 1.2 * unroll


def peak(method: Method, inner_steps: int) -> int:
    """Bytes held at most while two tasks are computed."""
    learner = MAML(model=model_of("mlp"), loss=cross_entropy, inner_steps=inner_steps)
    engine = Engine(learner, method)
    theta, tasks = engine.initial_theta(), tasks_of("mlp")
    with LiveBytes() as bytes_held:
        engine.meta_gradients(theta, tasks)
    return bytes_held.peak


@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_more_inner_steps_take_the_memory_of_their_fast_weights_and_no_more(kind):
    size = sum(value.numel() for value in model_of("mlp").parameters.values()) * 4 * (2 if kind == "vmap" else 1)
    one, many, spaced = (peak(Method(kind, "remat", n), steps) for n, steps in ((1, 1), (1, 50), (7, 50)))
    assert 40 * size < many - one < 1.1 * 50 * size
    assert 10 * size < spaced - one < 1.1 * 15 * size


@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_an_unrolled_loop_takes_as_much_more_for_every_step(kind):
    size = sum(value.numel() for value in model_of("mlp").parameters.values()) * 4 * (2 if kind == "vmap" else 1)
    few, more, most = (peak(Method(kind), steps) for steps in (2, 12, 22))
    assert more - few > 1.5 * 10 * size
    assert abs((most - more) / (more - few) - 1) < 0.05
