"""How gradients are taken, and how a derivative passes through the inner loop.

Two ways to take a gradient: recorded by `torch.autograd`, one task at a time, or transformed by `torch.func`, which
vmap batches over tasks. Three ways through the inner loop, equal but for rounding:

- unroll: keep what every step computed. Memory grows with the number of steps.
- remat: keep only the fast weights after each step (K x P), and compute each step again on the way back, where reverse
  mode over the step's own gradient gives its Hessian-vector product. Memory of activations: one step's.
- adjoint: the same recursion, with each Hessian-vector product by forward mode over the gradient (Kemaev et al. 2025,
  https://arxiv.org/abs/2505.00793), which keeps no graph of a gradient: less memory still, one more gradient a step.

With `spacing` above 1, only every spacing-th set of fast weights is kept and those between are computed again.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from metadist.learners import Context, Fast, Learner
from metadist.task import Examples

Tensors = dict[str, Tensor]
Mode = Literal["unroll", "remat", "adjoint"]
MODES: tuple[Mode, ...] = get_args(Mode)


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
        """Weights as the next inner step needs them, given whether an outer gradient passes through."""
        raise NotImplementedError

    def trajectory(self, learner: Learner, theta: Tensors, support: Examples, context: Context) -> Iterator[Fast]:
        """Fast weights after 0, 1, ... `inner_steps` steps."""
        outer = any(value.requires_grad for value in theta.values())
        fast = learner.begin(theta, support, context)
        yield fast
        for k in range(learner.inner_steps):
            fast = self.inner_step(learner, theta, fast, support, k, outer)
            yield fast

    def inner_step(self, learner: Learner, theta: Tensors, fast: Fast, support: Examples, k: int, outer: bool) -> Fast:
        """One inner step: a pure function of (theta, fast), which is all a cheaper differentiation needs."""
        fast = fast._replace(weights=self.start(fast.weights, outer))
        with torch.enable_grad():
            gradient = self.inner_gradient(
                lambda weights: learner.inner_loss(theta, fast._replace(weights=weights), support, k),
                fast.weights,
                second_order=outer and not learner.first_order,
            )
            return learner.update(theta, fast, gradient, k)

    def adapt(self, learner: Learner, theta: Tensors, support: Examples, context: Context) -> Fast:
        """Fast weights after the last inner step."""
        if self.mode == "unroll" or learner.inner_steps == 0:
            *_, fast = self.trajectory(learner, theta, support, context)
            return fast
        begun = learner.begin(theta, support, context)
        loop = _Loop(self, learner, [theta, *begun], [len(support.inputs), len(support.targets)])
        adapted = _InnerLoop.apply(loop, *loop.join(theta, begun), *support.inputs, *support.targets)
        return loop.fast(adapted[: loop.width])


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
        return {name: w if outer and w.requires_grad else w.detach().requires_grad_() for name, w in weights.items()}


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
            return torch.func.grad(f, argnums=tuple(range(len(at))))(*_replaced(at, moving, moved))

        direction = [each for each in along if each is not None]
        _, tangents, *_ = torch.func.jvp(gradient, ([at[place] for place in moving],), (direction,))
        return list(tangents)

    def inner_gradient(self, f: Callable[[Tensors], Tensor], at: Tensors, second_order: bool) -> Tensors:
        gradient = torch.func.grad(f)(at)
        return gradient if second_order else {name: g.detach() for name, g in gradient.items()}

    def start(self, weights: Tensors, outer: bool) -> Tensors:
        del outer
        return weights


class _Loop:
    """The inner loop over flat lists of tensors, which is what an autograd Function takes and returns.

    `theta`, and fast weights and state as `begin` returns them, give the names.
    """

    def __init__(self, ops: Differentiator, learner: Learner, named: list[Tensors], support: list[int]):
        self.ops, self.learner, self.support_sizes = ops, learner, support
        self.theta_names, self.weight_names, self.state_names = (list(tensors) for tensors in named)
        self.width = len(self.weight_names) + len(self.state_names)
        self.kept = range(0, learner.inner_steps, ops.spacing)

    def join(self, theta: Tensors, fast: Fast) -> list[Tensor]:
        return [*theta.values(), *fast.weights.values(), *fast.state.values()]

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Examples]:
        """Function arguments as theta, fast and support."""
        cut = len(self.theta_names)
        inputs, targets = self.support_sizes
        rest = tensors[cut + self.width :]
        return list(tensors[:cut]), list(tensors[cut : cut + self.width]), Examples(
            tuple(rest[:inputs]), tuple(rest[inputs : inputs + targets])
        )  # fmt: skip

    def theta(self, tensors: Sequence[Tensor]) -> Tensors:
        return dict(zip(self.theta_names, tensors, strict=True))

    def fast(self, tensors: Sequence[Tensor]) -> Fast:
        cut = len(self.weight_names)
        return Fast(
            dict(zip(self.weight_names, tensors[:cut], strict=True)),
            dict(zip(self.state_names, tensors[cut:], strict=True)),
        )

    def step(self, theta: Sequence[Tensor], fast: Sequence[Tensor], support: Examples, k: int, outer: bool) -> Any:
        after = self.ops.inner_step(self.learner, self.theta(theta), self.fast(fast), support, k, outer)
        return [*after.weights.values(), *after.state.values()]

    def pull(
        self, theta: list[Tensor], fast: list[Tensor], support: Examples, k: int, cotangents: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Cotangents of theta and of `fast` before step k from those after it."""
        if self.ops.mode == "adjoint" and not self.learner.first_order:
            return self._pull_forward(theta, fast, support, k, cotangents)
        cut = len(theta)
        floating = [place for place, tensor in enumerate(fast) if tensor.is_floating_point()]

        def step(*tensors: Tensor) -> list[Tensor]:
            given = _replaced(fast, floating, tensors[cut:])
            after = self.step(tensors[:cut], given, support, k, outer=True)
            return [after[place] for place in floating]

        _, pull = self.ops.pullback(step, *theta, *(fast[place] for place in floating))
        pulled = pull([cotangents[place] for place in floating])
        return list(pulled[:cut]), _replaced(cotangents, floating, pulled[cut:])

    def _pull_forward(
        self, theta: list[Tensor], fast: list[Tensor], support: Examples, k: int, cotangents: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """By the update's pullback, then the Hessian-vector product as the tangent of the gradient of the inner loss
        with respect to everything, along the cotangent of the gradient with respect to the fast weights."""
        cut, number = len(self.weight_names), len(theta)
        floating = [place for place, tensor in enumerate(fast) if tensor.is_floating_point()]

        def loss(*tensors: Tensor) -> Tensor:
            given = self.fast(_replaced(fast, floating, tensors[number:]))
            return self.learner.inner_loss(self.theta(tensors[:number]), given, support, k)

        def update(*tensors: Tensor) -> list[Tensor]:
            gradient = dict(zip(self.weight_names, tensors[:cut], strict=True))
            given = self.fast(_replaced(fast, floating, tensors[cut + number :]))
            after = self.learner.update(self.theta(tensors[cut : cut + number]), given, gradient, k)
            return [[*after.weights.values(), *after.state.values()][place] for place in floating]

        at = [*theta, *(fast[place] for place in floating)]
        with torch.enable_grad():
            gradient = self.ops.inner_gradient(
                lambda weights: loss(*at[:number], *weights.values(), *at[number + cut :]),
                self.ops.start(self.fast(fast).weights, outer=False),
                second_order=False,
            )
        _, pull = self.ops.pullback(update, *gradient.values(), *at)
        pulled = pull([cotangents[place] for place in floating])
        still = [None] * number, [None] * (len(at) - number - cut)
        products = self.ops.tangent(loss, at, [*still[0], *pulled[:cut], *still[1]])
        total = [a + b for a, b in zip(pulled[cut:], products, strict=True)]
        return total[:number], _replaced(cotangents, floating, total[number:])


class _InnerLoop(Function):
    """(theta, fast before, support) -> fast after the last step, and the fast weights kept on the way."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loop: _Loop, *tensors: Tensor) -> tuple[Tensor, ...]:
        theta, fast, support = loop.split(tensors)
        kept: list[Tensor] = []
        for k in range(loop.learner.inner_steps):
            if k in loop.kept and k > 0:
                kept += fast
            fast = [tensor.detach() for tensor in loop.step(theta, fast, support, k, outer=False)]
        return tuple(tensor if tensor.is_floating_point() else tensor.clone() for tensor in (*fast, *kept))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.loop, *tensors = inputs
        integers = [tensor for tensor in output[: ctx.loop.width] if not tensor.is_floating_point()]
        ctx.mark_non_differentiable(*integers, *output[ctx.loop.width :])
        ctx.save_for_backward(*tensors, *output[ctx.loop.width :])
        ctx.set_materialize_grads(False)  # there would be zeros for all that is kept
        ctx.number = len(tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        loop: _Loop = ctx.loop
        saved = [tensor.detach() for tensor in ctx.saved_tensors]  # torch.func would record this, to differentiate it
        theta, begun, support = loop.split(saved[: ctx.number])
        kept = [*begun, *saved[ctx.number :]]
        pairs = zip(cotangents, begun, strict=False)
        of_fast = [torch.zeros_like(tensor) if given is None else given.detach() for given, tensor in pairs]
        of_theta = [torch.zeros_like(tensor) for tensor in theta]
        end = loop.learner.inner_steps
        for number, first in reversed(list(enumerate(loop.kept))):
            segment = [kept[number * loop.width : (number + 1) * loop.width]]
            for k in range(first, end - 1):
                segment.append([t.detach() for t in loop.step(theta, segment[-1], support, k, outer=False)])
            for k in reversed(range(first, end)):
                more, of_fast = loop.pull(theta, segment.pop(), support, k, of_fast)
                of_theta = [a + b for a, b in zip(of_theta, more, strict=True)]
            end = first
        rest = [None] * sum(loop.support_sizes)
        floats = [c if t.is_floating_point() else None for c, t in zip(of_fast, begun, strict=True)]
        return (None, *of_theta, *floats, *rest)


def _replaced(tensors: Sequence[Tensor], places: Sequence[int], values: Sequence[Tensor]) -> list[Tensor]:
    """`tensors` with others at some places."""
    changed = list(tensors)
    for place, value in zip(places, values, strict=True):
        changed[place] = value
    return changed
