"""PLATIPUS on a model whose every quantity has a closed form: outputs are the weighted sum of three vectors."""

import numpy as np
import pytest
import torch
from torch import nn

from metadist.core.random import Draws
from metadist.core.task import Task, TaskId
from metadist.learners import PLATIPUS
from metadist.models import Model
from metadist.models.noise import normal

from .small import engine_of

MU, RATE_P, RATE_Q, KL, INNER = np.array([0.5, -1.0]), 0.3, 0.2, 0.01, 0.1
TENSORS = {"first": 1.0, "second": 2.0, "third": -1.0}  # the output is their weighted sum


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        for name in TENSORS:
            self.register_parameter(name, nn.Parameter(torch.from_numpy(MU.copy())))

    def forward(self, x):
        return sum(factor * getattr(self, name) for name, factor in TENSORS.items()) + 0 * x


def loss(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (outputs - target).square().sum(dim=-1).mean() / 2


def closed_form(support: np.ndarray, query: np.ndarray, log_p: float, log_q: float, noise: dict) -> float:
    """The objective of Algorithm 1 for one task, with every formula written out in numpy."""
    mean = {name: MU.copy() for name in TENSORS}

    def gradient(at: dict, target: np.ndarray) -> dict:
        return {name: f * (sum(TENSORS[n] * at[n] for n in TENSORS) - target) for name, f in TENSORS.items()}

    def value(at: dict, target: np.ndarray) -> float:
        return float(((sum(TENSORS[n] * at[n] for n in TENSORS) - target) ** 2).sum() / 2)

    to_query, to_support = gradient(mean, query), gradient(mean, support)
    mean_q = {n: mean[n] - RATE_Q * to_query[n] for n in TENSORS}
    mean_p = {n: mean[n] - RATE_P * to_support[n] for n in TENSORS}
    drawn = {n: mean_q[n] + np.exp(log_q / 2) * noise[n] for n in TENSORS}
    step = gradient(drawn, support)
    phi = {n: drawn[n] - INNER * step[n] for n in TENSORS}
    kl = sum(
        (log_p - log_q + (np.exp(log_q) + (mean_q[n] - mean_p[n]) ** 2) / np.exp(log_p) - 1).sum() / 2 for n in TENSORS
    )
    return value(phi, query) + KL * kl


@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_the_objective_is_the_papers(kind):
    """q comes from the query set and p from the support set, the divergence is of q from p, and each tensor, though all
    have one shape, has noise of its own."""
    learner = PLATIPUS(
        model=Model(Sum()), loss=loss, inner_lr=INNER, inner_steps=1, kl_weight=KL, predicts="values", samples=1
    )
    engine, theta = engine_of(learner, kind)
    named = engine.layout.unflatten(theta)
    log_p, log_q = -1.0, -3.0
    for name in TENSORS:
        named[f"log_variance_p/{name}"].fill_(log_p)
        named[f"log_variance_q/{name}"].fill_(log_q)
    named["rate_p"].fill_(RATE_P)
    named["rate_q"].fill_(RATE_Q)
    support, query = np.array([1.0, 2.0]), np.array([-0.5, 0.25])
    task = Task.of(np.zeros((1, 2)), support[None], np.zeros((1, 2)), query[None])
    task = engine.tensors(task)
    draws = lambda: Draws(3, TaskId("train", 0, 0), stream=1)  # noqa: E731
    result = engine.meta_gradients(engine.layout.flatten(named), [task], draws=[draws()])
    key = torch.tensor(draws().word() >> 1)
    noise = {name: normal(key + number, (1, 2))[0].numpy() for number, name in enumerate(TENSORS)}
    assert len({values.tobytes() for values in noise.values()}) == 3
    expected = closed_form(support, query, log_p, log_q, noise)
    assert float(result.losses[0]) == pytest.approx(expected, rel=1e-9)
