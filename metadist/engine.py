"""How a chunk of tasks is computed and differentiated: a loop over tasks, or all of them at once with vmap.

Both derive adaptation and meta-gradient from the same learner and agree to rounding. Differentiation is by full unroll.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metadist.draws import Draws
from metadist.errors import InputError
from metadist.layout import Layout
from metadist.learners import Context, Fast, Learner
from metadist.losses import Loss
from metadist.task import Examples, Task, TaskId, stack

Tensors = dict[str, Tensor]
Kind = Literal["loop", "vmap"]


class MetaGradients(NamedTuple):
    """What a chunk of T tasks yields: outer losses [T] and one meta-gradient a row [T, P]."""

    losses: Tensor
    rows: Tensor


class _Unroll:
    """The inner loop, unrolled; a subclass says how gradients are taken."""

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
        *_, fast = self.trajectory(learner, theta, support, context)
        return fast


class Recorded(_Unroll):
    """Gradients by `torch.autograd`, one task at a time."""

    def value_and_gradient(self, f: Callable[[Tensors], Tensor], at: Tensors) -> tuple[Tensor, Tensors]:
        leaves = {name: value.detach().requires_grad_() for name, value in at.items()}
        with torch.enable_grad():
            value = f(leaves)
        gradient = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        return value.detach(), dict(zip(leaves, gradient, strict=True))

    def inner_gradient(self, f: Callable[[Tensors], Tensor], at: Tensors, second_order: bool) -> Tensors:
        gradient = torch.autograd.grad(f(at), list(at.values()), create_graph=second_order, materialize_grads=True)
        return dict(zip(at, gradient, strict=True))

    def start(self, weights: Tensors, outer: bool) -> Tensors:
        return {name: w if outer and w.requires_grad else w.detach().requires_grad_() for name, w in weights.items()}


class Transformed(_Unroll):
    """Gradients by `torch.func`, which vmap can batch over tasks."""

    def value_and_gradient(self, f: Callable[[Tensors], Tensor], at: Tensors) -> tuple[Tensor, Tensors]:
        gradient, value = torch.func.grad_and_value(f)(at)
        return value, gradient

    def inner_gradient(self, f: Callable[[Tensors], Tensor], at: Tensors, second_order: bool) -> Tensors:
        gradient = torch.func.grad(f)(at)
        return gradient if second_order else {name: g.detach() for name, g in gradient.items()}

    def start(self, weights: Tensors, outer: bool) -> Tensors:
        del outer
        return weights


class Engine:
    """Computes one learner on one device.

    `theta` is always the flat vector [P] of `layout`, in `dtype` on any device. Tasks are numpy arrays or tensors;
    their floating point fields are converted to `dtype`.
    """

    def __init__(self, learner: Learner, kind: Kind = "loop", device: str = "cpu", dtype: torch.dtype = torch.float32):
        if kind not in learner.engines:
            raise InputError(
                f"engine.kind={kind!r} cannot compute {type(learner).__name__}: use {' or '.join(learner.engines)}"
            )
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise InputError(
                "engine.device=cuda, but torch sees no GPU here: check fleet.gpus_per_worker and the driver"
            )
        self.learner = learner
        self.kind = kind
        self.device = torch.device(device)
        self.dtype = dtype
        self.layout = Layout.of(learner.layout())
        self._unroll = Recorded() if kind == "loop" else Transformed()
        learner.model.to(self.device, dtype)

    def fingerprint(self) -> str:
        """What the bits depend on in the device: the CPU's vector capability, or the GPU's model, CUDA and cuDNN."""
        if self.device.type == "cuda":
            name, cudnn = torch.cuda.get_device_name(self.device), torch.backends.cudnn.version()
            return f"{name}, CUDA {torch.version.cuda}, cuDNN {cudnn}"
        return f"CPU {torch.backends.cpu.get_cpu_capability()}"

    def initial_theta(self) -> Tensor:
        """The learner's initial theta [P]."""
        return self.layout.flatten(self.learner.layout()).to(self.device, self.dtype)

    def meta_gradients(
        self,
        theta: Tensor,
        tasks: Sequence[Task],
        step: int = 0,
        meta_steps: int = 1,
        draws: Sequence[Draws] | None = None,
    ) -> MetaGradients:
        """Outer losses [T] and meta-gradients [T, P] of T tasks at theta [P].

        `draws` are the tasks' own random streams; by default they are keyed by (step, place in `tasks`).
        """

        def one(weights: Tensors, task: Task, drawn: Tensors) -> tuple[Tensor, Tensors]:
            context = Context(step, meta_steps, drawn)
            loss, gradient = self.learner.meta_gradient(self._unroll, weights, task, context)
            return loss.detach(), {name: g.detach() for name, g in gradient.items()}

        with sdpa_kernel(SDPBackend.MATH):
            weights = self._weights(theta)
            if self.kind == "vmap":
                losses, gradients = torch.func.vmap(one, (None, 0, 0))(weights, *self._stacked(tasks, step, draws))
                return MetaGradients(losses, self.layout.flatten_rows(gradients))
            losses = torch.empty(len(tasks), dtype=self.dtype, device=self.device)
            rows = torch.empty(len(tasks), self.layout.size, dtype=self.dtype, device=self.device)
            for t, (task, drawn) in enumerate(self._separate(tasks, step, draws)):
                losses[t], gradient = one(weights, task, drawn)
                rows[t] = self.layout.flatten(gradient)
            return MetaGradients(losses, rows)

    @torch.no_grad()
    def evaluate(
        self,
        theta: Tensor,
        tasks: Sequence[Task],
        metrics: dict[str, Loss],
        transductive: bool = True,
        draws: Sequence[Draws] | None = None,
        step: int = 0,
        meta_steps: int = 1,
    ) -> dict[str, Tensor]:
        """{metric: [T, inner_steps + 1]}: each metric on the query set before adaptation and after every inner step.

        `transductive`: all query examples are predicted as one batch, sharing its normalisation statistics. Otherwise
        each is predicted in a batch with the support set, without the other queries (Nichol et al. 2018, section 6.1).
        """

        def one(weights: Tensors, task: Task, drawn: Tensors) -> dict[str, Tensor]:
            measured: list[list[Tensor]] = []
            for fast in self._unroll.trajectory(self.learner, weights, task.support, Context(step, meta_steps, drawn)):
                with torch.no_grad():
                    outputs = self._predict(weights, fast, task, transductive)
                    measured.append([metric(outputs, *task.query.targets) for metric in metrics.values()])
            return {name: torch.stack([m[i] for m in measured]) for i, name in enumerate(metrics)}

        with sdpa_kernel(SDPBackend.MATH):
            weights = self._weights(theta)
            if self.kind == "vmap":
                return torch.func.vmap(one, (None, 0, 0))(weights, *self._stacked(tasks, 0, draws))
            results = [one(weights, task, drawn) for task, drawn in self._separate(tasks, 0, draws)]
            return {name: torch.stack([result[name] for result in results]) for name in metrics}

    def adapt(self, theta: Tensor, support: Examples) -> Callable[..., Tensor]:
        """Adapt to a support set; returns `predict(*inputs, transductive=True) -> outputs [n, ...]`, see `evaluate`."""
        weights = self._weights(theta)
        support = Examples(tuple(map(self._tensor, support.inputs)), tuple(map(self._tensor, support.targets)))
        drawn = self._draw(len(support.inputs[0]), Draws(0, TaskId("test", 0, 0), stream=1))
        with sdpa_kernel(SDPBackend.MATH):
            fast = self._unroll.adapt(self.learner, weights, support, Context(0, 1, drawn))

        @torch.no_grad()
        def predict(*inputs: Tensor, transductive: bool = True) -> Tensor:
            query = Examples(tuple(map(self._tensor, inputs)), ())
            return self._predict(weights, fast, Task(support, query), transductive)

        return predict

    def trace(self, theta: Tensor, task: Task, draws: Draws) -> list[tuple[float, float]]:
        """Support loss and norm of the fast weights before and after every inner step of one task."""
        weights, support = self._weights(theta), self.tensors(task).support
        context = Context(0, 1, self._draw(len(support.inputs[0]), draws))
        traced = []
        for k, fast in enumerate(self._unroll.trajectory(self.learner, weights, support, context)):
            loss = self.learner.inner_loss(weights, fast, support, min(k, self.learner.inner_steps - 1))
            norm = torch.stack([w.detach().norm() for w in fast.weights.values()]).norm()
            traced.append((float(loss.detach()), float(norm)))
        return traced

    def tensors(self, task: Task) -> Task:
        """The task's arrays as tensors on the engine's device, floating point ones in its dtype."""
        return task.map(self._tensor)

    def _weights(self, theta: Tensor) -> Tensors:
        return self.layout.unflatten(theta.to(self.device, self.dtype))

    def outputs(self, weights: Tensors, task: Task, transductive: bool) -> Tensor:
        """Query outputs of the bare model with `weights`, in one batch or each with the support set, see `evaluate`."""
        return self._predict(self.learner.model.parameters, Fast(weights, {}), task, transductive)

    def _predict(self, theta: Tensors, fast: Fast, task: Task, transductive: bool) -> Tensor:
        if transductive:
            return self.learner.predict(theta, fast, task.query.inputs)

        def alone(*query: Tensor) -> Tensor:
            pairs = zip(task.support.inputs, query, strict=True)
            inputs = tuple(torch.cat([support, example.unsqueeze(0)]) for support, example in pairs)
            return self.learner.predict(theta, fast, inputs)[-1]

        return torch.func.vmap(alone)(*task.query.inputs)

    def _tensor(self, array: object) -> Tensor:
        tensor = torch.as_tensor(array)
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

    def _draw(self, support_size: int, draws: Draws) -> Tensors:
        return {name: self._tensor(value) for name, value in self.learner.draw(draws, support_size).items()}

    def _separate(
        self, tasks: Sequence[Task], step: int, draws: Sequence[Draws] | None
    ) -> Iterator[tuple[Task, Tensors]]:
        for t, task in enumerate(tasks):
            own = draws[t] if draws else Draws(0, TaskId("train", step, t), stream=1)
            yield self.tensors(task), self._draw(len(task.support.inputs[0]), own)

    def _stacked(self, tasks: Sequence[Task], step: int, draws: Sequence[Draws] | None) -> tuple[Task, Tensors]:
        separate = list(self._separate(tasks, step, draws))
        drawn = {name: torch.stack([own[name] for _, own in separate]) for name in separate[0][1]}
        return stack([task for task, _ in separate], torch.stack), drawn
