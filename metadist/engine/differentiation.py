"""How gradients are taken, and how a derivative passes through the inner loop.

Two ways to take a gradient: recorded by `torch.autograd`, one task at a time, or transformed by `torch.func`, which
vmap batches over tasks. Two ways through the inner loop, equal but for rounding:

- unroll: keep what every step computed. Memory grows with the number of steps.
- remat: keep only the fast weights after each step (K x P), and compute each step again on the way back, where reverse
  mode over the step's own gradient gives its Hessian-vector product. Memory of activations: one step's. With `spacing`
  above 1, only every spacing-th set of fast weights is kept and those between are computed again.

A third, forward mode over each step's gradient (Kemaev et al. 2025, https://arxiv.org/abs/2505.00793), was measured on
networks of all kinds here, with 10 to 50 steps: never faster than remat, and never with less memory.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._functorch.eager_transforms import (
    _create_differentiable,
    _undo_create_differentiable,
    _wrap_all_tensors,
    grad_increment_nesting,
)
from torch.autograd import Function
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_structure, tree_unflatten

from metadist.core.errors import InputError
from metadist.core.task import Examples, Task
from metadist.learners import Context, Fast, Learner
from metadist.learners.learner import at_once, one_by_one
from metadist.models.model import DROPOUT

Tensors = dict[str, Tensor]
Mode = Literal["unroll", "remat"]
MODES: tuple[Mode, ...] = get_args(Mode)
STEP_LOSSES = "sum of the steps' losses"
NO_EXAMPLES = Examples((), ())


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

    def each(self, f: Callable[[Tensors, Task], Tensor], stacked: Tensors, task: Task) -> Tensor:
        """f(weights, task), a scalar, of each slice of the weights [n, ...]: [n]."""
        raise NotImplementedError

    def inner_gradient(self, f: Callable[[Tensors], Tensor], at: Tensors, second_order: bool) -> Tensors:
        """The gradient of f at weights that `start` returned, differentiable itself where asked to be."""
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
        fast = _begin(learner, theta, support, context)
        yield fast
        for k in range(learner.inner_steps):
            fast = self.inner_step(learner, theta, fast, Task(support, NO_EXAMPLES), k, order)
            yield fast

    def adapt(self, learner: Learner, theta: Tensors, support: Examples, context: Context) -> Fast:
        """Fast weights after the last inner step."""
        fast = _begin(learner, theta, support, context)
        return self._inner_loop(learner, theta, fast, Task(support, NO_EXAMPLES), context)

    def multi_step_loss(self, learner: Learner, theta: Tensors, task: Task, context: Context) -> Tensor:
        """The sum of the learner's `step_loss` over the inner steps."""
        fast = _begin(learner, theta, task.support, context)
        fast = fast._replace(state=fast.state | {STEP_LOSSES: next(iter(theta.values())).new_zeros(())})
        return self._inner_loop(learner, theta, fast, task, context).state[STEP_LOSSES]

    def inner_step(self, learner: Learner, theta: Tensors, fast: Fast, task: Task, k: int, order: int) -> Fast:
        """One inner step, differentiable as often as `order` says (0, 1 or 2): a pure function of (theta, fast), which
        is all that rematerialisation needs. Beside what the learner updates, it moves on what the engine has in the
        state: the key of dropout, and the sum of the steps' losses on the query set."""
        fast = fast._replace(weights=self.start(fast.weights, outer=order > 0))
        with torch.enable_grad():
            gradient = self.inner_gradient(
                lambda weights: learner.inner_loss(theta, fast._replace(weights=weights), task.support, k),
                fast.weights,
                second_order=order > 1,
            )
            after = learner.update(theta, fast, gradient, k)
            state = dict(after.state)
            if DROPOUT in fast.state:
                state[DROPOUT] = fast.state[DROPOUT] + 1
            if STEP_LOSSES in fast.state:
                loss = learner.step_loss(theta, after._replace(state=state), task.query, k)
                state[STEP_LOSSES] = fast.state[STEP_LOSSES] + loss
            return after._replace(state=state)

    def _inner_loop(self, learner: Learner, theta: Tensors, fast: Fast, task: Task, context: Context) -> Fast:
        order = _order(learner, theta, context)
        learned = any(part.requires_grad for parts in task.support for part in parts)  # the support set, by a learner
        if self.mode == "remat" and order > 0 and learner.inner_steps > 0 and not learned:
            tensors, structure = tree_flatten((theta, fast, task))
            loop = _Rematerialised(self, learner, structure, tree_structure(fast), order)
            return loop.fast(_InnerLoop.apply(loop, *tensors)[: loop.width])
        for k in range(learner.inner_steps):
            fast = self.inner_step(learner, theta, fast, task, k, order)
            if order > 1:
                _refuse_recomputation(learner)
        return fast


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

    def each(self, f: Callable[[Tensors, Task], Tensor], stacked: Tensors, task: Task) -> Tensor:
        return one_by_one(f, stacked, task)

    def inner_gradient(self, f: Callable[[Tensors], Tensor], at: Tensors, second_order: bool) -> Tensors:
        gradient = torch.autograd.grad(f(at), list(at.values()), create_graph=second_order, materialize_grads=True)
        return dict(zip(at, gradient, strict=True))

    def start(self, weights: Tensors, outer: bool) -> Tensors:
        own = {name: w.view_as(w) if outer and w.requires_grad else w.detach() for name, w in weights.items()}
        return {name: w.requires_grad_() for name, w in own.items()}


