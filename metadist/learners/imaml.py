"""Implicit MAML: the meta-gradient from the solution of the inner problem, not from the path to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from metadist.core.task import Examples, Task
from metadist.learners.learner import Context, Differentiation, Fast, Tensors
from metadist.learners.maml import MAML

RESIDUAL, STOPPED = "solver_residual", "negative_curvature"
TOLERATED = 0.1  # relative residual


@dataclass(frozen=True, kw_only=True)
class IMAML(MAML):
    """phi = argmin L_support(phi) + lambda / 2 |phi - theta|^2;  meta-gradient A^-1 grad L_query(phi), with
    A = (1 + damping) I + H / (lambda + proximal_damping), H the Hessian of L_support at phi.

    Rajeswaran et al. 2019, equation 3 and Lemma 1 (https://arxiv.org/abs/1909.04630), where both dampings are 0. Their
    published code has damping 1 and proximal_damping 10: about half of the gradient, with curvature's share of it
    smaller, but a system that a few steps do solve. Without damping A is often indefinite at a network's weights.

    phi comes from `inner_steps` of descent on the proximal objective (published: plain steps, then one proximal step),
    the linear system from `solver_steps` of conjugate gradients ("cg"), which stop where they meet negative curvature
    (Nocedal and Wright 2006, algorithm 7.1: at the first step, so that its result is grad / (1 + damping)), or from the
    first `solver_steps` terms after the zeroth of the Neumann series sum_i (-B)^i / (1 + damping)^(i + 1), with B the
    part of A that has H, which converges only where 1 + damping exceeds every |eigenvalue| of B. Memory is that of one
    step, whatever `inner_steps`. Exact as far as both problems are solved: diagnostics are the relative residual
    |A x - grad| / |grad| of what was found (1 where nothing was solved), and whether negative curvature stopped it.
    """

    proximal: float = 2.0
    solver: Literal["cg", "neumann"] = "cg"
    solver_steps: int = 5
    damping: float = 0.0
    proximal_damping: float = 0.0

    refused: ClassVar[Mapping[str, str]] = {
        "first_order": "it has no first-order form", "adapted": "it adapts all parameters"
    }  # fmt: skip
    diagnostics: ClassVar[tuple[str, ...]] = (RESIDUAL, STOPPED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proximal <= 0 or self.solver_steps < 1:
            raise ValueError(f"proximal={self.proximal} must be above 0, solver_steps={self.solver_steps} 1 or more")
        if self.damping < 0 or self.proximal_damping < 0:
            raise ValueError(f"damping={self.damping} and proximal_damping={self.proximal_damping} must be 0 or more")
        if self.first_order:
            raise ValueError("iMAML has no first-order form: leave learner.first_order out")

    def concern(self, means: Mapping[str, float]) -> str:
        residual, stopped = means[RESIDUAL], means[STOPPED]
        if residual <= TOLERATED and not stopped:
            return ""
        negative = f", negative curvature stopped {stopped:.0%} of the tasks" if stopped else ""
        return (
            f"iMAML's linear system is not solved: relative residual {residual:.2g} after {self.solver_steps} "
            f"solver_steps{negative}; set learner.damping=1 and learner.proximal_damping=10 as the published code "
            "does, or raise learner.proximal or learner.solver_steps"
        )

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

        whole = self.proximal + self.proximal_damping

        def curvature(vector: Tensors) -> Tensors:
            """H vector / (lambda + proximal_damping), H being what is left of the proximal loss's second derivative
            without lambda I."""
            product = ops.hessian_vector_product(proximal_loss, fast.weights, vector)
            return {name: value / whole - (self.proximal / whole) * vector[name] for name, value in product.items()}

        loss, gradient = ops.value_and_gradient(query_loss, fast.weights)
        solve = conjugate_gradients if self.solver == "cg" else neumann_series
        found = solve(curvature, gradient, self.solver_steps, 1 + self.damping)
        return loss, found.x | {RESIDUAL: found.residual, STOPPED: found.stopped}


class Solution(NamedTuple):
    """x, its relative residual, and 1 where negative curvature stopped the solver (else 0), both of shape []."""

    x: Tensors
    residual: Tensor
    stopped: Tensor


def conjugate_gradients(
    curvature: Callable[[Tensors], Tensors], right: Tensors, steps: int, diagonal: float = 1.0
) -> Solution:
    """x with (diagonal I + curvature) x = right, from x = 0. Once the residual is zero, further steps change nothing;
    nor do they once the curvature along a direction is not positive, where there is no minimum to go to: then x is what
    was reached before, or right / diagonal at the first step."""
    x = {name: torch.zeros_like(value) for name, value in right.items()}
    residual = along = right
    begun = square = _dot(residual, residual)
    stopped = square < 0
    for k in range(steps):
        image = _add(curvature(along), along, diagonal)
        bend = _dot(along, image)
        met = (bend <= 0) & (square > 0) & ~stopped
        stopped = stopped | met
        step = torch.where(stopped, 0.0, _ratio(square, bend))
        if k == 0:
            step = torch.where(met, 1 / diagonal, step)
        x, residual = _add(x, along, step), _add(residual, image, -step)
        before, square = square, _dot(residual, residual)
        along = _add(residual, along, _ratio(square, before))
    return Solution(x, _ratio(square, begun).sqrt(), stopped.to(square.dtype))


def neumann_series(
    curvature: Callable[[Tensors], Tensors], right: Tensors, steps: int, diagonal: float = 1.0
) -> Solution:
    """sum over i = 0, ..., steps of (-curvature / diagonal)^i right / diagonal. Its residual is the first term left
    out."""
    total = term = {name: value / diagonal for name, value in right.items()}
    for _ in range(steps):
        term = _next_term(curvature, term, diagonal)
        total = _add(total, term, 1.0)
    left = _next_term(curvature, term, diagonal)
    square = _dot(left, left) * diagonal**2
    return Solution(total, _ratio(square, _dot(right, right)).sqrt(), torch.zeros_like(square))


def _next_term(curvature: Callable[[Tensors], Tensors], term: Tensors, diagonal: float) -> Tensors:
    return {name: -value / diagonal for name, value in curvature(term).items()}


def _dot(a: Tensors, b: Tensors) -> Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def _add(a: Tensors, b: Tensors, factor: Tensor | float) -> Tensors:
    return {name: a[name] + factor * b[name] for name in a}


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))
