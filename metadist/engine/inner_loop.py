"""The inner loop as one operation whose derivative is found step by step backwards, each step computed again."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from metadist.core.errors import InputError
from metadist.core.task import Examples, Task
from metadist.learners import Fast, Learner

if TYPE_CHECKING:
    from metadist.engine.differentiation import Differentiator

Tensors = dict[str, Tensor]


def run_inner_loop(
    ops: "Differentiator", learner: Learner, theta: Tensors, begun: Fast, task: Task, order: int
) -> Fast:
    """Fast weights after the last step from those that `begin` returned; differentiable in theta and in these."""
    parts = [part for examples in task for part in examples]
    loop = _Loop(ops, learner, [theta, *begun], [len(part) for part in parts], order)
    adapted = _InnerLoop.apply(loop, *loop.join(theta, begun), *(array for part in parts for array in part))
    return loop.fast(adapted[: loop.width])


class _Loop:
    """The inner loop over flat lists of tensors, which is what an autograd Function takes and returns.

    `theta`, and fast weights and state as `begin` returns them, give the names.
    """

    def __init__(
        self, ops: "Differentiator", learner: Learner, named: list[Tensors], task_sizes: list[int], order: int
    ):
        self.ops, self.learner, self.task_sizes, self.order = ops, learner, task_sizes, order
        self.theta_names, self.weight_names, self.state_names = (list(tensors) for tensors in named)
        self.width = len(self.weight_names) + len(self.state_names)
        self.kept = range(0, learner.inner_steps, ops.spacing)

    def join(self, theta: Tensors, fast: Fast) -> list[Tensor]:
        return [*theta.values(), *fast.weights.values(), *fast.state.values()]

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Task]:
        """Function arguments as theta, fast and task."""
        cut = len(self.theta_names)
        rest = iter(tensors[cut + self.width :])
        parts = [tuple(next(rest) for _ in range(size)) for size in self.task_sizes]
        task = Task(Examples(*parts[:2]), Examples(*parts[2:]))
        return list(tensors[:cut]), list(tensors[cut : cut + self.width]), task

    def theta(self, tensors: Sequence[Tensor]) -> Tensors:
        return dict(zip(self.theta_names, tensors[: len(self.theta_names)], strict=True))

    def fast(self, tensors: Sequence[Tensor]) -> Fast:
        cut = len(self.weight_names)
        return Fast(
            dict(zip(self.weight_names, tensors[:cut], strict=True)),
            dict(zip(self.state_names, tensors[cut:], strict=True)),
        )

    def step(self, theta: Sequence[Tensor], fast: Sequence[Tensor], task: Task, k: int, order: int) -> list[Tensor]:
        return self.flat(self.ops.inner_step(self.learner, self.theta(theta), self.fast(fast), task, k, order))

    def flat(self, fast: Fast) -> list[Tensor]:
        """Weights and state in the order in which they began. Raises InputError where there are others than then."""
        if set(fast.weights) != set(self.weight_names) or set(fast.state) != set(self.state_names):
            raise InputError("the learner's update must return weights and state of the names that its begin gave")
        return [*(fast.weights[name] for name in self.weight_names), *(fast.state[name] for name in self.state_names)]

    def pull(
        self, theta: list[Tensor], fast: list[Tensor], task: Task, k: int, cotangents: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Cotangents of theta and of `fast` before step k from those after it."""
        if self.ops.mode == "adjoint" and self.order > 1:
            return self._pull_forward(theta, fast, task, k, cotangents)
        cut = len(theta)
        floating = [place for place, tensor in enumerate(fast) if tensor.is_floating_point()]

        def step(*tensors: Tensor) -> list[Tensor]:
            given = replaced(fast, floating, tensors[cut:])
            after = self.step(tensors[:cut], given, task, k, self.order)
            return [after[place] for place in floating]

        _, pull = self.ops.pullback(step, *theta, *(fast[place] for place in floating))
        pulled = pull([cotangents[place] for place in floating])
        return list(pulled[:cut]), replaced(cotangents, floating, pulled[cut:])

    def _pull_forward(
        self, theta: list[Tensor], fast: list[Tensor], task: Task, k: int, cotangents: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """By the update's pullback, then the Hessian-vector product as the tangent of the gradient of the inner loss
        with respect to everything, along the cotangent of the gradient with respect to the fast weights."""
        cut, number = len(self.weight_names), len(theta)
        floating = [place for place, tensor in enumerate(fast) if tensor.is_floating_point()]

        def loss(*tensors: Tensor) -> Tensor:
            given = self.fast(replaced(fast, floating, tensors[number:]))
            return self.learner.inner_loss(self.theta(tensors[:number]), given, task.support, k)

        def update(*tensors: Tensor) -> list[Tensor]:
            gradient = dict(zip(self.weight_names, tensors[:cut], strict=True))
            given, weights = self.fast(replaced(fast, floating, tensors[cut + number :])), self.theta(tensors[cut:])
            after = self.ops.after_update(self.learner, weights, given, gradient, task.query, k)
            return [self.flat(after)[place] for place in floating]

        at = [*theta, *(fast[place] for place in floating)]
        with torch.enable_grad():
            gradient = self.ops.inner_gradient(
                lambda weights: loss(*at[:number], *weights.values(), *at[number + cut :]),
                self.ops.start(self.fast(fast).weights, outer=False),
                second_order=False,
            )
        refuse_recomputation(self.learner)
        _, pull = self.ops.pullback(update, *gradient.values(), *at)
        pulled = pull([cotangents[place] for place in floating])
        still = [None] * number, [None] * (len(at) - number - cut)
        try:
            products = self.ops.tangent(loss, at, [*still[0], *pulled[:cut], *still[1]])
        except (NotImplementedError, RuntimeError) as error:
            raise InputError(
                "engine.differentiation=adjoint needs forward-mode derivatives of every layer and the loss, which some "
                f"lack ({str(error).splitlines()[0]}): use remat"
            ) from error
        total = [a + b for a, b in zip(pulled[cut:], products, strict=True)]
        return total[:number], replaced(cotangents, floating, total[number:])


class _InnerLoop(Function):
    """(theta, fast before, task) -> fast after the last step, and the fast weights kept on the way."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loop: _Loop, *tensors: Tensor) -> tuple[Tensor, ...]:
        theta, fast, task = loop.split(tensors)
        kept: list[Tensor] = []
        for k in range(loop.learner.inner_steps):
            if k in loop.kept and k > 0:
                kept += fast
            fast = [tensor.detach() for tensor in loop.step(theta, fast, task, k, 0)]
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
        theta, begun, task = loop.split(saved[: ctx.number])
        kept = [*begun, *saved[ctx.number :]]
        pairs = zip(cotangents, begun, strict=False)
        of_fast = [torch.zeros_like(tensor) if given is None else given.detach() for given, tensor in pairs]
        of_theta = [torch.zeros_like(tensor) for tensor in theta]
        end = loop.learner.inner_steps
        for number, first in reversed(list(enumerate(loop.kept))):
            segment = [kept[number * loop.width : (number + 1) * loop.width]]
            for k in range(first, end - 1):
                segment.append([t.detach() for t in loop.step(theta, segment[-1], task, k, 0)])
            for k in reversed(range(first, end)):
                more, of_fast = loop.pull(theta, segment.pop(), task, k, of_fast)
                of_theta = [a + b for a, b in zip(of_theta, more, strict=True)]
            end = first
        rest = [None] * sum(loop.task_sizes)
        floats = [c if t.is_floating_point() else None for c, t in zip(of_fast, begun, strict=True)]
        return (None, *of_theta, *floats, *rest)


def refuse_recomputation(learner: Learner) -> None:
    """Raise InputError where the model computes activations again on the way back, which would be with the weights of
    another inner step."""
    if learner.model.recomputes:
        raise InputError(
            f"{learner.model.recomputes} computes activations again on the way back (torch.utils.checkpoint), where "
            "the weights of the inner step are no longer in place: set engine.differentiation=remat, or take that out"
        )


def replaced(tensors: Sequence[Tensor], places: Sequence[int], values: Sequence[Tensor]) -> list[Tensor]:
    """`tensors` with others at some places."""
    changed = list(tensors)
    for place, value in zip(places, values, strict=True):
        changed[place] = value
    return changed
