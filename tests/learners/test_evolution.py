from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metadist.config import load_config
from metadist.core.errors import InputError
from metadist.core.random import Draws
from metadist.core.task import Task, TaskId
from metadist.engine import Engine, Kind
from metadist.learners import Context
from metadist.learners.evolution import EvolutionStrategies
from metadist.models import Model
from metadist.models.losses import mean_squared_error
from metadist.run.api import train

KINDS = ["loop", "vmap"]
RATE = 0.1


class Slopes(nn.Module):
    """x [n, 2] -> x w, [n, 1]."""

    def __init__(self, start: tuple[float, ...] = (0.3, -0.8)):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w).unsqueeze(1)


def lines(seed: int = 0, slopes: tuple[float, float] = (2.0, -1.0), n: int = 6) -> Task:
    draws = np.random.default_rng(seed)
    support, query = draws.normal(size=(2, n, 2))
    return Task.of(support, support @ slopes, query, query @ slopes)


def learner(**options) -> EvolutionStrategies:
    return EvolutionStrategies(**({"model": Model(Slopes()), "loss": mean_squared_error, "inner_lr": RATE} | options))


def estimates(own: EvolutionStrategies, task: Task, count: int, kind: Kind = "vmap") -> tuple[Tensor, Tensor]:
    """Losses [count] and rows [count, 2] of the task with keys of `count` tasks."""
    engine = Engine(own, kind, dtype=torch.float64)
    draws = [Draws(0, TaskId("train", 0, index), stream=1) for index in range(count)]
    return engine.meta_gradients(engine.initial_theta(), [task] * count, draws=draws)


def apart(rows: Tensor, expected: Tensor) -> float:
    """How many standard errors the mean of rows is from what is expected, at the worst element."""
    return float(((rows.mean(0) - expected).abs() / (rows.std(0) / len(rows) ** 0.5)).max())


def by_hand(task: Task, at: Tensor, inner_steps: int) -> Tensor:
    """The derivative of the adapted query loss, which is quadratic in the weights: of it the smoothed loss has the same
    derivative. J g with J = (I - rate H)^steps, H the Hessian of the support loss, g the query gradient at phi."""
    x, qx = (torch.from_numpy(part.inputs[0]) for part in task)
    y, qy = (torch.from_numpy(part.targets[0]) for part in task)
    hessian, jacobian, phi = 2 / len(x) * x.T @ x, torch.eye(2, dtype=torch.float64), at
    for _ in range(inner_steps):
        phi = phi - RATE * 2 / len(x) * x.T @ (x @ phi - y)
        jacobian = jacobian - RATE * hessian @ jacobian
    return jacobian.T @ (2 / len(qx) * qx.T @ (qx @ phi - qy))


@pytest.mark.parametrize(("kind", "inner_steps"), [("vmap", 0), ("vmap", 2), ("loop", 1)])
def test_its_expectation_is_the_derivative_of_a_quadratic_adapted_loss(kind, inner_steps):
    own, task = learner(inner_steps=inner_steps, directions=8, sigma=0.5), lines()
    _, rows = estimates(own, task, 400, kind)
    expected = by_hand(task, torch.tensor([0.3, -0.8]).double(), inner_steps)
    assert apart(rows, expected) < 4
    assert apart(rows, 1.2 * expected) > 4  # which so many tasks would show


def quartic(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.squeeze(1) - targets).pow(4).sum()


def test_it_is_the_gradient_of_the_smoothed_loss_not_of_the_loss():
    """Of w1^4 + w2^4: E (w + sigma e)^4 = w^4 + 6 w^2 sigma^2 + 3 sigma^4, whose derivative is 4 w^3 + 12 sigma^2 w."""
    x, zero, sigma = np.eye(2), np.zeros(2), 0.7
    own = learner(loss=quartic, inner_steps=0, directions=8, sigma=sigma)
    losses, rows = estimates(own, Task.of(x, zero, x, zero), 2000)
    w = torch.tensor([0.3, -0.8]).double()
    assert apart(rows, 4 * w**3 + 12 * sigma**2 * w) < 4
    assert apart(rows, 4 * w**3) > 4
    assert apart(losses.unsqueeze(1), (w**4 + 6 * w**2 * sigma**2 + 3 * sigma**4).sum().unsqueeze(0)) < 4