class Transformed(Differentiator):
    """Gradients as those of `torch.func`, which vmap can batch over tasks. What `torch.func.grad` and `vjp` do beside,
    imports torch's compiler to keep it off them: over a second, and 80 MB."""

    def value_and_gradient(self, f: Callable[[Tensors], Tensor], at: Tensors) -> tuple[Tensor, Tensors]:
        def value(*leaves: Tensor) -> tuple[Tensor]:
            return (f(dict(zip(at, leaves, strict=True))),)

        with _differentiable() as level:
            values, leaves = _at_leaves(value, at.values(), level)
            gradient = _backward(values, leaves, None, create_graph=True)
            (found, *gradient) = (_undo_create_differentiable(each, level) for each in (*values, *gradient))
        return found, dict(zip(at, gradient, strict=True))

    def pullback(self, f: Callable[..., Sequence[Tensor]], *at: Tensor) -> tuple[Sequence[Tensor], Any]:
        with _differentiable() as level:
            values, leaves = _at_leaves(f, at, level)
            found = [_undo_create_differentiable(value, level) for value in values]
        return found, lambda cotangents: _backward(values, leaves, cotangents, create_graph=torch.is_grad_enabled())

    def each(self, f: Callable[[Tensors, Task], Tensor], stacked: Tensors, task: Task) -> Tensor:
        return at_once(f, stacked, task)

    def inner_gradient(self, f: Callable[[Tensors], Tensor], at: Tensors, second_order: bool) -> Tensors:
        _, gradient = self.value_and_gradient(f, at)
        return gradient if second_order else {name: g.detach() for name, g in gradient.items()}

    def start(self, weights: Tensors, outer: bool) -> Tensors:
        del outer
        return weights


@contextmanager
def _differentiable() -> Iterator[int]:
    """A level of nested derivatives, by number."""
    hooks = torch.autograd.graph.disable_saved_tensors_hooks("torch.func does not support saved tensor hooks")
    with hooks, grad_increment_nesting() as level, torch.enable_grad():
        yield level


def _at_leaves(
    f: Callable[..., Sequence[Tensor]], at: Iterable[Tensor], level: int
) -> tuple[Sequence[Tensor], list[Tensor]]:
    """f at `at`, and the leaves of that level in the place of `at`."""
    leaves = [_create_differentiable(_wrap_all_tensors(tensor, level), level) for tensor in at]
    return f(*leaves), leaves


def _backward(
    values: Sequence[Tensor], leaves: Sequence[Tensor], cotangents: Sequence[Tensor] | None, create_graph: bool
) -> tuple[Tensor, ...]:
    """Cotangents of the leaves, zeros where nothing depends on them; those of the one value are 1 if not given."""
    reached = [place for place, value in enumerate(values) if value.requires_grad]
    if not reached:
        return tuple(map(torch.zeros_like, leaves))
    found = torch.autograd.grad(
        [values[place] for place in reached],
        leaves,
        None if cotangents is None else [cotangents[place] for place in reached],
        retain_graph=cotangents is not None,
        create_graph=create_graph,
        allow_unused=True,  # zeros by `materialize_grads` would ask for a gradient, and keep what they come from
    )
    return tuple(torch.zeros_like(leaf) if each is None else each for each, leaf in zip(found, leaves, strict=True))


