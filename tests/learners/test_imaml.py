"""The linear system of iMAML: damped, truncated where it is indefinite, and how far it is solved."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from metadist.core.task import Task
from metadist.learners import IMAML
from metadist.learners.imaml import conjugate_gradients, neumann_series
from metadist.models import Model

from .small import engine_of

KINDS = ["loop", "vmap"]


class Bent(nn.Module):
    """Outputs are the weights: a loss of them has whatever Hessian it is given."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, size, dtype=torch.float64))

    def forward(self, x):
        return self.weight + 0 * x.sum()


def bent(hessian: np.ndarray, slope: np.ndarray, **options: Any):
    """iMAML whose inner loss is w' H w / 2 and whose outer loss is slope' w: all it computes has a closed form."""
    matrix, along = torch.from_numpy(hessian), torch.from_numpy(slope)

    def loss(outputs, target):  # support targets are 0, query targets 1
        curved = outputs @ matrix @ outputs / 2
        return torch.where(target[0] == 0, curved, outputs @ along)

    learner = IMAML(model=Model(Bent(len(slope))), loss=loss, **({"inner_steps": 1, "inner_lr": 0.01} | options))
    return learner, Task.of(np.zeros((1, 1)), np.zeros(1), np.zeros((1, 1)), np.ones(1))


def gradient(kind: str, learner, task) -> tuple[np.ndarray, dict[str, float]]:
    engine, theta = engine_of(learner, kind)
    found: dict[str, torch.Tensor] = {}
    rows = engine.meta_gradients(theta, [task, task], diagnostics=found).rows
    assert torch.equal(rows[0], rows[1]) and all(value.shape == (2,) for value in found.values())
    return rows[0].numpy(), {name: float(value[0]) for name, value in found.items()}


def symmetric(eigenvalues: list[float]) -> np.ndarray:
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(len(eigenvalues), len(eigenvalues))))[0]
    return basis @ np.diag(eigenvalues) @ basis.T


SLOPE = np.array([1.0, -2.0, 0.5, 3.0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("damping", "proximal_damping"), [(0.0, 0.0), (1.0, 10.0), (0.5, 0.0), (0.0, 3.0)])
def test_the_system_is_the_damped_one(kind, damping, proximal_damping):
    hessian, own = symmetric([0.1, 1.0, 4.0, 15.9]), {"damping": damping, "proximal_damping": proximal_damping}
    found, told = gradient(kind, *bent(hessian, SLOPE, solver_steps=4, proximal=2.0, **own))
    matrix = (1 + damping) * np.eye(4) + hessian / (2.0 + proximal_damping)
    assert np.allclose(found, np.linalg.solve(matrix, SLOPE), rtol=1e-9)
    assert told["solver_residual"] < 1e-9 and told["negative_curvature"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", ["cg", "neumann"])
def test_the_residual_told_is_that_of_what_was_found(kind, solver):
    hessian = symmetric([0.1, 1.0, 2.0, 4.0])
    own = {"solver": solver, "solver_steps": 2, "proximal": 5.0, "damping": 0.5, "proximal_damping": 1.0}
    found, told = gradient(kind, *bent(hessian, SLOPE, **own))
    left = (1.5 * np.eye(4) + hessian / 6.0) @ found - SLOPE
    assert told["solver_residual"] == pytest.approx(np.linalg.norm(left) / np.linalg.norm(SLOPE), rel=1e-9)
    assert told["solver_residual"] > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_damped_neumann_series_has_as_many_terms_as_it_says(kind):
    hessian = symmetric([0.1, 1.0, 2.0, 4.0])
    own = {"solver": "neumann", "solver_steps": 3, "proximal": 5.0, "damping": 0.5, "proximal_damping": 1.0}
    found, _ = gradient(kind, *bent(hessian, SLOPE, **own))
    terms = [np.linalg.matrix_power(-hessian / 6.0, i) / 1.5 ** (i + 1) for i in range(4)]
    assert np.allclose(found, sum(terms) @ SLOPE, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_negative_curvature_at_the_first_step_leaves_the_gradient(kind):
    """lambda = 2 and H = -7.7 I, the smallest eigenvalue there was in the job: the matrix is -2.85 I."""
    found, told = gradient(kind, *bent(-7.7 * np.eye(4), SLOPE, proximal=2.0))
    assert np.array_equal(found, SLOPE) and told["negative_curvature"] == 1
    assert told["solver_residual"] == pytest.approx(3.85)
    damped, told = gradient(kind, *bent(-7.7 * np.eye(4), SLOPE, proximal=2.0, damping=1.0, proximal_damping=10.0))
    assert np.allclose(damped, SLOPE / (2 - 7.7 / 12), rtol=1e-12) and told["negative_curvature"] == 0


@pytest.mark.parametrize("steps", [2, 3, 9])
def test_negative_curvature_later_leaves_what_was_reached(steps):
    """diag(1, -1) from (2, 1): the first direction has curvature 3 and leads to 5/3 (2, 1); along the second, whose
    curvature is negative, nothing moves."""
    matrix = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    right = {"w": torch.tensor([2.0, 1.0], dtype=torch.float64)}
    found = conjugate_gradients(lambda v: {"w": matrix @ v["w"] - v["w"]}, right, steps)
    assert np.allclose(found.x["w"], np.array([2.0, 1.0]) * 5 / 3, rtol=1e-14)
    assert float(found.stopped) == 1
    left = matrix @ found.x["w"] - right["w"]
    assert float(found.residual) == pytest.approx(float(left.norm()) / 5**0.5, rel=1e-12)


def test_a_gradient_of_zero_is_solved_at_once():
    right = {"w": torch.zeros(3, dtype=torch.float64)}
    for solve in (conjugate_gradients, neumann_series):
        found = solve(lambda v: {"w": 2 * v["w"]}, right, 3)
        assert (found.x["w"] == 0).all() and float(found.residual) == 0 and float(found.stopped) == 0


def test_what_is_not_solved_is_of_concern():
    learner, _ = bent(np.eye(4), SLOPE)
    assert learner.concern({"solver_residual": 0.02, "negative_curvature": 0.0}) == ""
    assert "relative residual 0.9 after 5 solver_steps; set learner.damping=1" in learner.concern(
        {"solver_residual": 0.9, "negative_curvature": 0.0}
    )
    assert "negative curvature stopped 25% of the tasks" in learner.concern(
        {"solver_residual": 0.02, "negative_curvature": 0.25}
    )


def test_negative_damping_is_refused():
    with pytest.raises(ValueError, match="damping=-1.0 and proximal_damping=0.0 must be 0 or more"):
        bent(np.eye(4), SLOPE, damping=-1.0)
