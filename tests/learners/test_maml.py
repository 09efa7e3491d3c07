import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from metadist.core.errors import InputError
from metadist.core.task import Task
from metadist.learners import MAML
from metadist.models import Model
from metadist.models.losses import mean_squared_error

from .small import (
    REGRESSION,
    Smooth,
    differences,
    distance,
    engine_of,
    finite_difference,
    meta_gradient,
    regression_task,
    smooth_model,
)

KINDS = ["loop", "vmap"]


def by_hand(inner_steps: int, adapted: tuple[str, ...]):
    """Query gradient at phi of the smooth model, with phi from plain gradient descent on the named weights."""
    task = regression_task()
    (x, qx), (y, qy) = (
        [torch.from_numpy(part[i][0]) for part in task] for i in range(2)
    )  # fmt: skip
    torch.manual_seed(0)
    module = Smooth().double()
    weights = {name: value.detach().clone() for name, value in smooth_model().parameters.items()}
    weights = {name: value.double().requires_grad_() for name, value in weights.items()}
    for _ in range(inner_steps):
        loss = ((functional_call(module, weights, x).squeeze(1) - y) ** 2).mean()
        gradient = torch.autograd.grad(loss, list(weights.values()))
        weights = {
            name: (w - 0.2 * g if name in adapted else w).detach().requires_grad_()
            for (name, w), g in zip(weights.items(), gradient, strict=True)
        }
    loss = ((functional_call(module, weights, qx).squeeze(1) - qy) ** 2).mean()
    gradient = torch.autograd.grad(loss, list(weights.values()))
    return weights, torch.cat([g.reshape(-1) for g in gradient])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_the_meta_gradient_is_the_derivative_of_the_adapted_models_loss(kind, inner_steps):
    learner = MAML(model=smooth_model(), inner_steps=inner_steps, **REGRESSION)
    numeric = finite_difference(learner, regression_task())
    assert distance(meta_gradient(learner, regression_task(), kind), numeric) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_the_first_order_gradient_is_not_that_derivative(kind, inner_steps):
    learner = MAML(model=smooth_model(), inner_steps=inner_steps, first_order=True, **REGRESSION)
    numeric = finite_difference(learner, regression_task())
    assert distance(meta_gradient(learner, regression_task(), kind), numeric) > 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner_steps", [0, 1, 4])
def test_the_first_order_gradient_is_the_query_gradient_at_phi(kind, inner_steps):
    learner = MAML(model=smooth_model(), inner_steps=inner_steps, first_order=True, **REGRESSION)
    _, expected = by_hand(inner_steps, tuple(learner.model.parameters))
    assert distance(meta_gradient(learner, regression_task(), kind), expected) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner_steps", [1, 2, 5])
