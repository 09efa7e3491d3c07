"""Small tasks, models and the tools that judge a meta-gradient, all in float64."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from metadist.core.task import Task
from metadist.engine import Engine, Kind
from metadist.learners import Learner
from metadist.models import Model
from metadist.models.losses import mean_squared_error


class Smooth(nn.Module):
    """[n, 2] -> [n, 1] without a kink, so that finite differences are exact to rounding."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, width), nn.Tanh())
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def smooth_model() -> Model:
    torch.manual_seed(0)
    return Model(Smooth())


def regression_task(seed: int = 0, n: int = 6) -> Task:
    """Curved targets of a random direction."""
    draws = np.random.default_rng(seed)
    support, query, direction = draws.normal(size=(n, 2)), draws.normal(size=(n + 2, 2)), draws.normal(size=2)
    return Task.of(support, np.sin(2 * support @ direction), query, np.sin(2 * query @ direction))


def classification_task(seed: int = 0, ways: int = 3, shape: tuple[int, ...] = (4,), shots: int = 2) -> Task:
    """Noisy examples around a mean for each class."""
    draws = np.random.default_rng(seed)
    means = draws.normal(size=(ways, *shape))
    support, query = np.arange(ways).repeat(shots), np.arange(ways).repeat(shots + 1)
    noise = draws.normal(size=(len(support) + len(query), *shape)) / 2
    return Task.of(means[support] + noise[: len(support)], support, means[query] + noise[len(support) :], query)


def engine_of(learner: Learner, kind: Kind = "loop") -> tuple[Engine, Tensor]:
    engine = Engine(learner, kind, dtype=torch.float64)
    return engine, engine.initial_theta()


def meta_gradient(learner: Learner, task: Task, kind: Kind = "loop") -> Tensor:
    engine, theta = engine_of(learner, kind)
    return engine.meta_gradients(theta, [task]).rows[0]


def finite_difference(learner: Learner, task: Task, epsilon: float = 1e-5) -> Tensor:
    """Central differences of the query loss of the adapted model, an element of theta at a time."""
    engine, theta = engine_of(learner)

    def adapted_loss(theta: Tensor) -> Tensor:
        outputs = engine.adapt(theta, engine.tensors(task).support)(*task.query.inputs)
        return learner.loss(outputs, *engine.tensors(task).query.targets)

    return differences(adapted_loss, theta, epsilon)


def differences(f: Callable[[Tensor], Tensor], at: Tensor, epsilon: float = 1e-5) -> Tensor:
    steps = epsilon * torch.eye(len(at), dtype=at.dtype)
    return torch.stack([(f(at + step) - f(at - step)) / (2 * epsilon) for step in steps])


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a - b).norm() / b.norm())


REGRESSION = {"loss": mean_squared_error, "inner_lr": 0.2}