def test_an_inner_gradient_can_be_estimated_in_the_same_way():
    """After one step phi = w - rate * estimate, whose expectation is MAML's phi for a quadratic support loss."""
    own, task = learner(inner_directions=4, sigma=0.5), lines()
    engine = Engine(own, "loop", dtype=torch.float64)
    theta, tensors = engine.initial_theta(), engine.tensors(task)
    draws = [Draws(0, TaskId("train", 0, index), stream=1) for index in range(400)]
    measured = [engine.evaluate(theta, [task], {"loss": first_output}, draws=[each])["loss"][0] for each in draws]
    found = torch.stack(measured)
    x, y = tensors.support.inputs[0], tensors.support.targets[0]
    phi = theta - RATE * 2 / len(x) * x.T @ (x @ theta - y)
    assert torch.allclose(found[:, 0], (tensors.query.inputs[0] @ theta)[0])
    assert apart(found[:, 1:], (tensors.query.inputs[0] @ phi)[:1]) < 4


def first_output(outputs: Tensor, targets: Tensor) -> Tensor:
    del targets
    return outputs[0, 0]


def wrong(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of values that are off by more than 0.3: its derivative is zero wherever it has one."""
    return ((outputs.squeeze(1) - targets).abs() > 0.3).to(outputs.dtype).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_from_a_loss_without_derivatives(kind):
    """Tasks are slopes near (2, -1); theta begins far from these, and nothing is differentiated."""
    own = learner(model=Model(Slopes((0.0, 0.0))), loss=wrong, inner_steps=1, inner_directions=8, sigma=0.5,
                  directions=16)  # fmt: skip
    engine = Engine(own, kind)
    theta, tasks = engine.initial_theta(), [lines(seed, (2.0 + 0.1 * seed, -1.0)) for seed in range(4)]
    before = engine.meta_gradients(theta, tasks).losses.mean()
    for step in range(40):
        theta = theta - engine.meta_gradients(theta, tasks, step).rows.mean(dim=0)
    assert engine.meta_gradients(theta, tasks).losses.mean() < before - 0.2
    assert torch.allclose(theta, torch.tensor([2.15, -1.0]), atol=0.4)


@dataclass(frozen=True, kw_only=True)
class Simulated(EvolutionStrategies):
    """Its loss is computed outside torch."""

    engines = ("loop",)

    def outer_loss(self, theta, fast, query, context):
        del theta, context
        w, x = fast.weights["w"].numpy(), query.inputs[0].numpy()
        return torch.tensor(float(np.square(x @ w - query.targets[0].numpy()).mean()), dtype=torch.float64)


def test_a_simulator_outside_torch_gives_the_same():
    options = {"inner_steps": 0, "model": Model(Slopes()), "loss": mean_squared_error}
    _, expected = estimates(EvolutionStrategies(**options), lines(), 3, "loop")
    _, found = estimates(Simulated(**options), lines(), 3, "loop")
    assert torch.allclose(found, expected, rtol=1e-9)


@dataclass(frozen=True, kw_only=True)
class Measured(Simulated):
    """The loss of its inner steps too is computed outside torch."""

    def support_loss(self, theta, fast, support):
        return self.outer_loss(theta, fast, support, Context(0, 1, {}))


def test_an_inner_gradient_of_a_simulator_outside_torch_is_estimated():
    options = {"inner_steps": 2, "inner_directions": 4, "sigma": 0.5}
    kept = {"model": Model(Slopes()), "loss": mean_squared_error, "inner_lr": RATE}
    losses, expected = estimates(EvolutionStrategies(**options, **kept), lines(), 3, "loop")
    simulated, found = estimates(Measured(**options, **kept), lines(), 3, "loop")
    assert torch.allclose(simulated, losses, rtol=1e-9) and torch.allclose(found, expected, rtol=1e-9)
    _, more = estimates(Measured(**options | {"inner_directions": 1}, **kept), lines(), 3, "loop")
    assert not torch.allclose(more, expected, rtol=1e-3)


def test_a_support_loss_is_descended_by_its_derivative_without_inner_directions():
    @dataclass(frozen=True, kw_only=True)
    class Doubled(EvolutionStrategies):
        def support_loss(self, theta, fast, support):
            return 2 * super().support_loss(theta, fast, support)

    kept = {"model": Model(Slopes()), "loss": mean_squared_error}
    _, expected = estimates(EvolutionStrategies(**kept, inner_lr=2 * RATE), lines(), 2)
    _, found = estimates(Doubled(**kept, inner_lr=RATE), lines(), 2)
    assert torch.allclose(found, expected, rtol=1e-9)


def test_a_run_learns_the_sinusoid_with_the_same_bits_on_two_workers(tmp_path):
    job = [
        "data.family=sinusoid", "task.shots=5", "task.queries=5", "model.name=mlp", "model.hidden=[20]",
        "learner.name=evolution", "learner.inner_lr=0.02", "learner.directions=32", "meta_lr=0.02", "meta_steps=60",
        "meta_batch_size=8", "engine.chunk_size=4", "evaluation.every=0", "evaluation.test_tasks=50",
        "evaluation.baselines=[]", "tracking.mlflow=false", "fleet.backend=local",
    ]  # fmt: skip
    found = [
        train(load_config([], [*job, f"run_dir={tmp_path / str(n)}", f"num_workers={n}"]), quiet=True) for n in (1, 2)
    ]
    assert found[0]["theta_sha256"] == found[1]["theta_sha256"]
    begun = train(load_config([], [*job, f"run_dir={tmp_path / 'begun'}", "meta_steps=1"]), quiet=True)
    loss = [each["loss"]["by_inner_step"][-1]["mean"] for each in (begun, found[0])]
    assert loss[1] < 0.9 * loss[0]


@pytest.mark.parametrize(
    "options", [{"sigma": 0.0}, {"directions": 0}, {"inner_directions": -1}, {"first_order": True}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        learner(**options)


def test_two_tasks_have_directions_of_their_own():
    _, rows = estimates(learner(directions=1), lines(), 2)
    assert not torch.allclose(rows[0], rows[1])


def test_a_simulator_is_not_computed_at_once():
    with pytest.raises(InputError, match="loop"):
        Engine(Simulated(model=Model(Slopes()), loss=mean_squared_error), "vmap")


def squared_by_numpy(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.tensor(np.square(outputs.detach().numpy()[:, 0] - targets.numpy()).mean())


def squared_item(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.tensor((outputs.squeeze(1) - targets).square().mean().item())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", [squared_by_numpy, squared_item])
def test_what_a_loss_outside_torch_needs_is_said(loss, kind):
    """Inner gradients that are not derivatives, and then a class that is not computed at once: with both it is."""
    with pytest.raises(InputError, match=r"has no derivative, which inner steps take: set learner.inner_directions=16"):
        estimates(learner(loss=loss), lines(), 1, kind)
    with pytest.raises(InputError, match=r'leaves torch .* learner.name=module:Class, .* engines = \("loop",\)'):
        estimates(learner(loss=loss, inner_directions=4), lines(), 1, kind)

    @dataclass(frozen=True, kw_only=True)
    class OneByOne(EvolutionStrategies):
        engines = ("loop",)

    own = OneByOne(model=Model(Slopes()), loss=loss, inner_lr=RATE, inner_directions=4)
    found, _ = estimates(own, lines(), 1, "loop")
    expected, _ = estimates(learner(inner_directions=4), lines(), 1, "loop")
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("inner_directions", [0, 2])
def test_a_loss_that_is_no_tensor_is_refused(inner_directions):
    @dataclass(frozen=True, kw_only=True)
    class OneByOne(EvolutionStrategies):
        engines = ("loop",)

    options = {"model": Model(Slopes()), "loss": lambda *both: squared_item(*both).item()}
    with pytest.raises(InputError, match="the loss gave a float: it must give a tensor"):
        estimates(OneByOne(**options, inner_directions=inner_directions), lines(), 1, "loop")