def test_on_linear_regression_the_meta_gradient_has_its_closed_form(kind, inner_steps):
    """With support Hessian A, phi_K - w* = (I - lr A)^K (theta - w*), so the meta-gradient is (I - lr A)^K times the
    query gradient at phi_K."""
    draws = np.random.default_rng(1)
    x, qx, y, qy = draws.normal(size=(8, 3)), draws.normal(size=(9, 3)), draws.normal(size=8), draws.normal(size=9)
    torch.manual_seed(1)
    module = nn.Linear(3, 1, bias=False).double()
    theta = module.weight.detach().numpy()[0]
    hessian = 2 / 8 * x.T @ x
    best = np.linalg.solve(hessian, 2 / 8 * x.T @ y)
    shrink = np.linalg.matrix_power(np.eye(3) - 0.1 * hessian, inner_steps)
    phi = best + shrink @ (theta - best)
    expected = shrink @ (2 / 9 * qx.T @ (qx @ phi - qy))
    learner = MAML(model=Model(module), loss=mean_squared_error, inner_lr=0.1, inner_steps=inner_steps)
    assert np.allclose(meta_gradient(learner, Task.of(x, y, qx, qy), kind), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_without_inner_steps_it_is_the_plain_query_gradient(kind):
    learner = MAML(model=smooth_model(), inner_steps=0, **REGRESSION)
    _, expected = by_hand(0, ())
    assert distance(meta_gradient(learner, regression_task(), kind), expected) < 1e-12


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_anil_adapts_the_head_only(inner_steps):
    learner = MAML(model=smooth_model(), adapted="head.*", inner_steps=inner_steps, **REGRESSION)
    assert learner.adapted_names() == ["head.weight", "head.bias"]
    engine, theta = engine_of(learner)
    task = engine.tensors(regression_task())
    weights, _ = by_hand(inner_steps, ("head.weight", "head.bias"))
    outputs = functional_call(Smooth().double(), weights, task.query.inputs)
    assert torch.allclose(engine.adapt(theta, task.support)(*task.query.inputs), outputs, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapted", ["head.*", "body.*", "head.bias, body.0.weight"])
def test_what_is_not_adapted_is_still_meta_learned_exactly(kind, adapted):
    learner = MAML(model=smooth_model(), adapted=adapted, inner_steps=2, **REGRESSION)
    gradient = meta_gradient(learner, regression_task(), kind)
    assert distance(gradient, finite_difference(learner, regression_task())) < 1e-7
    assert (gradient != 0).all()


def test_a_pattern_that_matches_nothing_lists_the_names():
    with pytest.raises(InputError, match="'haed.*' matches no parameter.*body.0.weight, body.0.bias, head.weight, hea"):
        MAML(model=smooth_model(), loss=mean_squared_error, adapted="haed.*")


def test_patterns_are_case_sensitive_and_keep_the_models_order():
    learner = MAML(model=smooth_model(), loss=mean_squared_error, adapted="head.*,body.0.bias")
    assert learner.adapted_names() == ["body.0.bias", "head.weight", "head.bias"]
    with pytest.raises(InputError):
        MAML(model=smooth_model(), loss=mean_squared_error, adapted="HEAD.*")


@pytest.mark.parametrize("kind", KINDS)
def test_tied_weights_appear_once_and_their_meta_gradient_is_exact(kind):
    class Tied(nn.Module):
        """An autoencoder of one matrix, read both ways."""

        def __init__(self):
            super().__init__()
            self.encode = nn.Linear(2, 2)
            self.decode = nn.Linear(2, 2, bias=False)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(torch.tanh(self.encode(x))).sum(dim=1, keepdim=True)

    torch.manual_seed(0)
    learner = MAML(model=Model(Tied()), inner_steps=2, **REGRESSION)
    assert list(learner.layout()) == ["encode.weight", "encode.bias"]
    numeric = finite_difference(learner, regression_task())
    assert distance(meta_gradient(learner, regression_task(), kind), numeric) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_used_under_two_names_is_one_module(kind):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.second = self.first
            self.head = nn.Linear(2, 1)

        def forward(self, x):
            return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))

    torch.manual_seed(0)
    learner = MAML(model=Model(Twice()), inner_steps=2, **REGRESSION)
    assert list(learner.layout()) == ["first.weight", "first.bias", "head.weight", "head.bias"]
    numeric = finite_difference(learner, regression_task())
    for _ in range(2):
        assert distance(meta_gradient(learner, regression_task(), kind), numeric) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_a_scalar_parameter_is_learned(kind):
    class Scaled(Smooth):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(1.5))

        def forward(self, x):
            return self.temperature * super().forward(x)

    torch.manual_seed(0)
    learner = MAML(model=Model(Scaled()), inner_steps=2, **REGRESSION)
    numeric = finite_difference(learner, regression_task())
    assert distance(meta_gradient(learner, regression_task(), kind), numeric) < 1e-7


def test_the_mean_over_tasks_is_the_derivative_of_the_mean_loss():
    learner = MAML(model=smooth_model(), inner_steps=1, **REGRESSION)
    engine, theta = engine_of(learner)
    tasks = [regression_task(seed) for seed in range(3)]
    numeric = differences(lambda at: engine.meta_gradients(at, tasks).losses.mean(), theta)
    assert distance(engine.meta_gradients(theta, tasks).rows.mean(dim=0), numeric) < 1e-7
