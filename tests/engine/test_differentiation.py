from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from metadist.core.errors import InputError
from metadist.engine import Engine, Method
from metadist.learners import MAML, Learner, Reptile
from metadist.learners.inner_optimizers import Adam
from metadist.models.losses import cross_entropy, mean_squared_error
from tests.engine.live_bytes import LiveBytes
from tests.engine.networks import NETWORKS, model_of, tasks_of
from tests.learners.small import distance, finite_difference, meta_gradient, regression_task, smooth_model
from tests.learners.unusual import Anchored, Counting, FromSupport, LearnedRates, Nesterov, OwnHead

WAYS = [("unroll", 1)] + [(mode, spacing) for mode in ("remat", "adjoint") for spacing in (1, 2, 3)]
METHODS = {f"{kind}-{mode}-{n}": Method(kind, mode, n) for kind in ("loop", "vmap") for mode, n in WAYS}
FULL_UNROLL = METHODS.pop("loop-unroll-1")
FEW = ["loop-remat-1", "loop-adjoint-1", "vmap-remat-2", "vmap-adjoint-2"]

VARIANTS: dict[str, tuple[type[Learner], dict]] = {
    "maml": (MAML, {}),
    "maml, no step": (MAML, {"inner_steps": 0}),
    "maml, 1 step": (MAML, {"inner_steps": 1}),
    "maml, 3 steps": (MAML, {"inner_steps": 3}),
    "first order": (MAML, {"first_order": True}),
    "head": (MAML, {"adapted": "head.*"}),
    "head, first order": (MAML, {"adapted": "head.*", "first_order": True}),
    "body": (MAML, {"adapted": "body.*"}),
    "reptile": (Reptile, {}),
    "reptile, minibatches": (Reptile, {"inner_batch": 4}),
    "reptile, adam": (Reptile, {"inner_batch": 4, "inner_optimizer": Adam(beta1=0.0), "inner_lr": 0.01}),
    "learned rates": (LearnedRates, {}),
    "learned rates, first order": (LearnedRates, {"first_order": True}),
    "momentum": (Nesterov, {}),
    "momentum, first order": (Nesterov, {"first_order": True}),
    "integer state": (Counting, {}),
    "state kept": (Anchored, {}),
    "begins from its support set": (FromSupport, {}),
    "own head": (OwnHead, {}),
}
SMOOTH = {
    name: own for name, own in VARIANTS.items() if not any(word in name for word in ("reptile", "first", "no step"))
}


def rows(variant: str, network: str, method: Method, **options) -> Tensor:
    kind, own = VARIANTS[variant]
    learner = kind(model=model_of(network), loss=cross_entropy, **({"inner_steps": 5} | own | options))
    engine = Engine(learner, method, dtype=torch.float64)
    return engine.meta_gradients(engine.initial_theta(), tasks_of(network)).rows


@cache
def unrolled(variant: str, network: str, **options) -> Tensor:
    return rows(variant, network, FULL_UNROLL, **options)


@pytest.mark.parametrize(
    ("method", "variant"),
    [
        (method, variant)
        for method in METHODS
        for variant in VARIANTS
        if variant in ("maml", "learned rates", "momentum", "integer state") or method in [*FEW, "vmap-unroll-1"]
    ],
)
def test_every_method_gives_the_full_unrolls_meta_gradients(method, variant):
    expected = unrolled(variant, "mlp")
    assert expected.norm() > 1e-3
    for row, same in zip(rows(variant, "mlp", METHODS[method]), expected, strict=True):
        assert distance(row, same) < 1e-9


@pytest.mark.parametrize("method", FEW)
@pytest.mark.parametrize("network", [network for network in NETWORKS if network != "mlp"])
def test_every_network_is_differentiated_alike(method, network):
    if network == "pooled" and "loop-adjoint" in method:
        with pytest.raises(InputError, match="engine.differentiation=adjoint needs forward-mode .* use remat"):
            rows("maml", network, METHODS[method], inner_steps=3)
        return
    expected = unrolled("maml", network, inner_steps=3)
    for row, same in zip(rows("maml", network, METHODS[method], inner_steps=3), expected, strict=True):
        assert distance(row, same) < 1e-9


def squared(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs.squeeze(1) - target).square().mean()


def smooth_learner(variant: str) -> Learner:
    kind, own = SMOOTH[variant]
    return kind(model=smooth_model(), **({"loss": squared, "inner_lr": 0.2, "inner_steps": 3} | own))


@cache
def derivative(variant: str) -> Tensor:
    return finite_difference(smooth_learner(variant), regression_task())


@pytest.mark.parametrize("variant", SMOOTH)
@pytest.mark.parametrize("method", ["loop-remat-1", "loop-adjoint-2", "vmap-remat-2", "vmap-adjoint-1"])
def test_a_cheaper_gradient_is_the_derivative_of_the_adapted_models_loss(method, variant):
    gradient = meta_gradient(smooth_learner(variant), regression_task(), METHODS[method])
    assert distance(gradient, derivative(variant)) < 1e-7


@pytest.mark.parametrize("method", ["loop-adjoint-1", "vmap-adjoint-1"])
def test_a_loss_without_forward_mode_is_refused_with_the_remedy(method):
    learner = MAML(model=smooth_model(), loss=mean_squared_error, inner_lr=0.2, inner_steps=3)
    with pytest.raises(InputError, match="engine.differentiation=adjoint needs forward-mode .* use remat"):
        meta_gradient(learner, regression_task(), METHODS[method])


def in_float32(method: Method, network: str, seed: int, dtype: torch.dtype) -> Tensor:
    learner = MAML(model=model_of(network, seed), loss=cross_entropy, inner_steps=4, inner_lr=0.3)
    engine = Engine(learner, method, dtype=dtype)
    tasks = [task.map(lambda x: x.astype(np.float32).astype(x.dtype)) for task in tasks_of(network, 2, 10 * seed)]
    return engine.meta_gradients(engine.initial_theta(), tasks).rows.double()


@cache
def in_float64(network: str, seed: int) -> Tensor:
    return in_float32(FULL_UNROLL, network, seed, torch.float64)


@pytest.mark.parametrize(
    ("method", "network"),
    [(method, "mlp") for method in FEW] + [("loop-remat-1", "conv4"), ("loop-adjoint-1", "conv4")],
)
def test_in_float32_a_cheaper_gradient_is_as_exact_as_the_unrolled_one(method, network):
    unroll, cheap = (
        sum(distance(in_float32(each, network, seed, torch.float32), in_float64(network, seed)) for seed in range(4))
        for each in (FULL_UNROLL, METHODS[method])
    )
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
@pytest.mark.parametrize("mode", ["remat", "adjoint"])
def test_more_inner_steps_take_the_memory_of_their_fast_weights_and_no_more(mode, kind):
    size = sum(value.numel() for value in model_of("mlp").parameters.values()) * 4 * (2 if kind == "vmap" else 1)
    one, many, spaced = (peak(Method(kind, mode, n), steps) for n, steps in ((1, 1), (1, 50), (7, 50)))
    assert 40 * size < many - one < 1.1 * 50 * size
    assert 10 * size < spaced - one < 1.1 * 15 * size


@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_an_unrolled_loop_takes_as_much_more_for_every_step(kind):
    size = sum(value.numel() for value in model_of("mlp").parameters.values()) * 4 * (2 if kind == "vmap" else 1)
    few, more, most = (peak(Method(kind), steps) for steps in (2, 12, 22))
    assert more - few > 1.5 * 10 * size
    assert abs((most - more) / (more - few) - 1) < 0.05
