import math

import numpy as np
import pytest
import torch

from metadist import MAML, Engine, Model, Task
from metadist.models import SIREN
from metadist.models.losses import mean_squared_error


def test_it_is_linear_layers_with_sines_between():
    torch.manual_seed(0)
    module = SIREN([[2], []], 2, hidden=(4, 5), w0=3.0)
    place, time = torch.randn(7, 2), torch.randn(7)
    first, _, second, _ = module.body
    hidden = torch.sin(3 * first(torch.cat([place, time[:, None]], 1)))
    assert torch.equal(module(place, time), module.head(torch.sin(3 * second(hidden))))
    assert [layer.weight.shape for layer in (first, second, module.head)] == [(4, 3), (5, 4), (2, 5)]


def test_weights_begin_within_the_papers_bounds_and_fill_them():
    torch.manual_seed(0)
    module = SIREN([[2]], 300, hidden=(400, 200), w0=30.0)
    first, _, second, _ = module.body
    bounds = {first: 1 / 2, second: math.sqrt(6 / 400) / 30, module.head: math.sqrt(6 / 200) / 30}
    for layer, bound in bounds.items():
        largest = layer.weight.abs().max().item()
        assert 0.98 * bound < largest <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("w0", [5.0, 30.0])
def test_what_sines_are_given_keeps_a_deviation_near_1_in_depth(w0):
    """As the paper proves for inputs that are arcsine distributed, like those of every layer but the first."""
    torch.manual_seed(0)
    module = SIREN([[2]], 1, hidden=(256,) * 6, w0=w0)
    for layer in module.body[::2]:
        torch.nn.init.zeros_(layer.bias)
    x, found = torch.rand(2000, 2) * 2 - 1, []
    for linear, sine in zip(module.body[::2], module.body[1::2], strict=True):
        x = linear(x)
        found.append((w0 * x).std().item())
        x = sine(x)
    np.testing.assert_allclose(found[2:], 1, atol=0.15)


def test_second_derivatives_agree_with_finite_differences():
    torch.manual_seed(0)
    module = SIREN([[2]], 1, hidden=(6, 6), w0=4.0).double()
    places = torch.rand(5, 2, dtype=torch.float64) * 2 - 1
    names, values = zip(*((name, p.detach()) for name, p in module.named_parameters()), strict=True)

    def outputs(*weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (places,))

    weights = [value.clone().requires_grad_() for value in values]
    assert torch.autograd.gradgradcheck(outputs, weights)
    place = torch.tensor([0.3, -0.2], dtype=torch.float64)
    field = lambda at: module(at[None])[0, 0]  # noqa: E731
    h = 1e-4
    steps = h * torch.eye(2, dtype=torch.float64)
    laplacian = sum((field(place + s) - 2 * field(place) + field(place - s)) / h**2 for s in steps)
    exact = torch.autograd.functional.hessian(field, place)
    assert exact.trace().item() == pytest.approx(laplacian.item(), rel=1e-5)


def test_engines_agree():
    torch.manual_seed(0)
    model = Model(SIREN([[2]], 1, hidden=(6, 5), w0=5.0))
    rng = np.random.default_rng(0)
    tasks = [Task.of(rng.random((5, 2)), rng.random((5, 1)), rng.random((7, 2)), rng.random((7, 1))) for _ in range(3)]
    learner = MAML(model=model, loss=mean_squared_error, inner_lr=0.01, inner_steps=2)
    rows = {}
    for kind in ("loop", "vmap"):
        engine = Engine(learner, kind, dtype=torch.float64)
        rows[kind] = engine.meta_gradients(engine.initial_theta(), tasks).rows
    torch.testing.assert_close(rows["vmap"], rows["loop"], rtol=1e-9, atol=1e-12)


def test_a_frequency_that_makes_no_field_is_refused():
    with pytest.raises(ValueError, match="w0=0 must be above 0"):
        SIREN([[2]], 1, w0=0)
