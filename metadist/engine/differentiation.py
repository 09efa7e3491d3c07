"""How gradients are taken, and how a derivative passes through the inner loop.

Two ways to take a gradient: recorded by `torch.autograd`, one task at a time, or transformed by `torch.func`, which
vmap batches over tasks. Three ways through the inner loop, equal but for rounding:

- unroll: keep what every step computed. Memory grows with the number of steps.
- remat: keep only the fast weights after each step (K x P), and compute each step again on the way back, where reverse
  mode over the step's own gradient gives its Hessian-vector product. Memory of activations: one step's.
- adjoint: the same recursion, with each Hessian-vector product by forward mode over the gradient (Kemaev et al. 2025,
  https://arxiv.org/abs/2505.00793), which keeps no graph of a gradient but computes one more. For networks whose layers
  cannot be differentiated twice backwards; not for those without forward mode (F.mse_loss, group norm in a loop).

With `spacing` above 1, only every spacing-th set of fast weights is kept and those between are computed again.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from metadist.core.task import Examples, Task
from metadist.engine.inner_loop import refuse_recomputation, replaced, run_inner_loop
from metadist.learners import Context, Fast, Learner
from metadist.models.model import DROPOUT

Tensors = dict[str, Tensor]
Mode = Literal["unroll", "remat", "adjoint"]
MODES: tuple[Mode, ...] = get_args(Mode)
JUDGED = "sum of the steps' losses"
NOTHING = Examples((), ())


class Differentiator:
    """The inner loop, differentiable as `mode` says; a subclass says how gradients are taken."""

    def __init__(self, mode: Mode = "unroll", spacing: int = 1):
        self.mode = mode
        self.spacing = spacing

    def value_and_gradient(self, f: Callable[[Tensors], Tensor], at: Tensors) -> tuple[Tensor, Tensors]:
        """f(at) and its gradient."""
        raise NotImplementedError

    def pullback(self, f: Callable[..., Sequence[Tensor]], *at: Tensor) -> tuple[Sequence[Tensor], Any]:
        """f(*at), a tuple, and the function that takes cotangents of it to a tuple of cotangents of `at`."""
        raise NotImplementedError

    def tangent(self, f: Callable[..., Tensor], at: Sequence[Tensor], along: Sequence[Tensor | None]) -> list[Tensor]:
        """The derivative of f's gradient at `at` along a direction (None: that argument stays), by forward mode: the
        Hessian times the direction."""
        raise NotImplementedError

    def inner_gradient(self, f: Callable[[Tensors], Tensor], at: Tensors, second_order: bool) -> Tensors:
        raise NotImplementedError

    def start(self, weights: Tensors, outer: bool) -> Tensors:
        """Weights as the next inner step needs them, given whether an outer gradient passes through. They are tensors
        of their own: what else comes from theta (the state, a loss's other terms) is constant for an inner gradient."""
        raise NotImplementedError

    def hessian_vector_product(self, f: Callable[[Tensors], Tensor], at: Tensors, vector: Tensors) -> Tensors:
        """The second derivative of f at `at`, times a vector."""

        def along(at: Tensors) -> Tensor:
            gradient = self.inner_gradient(f, at, second_order=True)
            return torch.stack([(gradient[name] * vector[name]).sum() for name in at]).sum()

        return self.value_and_gradient(along, at)[1]

    def trajectory(self, learner: Learner, theta: Tensors, support: Examples, context: Context) -> Iterator[Fast]:
        """Fast weights after 0, 1, ... `inner_steps` steps."""
        order = _order(learner, theta, context)
        fast = begin(learner, theta, support, context)
        yield fast
        for k in range(learner.inner_steps):
            fast = self.inner_step(learner, theta, fast, Task(support, NOTHING), k, order)
            yield fast

    def inner_step(self, learner: Learner, theta: Tensors, fast: Fast, task: Task, k: int, order: int) -> Fast:
        """One inner step, differentiable as often as `order` says (0, 1 or 2): a pure function of (theta, fast), which
        is all a cheaper differentiation needs."""
        fast = fast._replace(weights=self.start(fast.weights, outer=order > 0))
        with torch.enable_grad():
            gradient = self.inner_gradient(
                lambda weights: learner.inner_loss(theta, fast._replace(weights=weights), task.support, k),
                fast.weights,
                second_order=order > 1,
            )
            return self.after_update(learner, theta, fast, gradient, task.query, k)

    def after_update(
        self, learner: Learner, theta: Tensors, fast: Fast, gradient: Tensors, query: Examples, k: int
    ) -> Fast:
        """The learner's update, and what the engine keeps in the state: a key of dropout, the sum of steps' losses."""
        after = learner.update(theta, fast, gradient, k)
        state = dict(after.state)
        if DROPOUT in fast.state:
            state[DROPOUT] = fast.state[DROPOUT] + 1
        if JUDGED in fast.state:
            state[JUDGED] = fast.state[JUDGED] + learner.step_loss(theta, after._replace(state=state), query, k)
        return after._replace(state=state)

    def adapt(self, learner: Learner, theta: Tensors, support: Examples, context: Context) -> Fast:
        """Fast weights after the last inner step."""
        return self._adapt(learner, theta, Task(support, NOTHING), context)

    def adapt_and_judge(self, learner: Learner, theta: Tensors, task: Task, context: Context) -> Tensor:
        """The sum of the learner's `step_loss` over the inner steps."""
        return self._adapt(learner, theta, task, context).state[JUDGED]

    def _adapt(self, learner: Learner, theta: Tensors, task: Task, context: Context) -> Fast:
        fast = begin(learner, theta, task.support, context)
        if task.query.inputs:
            fast = fast._replace(state=fast.state | {JUDGED: next(iter(theta.values())).new_zeros(())})
        order = _order(learner, theta, context)
        learned = any(part.requires_grad for parts in task.support for part in parts)  # the support set, by a learner
        if self.mode == "unroll" or order == 0 or learner.inner_steps == 0 or learned:
            for k in range(learner.inner_steps):
                fast = self.inner_step(learner, theta, fast, task, k, order)
                if order > 1:
                    refuse_recomputation(learner)
            return fast
        return run_inner_loop(self, learner, theta, fast, task, order)


class Recorded(Differentiator):
    """Gradients by `torch.autograd`, one task at a time."""

    def value_and_gradient(self, f: Callable[[Tensors], Tensor], at: Tensors) -> tuple[Tensor, Tensors]:
        leaves = {name: value.detach().requires_grad_() for name, value in at.items()}
        with torch.enable_grad():
            value = f(leaves)
        gradient = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        return value.detach(), dict(zip(leaves, gradient, strict=True))

    def pullback(self, f: Callable[..., Sequence[Tensor]], *at: Tensor) -> tuple[Sequence[Tensor], Any]:
        leaves = [value.detach().requires_grad_() for value in at]
        with torch.enable_grad():
            values = f(*leaves)
        reached = [place for place, value in enumerate(values) if value.requires_grad]

        def pull(cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
            if not reached:
                return tuple(torch.zeros_like(leaf) for leaf in leaves)
            outputs, given = [values[place] for place in reached], [cotangents[place] for place in reached]
            return torch.autograd.grad(outputs, leaves, given, materialize_grads=True)

        return [value.detach() for value in values], pull

    def tangent(self, f: Callable[..., Tensor], at: Sequence[Tensor], along: Sequence[Tensor | None]) -> list[Tensor]:
        with torch.enable_grad(), forward_ad.dual_level():
            leaves = [value.detach().requires_grad_() for value in at]
            moved = [
                leaf if direction is None else forward_ad.make_dual(leaf, direction)
                for leaf, direction in zip(leaves, along, strict=True)
            ]
            gradient = torch.autograd.grad(f(*moved), leaves, materialize_grads=True)
            tangents = [forward_ad.unpack_dual(each).tangent for each in gradient]
        return [torch.zeros_like(leaf) if t is None else t.detach() for leaf, t in zip(leaves, tangents, strict=True)]

    def inner_gradient(self, f: Callable[[Tensors], Tensor], at: Tensors, second_order: bool) -> Tensors:
        gradient = torch.autograd.grad(f(at), list(at.values()), create_graph=second_order, materialize_grads=True)
        return dict(zip(at, gradient, strict=True))

    def start(self, weights: Tensors, outer: bool) -> Tensors:
        own = {name: w.view_as(w) if outer and w.requires_grad else w.detach() for name, w in weights.items()}
        return {name: w.requires_grad_() for name, w in own.items()}


class Transformed(Differentiator):
    """Gradients by `torch.func`, which vmap can batch over tasks."""

    def value_and_gradient(self, f: Callable[[Tensors], Tensor], at: Tensors) -> tuple[Tensor, Tensors]:
        gradient, value = torch.func.grad_and_value(f)(at)
        return value, gradient

    def pullback(self, f: Callable[..., Sequence[Tensor]], *at: Tensor) -> tuple[Sequence[Tensor], Any]:
        values, pull, *_ = torch.func.vjp(lambda *tensors: tuple(f(*tensors)), *at)
        return values, lambda cotangents: pull(tuple(cotangents))

    def tangent(self, f: Callable[..., Tensor], at: Sequence[Tensor], along: Sequence[Tensor | None]) -> list[Tensor]:
        moving = [place for place, direction in enumerate(along) if direction is not None]

        def gradient(moved: list[Tensor]) -> tuple[Tensor, ...]:
            return torch.func.grad(f, argnums=tuple(range(len(at))))(*replaced(at, moving, moved))

        direction = [each for each in along if each is not None]
        _, tangents, *_ = torch.func.jvp(gradient, ([at[place] for place in moving],), (direction,))
        return list(tangents)

    def inner_gradient(self, f: Callable[[Tensors], Tensor], at: Tensors, second_order: bool) -> Tensors:
        gradient = torch.func.grad(f)(at)
        return gradient if second_order else {name: g.detach() for name, g in gradient.items()}

    def start(self, weights: Tensors, outer: bool) -> Tensors:
        del outer
        return weights


def begin(learner: Learner, theta: Tensors, support: Examples, context: Context) -> Fast:
    """As the learner begins, and the key of its dropout, where the task has one."""
    fast = learner.begin(theta, support, context)
    key = {DROPOUT: context.draws[DROPOUT]} if DROPOUT in context.draws else {}
    return fast._replace(state=fast.state | key)


def _order(learner: Learner, theta: Tensors, context: Context) -> int:
    """How often the inner loop's results are differentiable."""
    if not any(value.requires_grad for value in theta.values()):
        return 0
    return 1 if learner.is_first_order(context) else 2
