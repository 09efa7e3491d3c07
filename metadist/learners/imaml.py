"""Implicit MAML: the meta-gradient from the solution of the inner problem, not from the path to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from metadist.learners.learner import Context, Differentiation, Fast, Tensors
from metadist.learners.maml import MAML
from metadist.task import Examples, Task


@dataclass(frozen=True, kw_only=True)
class IMAML(MAML):
    """phi = argmin L_support(phi) + lambda / 2 |phi - theta|^2;  meta-gradient (I + H / lambda)^-1 grad L_query(phi),
    H the Hessian of L_support at phi.

    Rajeswaran et al. 2019, equation 3 and Lemma 1 (https://arxiv.org/abs/1909.04630). phi comes from `inner_steps` of
    descent on that proximal objective, the linear system from `solver_steps` of conjugate gradients ("cg") or from so
    many terms of the Neumann series sum_i (-H / lambda)^i, which converges only where lambda exceeds every |eigenvalue|
    of H. Memory is that of one step, whatever `inner_steps`. Exact as far as both problems are solved. The published
    code differs: it solves (1 + 1) v + H v / (lambda + 10), and takes plain steps before one proximal step.
    """

    proximal: float = 2.0
    solver: Literal["cg", "neumann"] = "cg"
    solver_steps: int = 5

    refused: ClassVar[Mapping[str, str]] = {
        "first_order": "it has no first-order form", "adapted": "it adapts all parameters"
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proximal <= 0 or self.solver_steps < 1:
            raise ValueError(f"proximal={self.proximal} must be above 0, solver_steps={self.solver_steps} 1 or more")
        if self.first_order or set(self.adapted_names()) != set(self.model.parameters):
            raise ValueError("iMAML adapts all parameters, and has no first-order form: leave both options out")

    def inner_loss(self, theta: Tensors, fast: Fast, support: Examples, k: int) -> Tensor:
        away = torch.stack([(w - theta[name]).square().sum() for name, w in fast.weights.items()]).sum()
        return super().inner_loss(theta, fast, support, k) + self.proximal / 2 * away

    def meta_gradient(
        self, ops: Differentiation, theta: Tensors, task: Task, context: Context
    ) -> tuple[Tensor, Tensors]:
        fast = ops.adapt(self, theta, task.support, context)

        def proximal_loss(weights: Tensors) -> Tensor:
            return self.inner_loss(theta, fast._replace(weights=weights), task.support, max(0, self.inner_steps - 1))

        def query_loss(weights: Tensors) -> Tensor:
            return self.outer_loss(theta, fast._replace(weights=weights), task.query, context)

        def curvature(vector: Tensors) -> Tensors:
            """H vector / lambda, H being what is left of the proximal loss's second derivative without lambda I."""
            product = ops.hessian_vector_product(proximal_loss, fast.weights, vector)
            return {name: value / self.proximal - vector[name] for name, value in product.items()}

        loss, gradient = ops.value_and_gradient(query_loss, fast.weights)
        solve = conjugate_gradients if self.solver == "cg" else neumann_series
        return loss, solve(curvature, gradient, self.solver_steps)


def conjugate_gradients(curvature: Callable[[Tensors], Tensors], right: Tensors, steps: int) -> Tensors:
    """x with (I + curvature) x = right, from x = 0. Once the residual is zero, further steps change nothing."""
    x = {name: torch.zeros_like(value) for name, value in right.items()}
    residual = along = right
    square = _dot(residual, residual)
    for _ in range(steps):
        image = _add(along, curvature(along), 1.0)
        step = _ratio(square, _dot(along, image))
        x, residual = _add(x, along, step), _add(residual, image, -step)
        before, square = square, _dot(residual, residual)
        along = _add(residual, along, _ratio(square, before))
    return x


def neumann_series(curvature: Callable[[Tensors], Tensors], right: Tensors, steps: int) -> Tensors:
    """sum over i = 0, ..., steps of (-curvature)^i right."""
    total = term = right
    for _ in range(steps):
        term = {name: -value for name, value in curvature(term).items()}
        total = _add(total, term, 1.0)
    return total


def _dot(a: Tensors, b: Tensors) -> Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def _add(a: Tensors, b: Tensors, factor: Tensor | float) -> Tensors:
    return {name: a[name] + factor * b[name] for name in a}


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))