class _Rematerialised:
    """An inner loop over flat lists of tensors, which is what an autograd Function takes and returns.

    `structure` is that of (theta, fast weights as the loop begins with them, task), `of_fast` that of the second.
    """

    def __init__(self, ops: Differentiator, learner: Learner, structure: TreeSpec, of_fast: TreeSpec, order: int):
        self.ops, self.learner, self.order = ops, learner, order
        self.structure, self.of_fast, self.width = structure, of_fast, of_fast.num_leaves
        self.kept = range(0, learner.inner_steps, ops.spacing)

    def fast(self, tensors: Sequence[Tensor]) -> Fast:
        return tree_unflatten(tensors, self.of_fast)

    def step(self, theta: Tensors, fast: Fast, task: Task, k: int, order: int) -> Fast:
        """An inner step whose results have the order of what it begins with. Raises InputError where the learner's
        update returns other names."""
        after = self.ops.inner_step(self.learner, theta, fast, task, k, order)
        if any(set(one) != set(other) for one, other in zip(after, fast, strict=True)):
            raise InputError("the learner's update must return weights and state of the names that its begin gave")
        return Fast(*({name: one[name] for name in other} for one, other in zip(after, fast, strict=True)))

    def step_alone(self, theta: Tensors, fast: Fast, task: Task, k: int) -> Fast:
        return tree_map(Tensor.detach, self.step(theta, fast, task, k, 0))

    def pull(
        self, theta: Tensors, fast: Fast, task: Task, k: int, cotangents: list[Tensor]
    ) -> tuple[Sequence[Tensor], list[Tensor]]:
        """Cotangents of theta and of `fast` before step k from those of the fast weights after it."""
        tensors = tree_leaves(fast)
        floating = [place for place, tensor in enumerate(tensors) if tensor.is_floating_point()]

        def step(*given: Tensor) -> list[Tensor]:
            weights = dict(zip(theta, given, strict=False))
            after = self.step(
                weights, self.fast(_replaced(tensors, floating, given[len(theta) :])), task, k, self.order
            )
            after = tree_leaves(after)
            return [after[place] for place in floating]

        _, pull = self.ops.pullback(step, *theta.values(), *(tensors[place] for place in floating))
        pulled = pull([cotangents[place] for place in floating])
        return pulled[: len(theta)], _replaced(cotangents, floating, pulled[len(theta) :])


class _InnerLoop(Function):
    """(theta, fast weights, task) -> fast weights after the last step, and those kept on the way. Its derivative is
    found step by step backwards, each step computed again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loop: _Rematerialised, *tensors: Tensor) -> tuple[Tensor, ...]:
        theta, fast, task = tree_unflatten(tensors, loop.structure)
        kept: list[Tensor] = []
        for k in range(loop.learner.inner_steps):
            if k in loop.kept and k > 0:
                kept += tree_leaves(fast)
            fast = loop.step_alone(theta, fast, task, k)
        return tuple(t if t.is_floating_point() else t.clone() for t in (*tree_leaves(fast), *kept))

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
        loop: _Rematerialised = ctx.loop
        saved = [tensor.detach() for tensor in ctx.saved_tensors]  # torch.func would record this, to differentiate it
        theta, fast, task = tree_unflatten(saved[: ctx.number], loop.structure)
        begun = tree_leaves(fast)
        kept = [*begun, *saved[ctx.number :]]
        pairs = zip(cotangents, begun, strict=False)
        of_fast = [torch.zeros_like(tensor) if given is None else given.detach() for given, tensor in pairs]
        of_theta = [torch.zeros_like(tensor) for tensor in theta.values()]
        end = loop.learner.inner_steps
        for number, first in reversed(list(enumerate(loop.kept))):
            segment = [loop.fast(kept[number * loop.width : (number + 1) * loop.width])]
            for k in range(first, end - 1):
                segment.append(loop.step_alone(theta, segment[-1], task, k))
            for k in reversed(range(first, end)):
                more, of_fast = loop.pull(theta, segment.pop(), task, k, of_fast)
                of_theta = [a + b for a, b in zip(of_theta, more, strict=True)]
            end = first
        floats = [c if t.is_floating_point() else None for c, t in zip(of_fast, begun, strict=True)]
        return (None, *of_theta, *floats, *[None] * (ctx.number - len(of_theta) - len(begun)))


def _begin(learner: Learner, theta: Tensors, support: Examples, context: Context) -> Fast:
    """As the learner begins, and the key of its dropout, where the task has one."""
    fast = learner.begin(theta, support, context)
    key = {DROPOUT: context.draws[DROPOUT]} if DROPOUT in context.draws else {}
    return fast._replace(state=fast.state | key)


def _order(learner: Learner, theta: Tensors, context: Context) -> int:
    """How often the inner loop's results are differentiable."""
    if not any(value.requires_grad for value in theta.values()):
        return 0
    return 1 if learner.is_first_order(context) else 2


def _refuse_recomputation(learner: Learner) -> None:
    """Raise InputError where the model computes activations again on the way back, which would be with the weights of
    another inner step."""
    if learner.model.recomputes:
        raise InputError(
            f"{learner.model.recomputes} computes activations again on the way back (torch.utils.checkpoint), where "
            "the weights of the inner step are no longer in place: set engine.differentiation=remat, or take that out"
        )


def _replaced(tensors: Sequence[Tensor], places: Sequence[int], values: Sequence[Tensor]) -> list[Tensor]:
    """`tensors` with others at some places."""
    changed = list(tensors)
    for place, value in zip(places, values, strict=True):
        changed[place] = value
    return changed
