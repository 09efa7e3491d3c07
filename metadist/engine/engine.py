"""A chunk of tasks computed: a loop over tasks, or all of them at once with vmap.

Both derive adaptation and meta-gradient from the same learner and agree to rounding.
"""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from metadist.core.errors import InputError
from metadist.core.random import Draws
from metadist.core.task import Examples, Task, TaskId, Tasks, as_labels, stack, ways_of
from metadist.engine.differentiation import Differentiator, Recorded, Tensors, Transformed
from metadist.engine.frozen_trunk import Trunk, trunk_of
from metadist.engine.graph_cache import Program, Watched, record
from metadist.engine.layout import Layout
from metadist.engine.memory import is_out_of_memory, out_of_memory
from metadist.engine.method import Kind, Method
from metadist.engine.remedies import remedy
from metadist.learners import Context, Learner
from metadist.learners.query import predict_query
from metadist.models.losses import Loss
from metadist.models.model import DROPOUT


class MetaGradients(NamedTuple):
    """What a chunk of T tasks yields: outer losses [T] and one meta-gradient a row [T, P]."""

    losses: Tensor
    rows: Tensor


class Engine:
    """Computes one learner on one device.

    `theta` is always the flat vector [P] of `layout`, in `dtype` on any device. Tasks are numpy arrays or tensors;
    their floating point fields are converted to `dtype`.
    """

    def __init__(
        self,
        learner: Learner,
        method: Kind | Method = "loop",
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.method = method if isinstance(method, Method) else Method(method)
        self.kind: Kind = self.method.kind
        self.device = torch.device(device)
        if self.kind not in learner.engines:
            raise InputError(
                f"engine.kind={self.kind!r} cannot compute {type(learner).__name__}: use {' or '.join(learner.engines)}"
            )
        if self.kind == "vmap" and learner.model.recurrent is not None:
            raise InputError(f"layer {learner.model.recurrent!r} is recurrent, vmap cannot batch it: engine.kind=loop")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise InputError("engine.device=cuda, but torch sees no GPU here: check fleet.gpus_per_worker, the driver")
        if self.device.type != "cuda" and (self.method.captured or self.method.autocast):
            raise InputError("engine.cuda_graphs and engine.autocast are for GPUs, engine.device is cpu")
        self.learner = learner
        self.dtype = dtype
        self.layout = Layout.of(learner.layout())
        self.num_statistics = self.layout.trailing(learner.statistics())
        self._ops = (Recorded if self.kind == "loop" else Transformed)(self.method.differentiation, self.method.spacing)
        self._program = Program(self._compute, self.method.compiled, self.method.captured)
        self._trunk: Trunk | None = None
        self._settled = self._looked = False
        learner.model.to(self.device, dtype)

    def fingerprint(self) -> str:
        """What the bits depend on in the device: the CPU's vector capability, or the GPU's model, CUDA and cuDNN."""
        if self.device.type == "cuda":
            name, cudnn = torch.cuda.get_device_name(self.device), torch.backends.cudnn.version()
            return f"{name}, CUDA {torch.version.cuda}, cuDNN {cudnn}"
        return f"CPU {torch.backends.cpu.get_cpu_capability()}"

    def now(self) -> float:
        """Seconds on a clock that has waited for what the device was given to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

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
        diagnostics: dict[str, Tensor] | None = None,
    ) -> MetaGradients:
        """Outer losses [T] and meta-gradients [T, P] of T tasks at theta [P].

        `draws` are the tasks' own random streams; by default they are keyed by (step, place in `tasks`). The learner's
        diagnostics, [T] each, are put into the dictionary given. Raises InputError where memory does not suffice,
        saying what would need less.
        """
        self.settle(tasks[0])
        told = self._told(tasks, step, meta_steps)
        if self.kind == "vmap" and len(set(told)) > 1:
            own = draws or [Draws(0, TaskId("train", step, t), stream=1) for t in range(len(tasks))]

            def compute(places: list[int]) -> list[Tensor]:
                alike, streams, noted = [tasks[t] for t in places], [own[t] for t in places], {}
                return [*self.meta_gradients(theta, alike, step, meta_steps, streams, noted), *noted.values()]

            losses, rows, *found = _by_ways(told, compute)
            self._note(diagnostics, found)
            return MetaGradients(losses, rows)
        with self._computing(len(tasks)):
            weights = self._weights(theta)
            if self.kind == "vmap":
                task, drawn = self._stacked(tasks, step, draws)
                losses, rows, *found = self._run(weights, task, drawn, step, meta_steps, *told[0])
                self._note(diagnostics, found)
                return MetaGradients(losses, rows)
            separate = list(self._separate(tasks, step, draws))
            rows = torch.empty(len(separate), self.layout.size, dtype=self.dtype, device=self.device)
            losses, noted = rows.new_empty(len(separate)), []
            for t, (task, drawn) in enumerate(separate):
                losses[t], rows[t], *found = self._run(weights, task, drawn, step, meta_steps, *told[t])
                noted.append(found)
            self._note(diagnostics, map(torch.stack, zip(*noted, strict=True)))
            return MetaGradients(losses, rows)

    def recording(self) -> AbstractContextManager[None]:
        """What is computed meanwhile is recorded at once, not after some calls; the bits stay the same."""
        return self._program.recording_at_once()

    @torch.no_grad()
    def outer_loss(
        self, theta: Tensor, task: Task, ops: Differentiator, draws: Draws, step: int = 0, meta_steps: int = 1
    ) -> float:
        """The loss that `meta_gradients` gives of one task, by other means of differentiation."""
        with self._computing(1):
            drawn = self._draw(len(task.support.inputs[0]), draws, training=True)
            context = Context(step, meta_steps, drawn, *self._told([task], step, meta_steps)[0])
            return float(self.learner.meta_gradient(ops, self._weights(theta), self.tensors(task), context)[0])

    def operations(self, tasks: Sequence[Task]) -> list[Node]:
        """What `meta_gradients` computes of a chunk (with a loop: of its first task), on tensors without memory."""
        self.settle(tasks[0])
        with self._computing(len(tasks)):
            weights = self._weights(self.initial_theta())
            task, drawn = self._stacked(tasks, 0, None) if self.kind == "vmap" else next(self._separate(tasks, 0, None))
            structure, tensors = _flat(weights, task, drawn, self._told(tasks, 0, 1)[0])
            return list(record(self._compute, structure, 0, 1, tensors).graph.nodes)

    def _run(
        self, weights: Tensors, task: Task, drawn: Tensors, step: int, meta_steps: int, *told: Any
    ) -> Sequence[Tensor]:
        structure, tensors = _flat(weights, task, drawn, told)
        before = None if self._looked else [weight.clone() for weight in weights.values()]
        try:
            results = self._program(structure, step, meta_steps, tensors)
        except (IndexError, RuntimeError) as error:
            if "out of bounds" in str(error):  # of a recording: the loss itself says more
                self._compute(structure, step, meta_steps, tensors)
            raise
        if before is not None:
            self._looked = True
            for name, weight, was in zip(weights, weights.values(), before, strict=True):
                if not torch.equal(weight, was) and bool(was.isfinite().all()):
                    raise InputError(
                        f"the model changed its weight {name!r} in forward, which no derivative sees: leave theta as "
                        "it is there, and compute what should be used in its place anew"
                    )
        return results

    def _compute(self, structure: Any, step: int, meta_steps: int, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Loss and meta-gradient (a row, or T of each) from what `_flat` makes of weights, task and draws."""
        left = iter(tensors)
        weights = {name: next(left) for name in self.layout.names}
        parts = [tuple(next(left) for _ in range(count)) for count in structure[0]]
        task, drawn = Task(Examples(*parts[:2]), Examples(*parts[2:])), {name: next(left) for name in structure[1]}

        def one(weights: Tensors, task: Task, drawn: Tensors) -> tuple[Tensor, Tensors]:
            context = Watched.by(self._program.read, step, meta_steps, drawn, *structure[2])
            compute = self._trunk.meta_gradient if self._trunk else self.learner.meta_gradient
            loss, gradient = compute(self._ops, weights, task, context)
            return loss.detach(), {name: g.detach() for name, g in gradient.items()}

        if self.kind == "loop":
            loss, gradient = one(weights, task, drawn)
            return loss, self.layout.flatten(gradient), *(gradient[name] for name in self.learner.diagnostics)
        losses, gradients = torch.func.vmap(one, (None, 0, 0))(weights, task, drawn)
        return losses, self.layout.flatten_rows(gradients), *(gradients[name] for name in self.learner.diagnostics)

    def _note(self, diagnostics: dict[str, Tensor] | None, found: Iterable[Tensor]) -> None:
        if diagnostics is not None:
            diagnostics.update(zip(self.learner.diagnostics, found, strict=True))

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

        told = self._told(tasks, step, meta_steps)
        if self.kind == "vmap" and len(set(told)) > 1:
            own = draws or [Draws(0, TaskId("train", 0, t), stream=1) for t in range(len(tasks))]

            def compute(places: list[int]) -> list[Tensor]:
                alike, streams = [tasks[t] for t in places], [own[t] for t in places]
                found = self.evaluate(theta, alike, metrics, transductive, streams, step, meta_steps)
                return list(found.values())

            return dict(zip(metrics, _by_ways(told, compute), strict=True))

        def one(weights: Tensors, task: Task, drawn: Tensors, told: tuple[int, Hashable]) -> dict[str, Tensor]:
            learner, theta = self.learner, weights
            if self._trunk and transductive:
                theta, task = self._trunk.rest(weights, task, self._trunk.features(weights, task))
                learner = self._trunk.learner
            measured: list[list[Tensor]] = []
            for fast in self._ops.trajectory(learner, theta, task.support, Context(step, meta_steps, drawn, *told)):
                with torch.no_grad():
                    outputs = learner.predict_query(theta, fast, task, transductive)
                    measured.append([metric(outputs, *task.query.targets) for metric in metrics.values()])
            return {name: torch.stack([m[i] for m in measured]) for i, name in enumerate(metrics)}

        self.settle(tasks[0])
        with self._computing(len(tasks)):
            weights = self._weights(theta)
            if self.kind == "vmap":
                batched = torch.func.vmap(partial(one, told=told[0]), (None, 0, 0))
                return batched(weights, *self._stacked(tasks, 0, draws, training=False))
            separate = zip(self._separate(tasks, 0, draws, training=False), told, strict=True)
            results = [one(weights, *given, each) for given, each in separate]
            return {name: torch.stack([result[name] for result in results]) for name in metrics}

    def adapt(self, theta: Tensor, support: Examples) -> Callable[..., Tensor]:
        """Adapt to a support set; returns `predict(*inputs, transductive=True) -> outputs [n, ...]`, see `evaluate`."""
        weights = self._weights(theta)
        support = self.tensors(Task(support, support)).support
        drawn = self._draw(len(support.inputs[0]), Draws(0, TaskId("test", 0, 0), stream=1))
        with self._computing(1):
            context = Context(0, 1, drawn, *self._told([Task(support, support)], 0, 1)[0])
            fast = self._ops.adapt(self.learner, weights, support, context)

        @torch.no_grad()
        def predict(*inputs: Tensor, transductive: bool = True) -> Tensor:
            query = Examples(tuple(map(self._tensor, inputs)), ())
            return self.learner.predict_query(weights, fast, Task(support, query), transductive)

        return predict

    def trace(
        self, theta: Tensor, task: Task, draws: Draws, step: int = 0, meta_steps: int = 1
    ) -> list[tuple[float, float]]:
        """Support loss and norm of the fast weights before and after every inner step of one task, as in training."""
        weights, support, last = self._weights(theta), self.tensors(task).support, max(0, self.learner.inner_steps - 1)
        drawn = self._draw(len(support.inputs[0]), draws, training=True)
        context, traced = Context(step, meta_steps, drawn, *self._told([task], step, meta_steps)[0]), []
        with self._computing(1):
            for k, fast in enumerate(self._ops.trajectory(self.learner, weights, support, context)):
                steps = self.learner.inner_steps
                loss = self.learner.inner_loss(weights, fast, support, min(k, last)) if steps else None
                norm = sum(float(w.detach().square().sum()) for w in fast.weights.values()) ** 0.5
                traced.append((float("nan") if loss is None else float(loss.detach()), norm))
        return traced

    def tensors(self, task: Task) -> Task:
        """The task's arrays on the engine's device, floating point ones in its dtype, labels as int64."""
        return as_labels(task).map(self._tensor)

    def _told(self, tasks: Sequence[Task], step: int, meta_steps: int) -> list[tuple[int, Hashable]]:
        """A context's ways and phase, of each task."""
        phase, known = self.learner.phase(step, meta_steps), self.learner.needs_ways
        ways = ways_of(tasks, covered=self.learner.any_ways) if known else [0] * len(tasks)
        return [(each, phase) for each in ways]

    def _weights(self, theta: Tensor) -> Tensors:
        return self.layout.unflatten(theta.to(self.device, self.dtype))

    def outputs(self, weights: Tensors, task: Task, transductive: bool) -> Tensor:
        """Query outputs of the bare model with `weights`, in one batch or each with the support set, see `evaluate`."""
        return predict_query(lambda inputs: self.learner.model(weights, *inputs), task, transductive)

    def _tensor(self, array: object) -> Tensor:
        tensor = _as_tensor(array)
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

    def _copy(self, array: object) -> Tensor:
        """As `_tensor`, never in the array's own memory: results may depend on where in memory arguments begin."""
        return self._tensor(_as_tensor(array).clone(memory_format=torch.contiguous_format))

    def _draw(self, support_size: int, draws: Draws, training: bool = False) -> Tensors:
        """What the learner draws and, in training, a key for dropout."""
        drawn = {name: self._tensor(value) for name, value in self.learner.draw(draws, support_size).items()}
        if training and self.learner.model.has_dropout:
            drawn[DROPOUT] = self._tensor(draws.word() >> 1)
        return drawn

    def _separate(
        self, tasks: Sequence[Task], step: int, draws: Sequence[Draws] | None, training: bool = True
    ) -> Iterator[tuple[Task, Tensors]]:
        for t, task in enumerate(tasks):
            own = draws[t] if draws else Draws(0, TaskId("train", step, t), stream=1)
            yield as_labels(task).map(self._copy), self._draw(len(task.support.inputs[0]), own, training)

    def _stacked(
        self, tasks: Sequence[Task], step: int, draws: Sequence[Draws] | None, training: bool = True
    ) -> tuple[Task, Tensors]:
        if isinstance(tasks, Tasks):
            task = as_labels(tasks.stacked).map(self._copy)
        else:
            separate = [task.map(_as_tensor) for task in map(as_labels, tasks)]
            task = self.tensors(stack(separate, torch.stack))
        size = task.support.inputs[0].shape[1]
        if type(self.learner).draw is Learner.draw and not self.learner.model.has_dropout:
            return task, {}
        own = draws or [Draws(0, TaskId("train", step, t), stream=1) for t in range(len(tasks))]
        drawn = [self._draw(size, each, training) for each in own]
        return task, {name: torch.stack([each[name] for each in drawn]) for name in drawn[0]}

    def settle(self, task: Task) -> None:
        """Decide, once, from a task at the initial theta, whether the trunk is computed apart. Whoever builds the
        engines of a run settles all of them on one task: it must not depend on the first that each happens to see."""
        if not self._settled:
            self._settled = True
            with self._computing(1):
                self._trunk = trunk_of(self.learner, self._weights(self.initial_theta()), self.tensors(task))

    @contextmanager
    def _computing(self, num_tasks: int) -> Iterator[None]:
        """With kernels that differentiate twice, in bfloat16 where wished, and weights that stay in the module until
        their derivatives are found. Memory that runs out, or what torch cannot differentiate, is an InputError."""
        wide = torch.autocast("cuda", torch.bfloat16, enabled=self.method.autocast, cache_enabled=False)
        twice = torch.backends.cudnn.flags(enabled=False) if self.learner.model.recurrent else nullcontext()
        try:
            with sdpa_kernel(SDPBackend.MATH), wide, twice, self.learner.model.in_place():
                yield
        except (MemoryError, RuntimeError) as error:
            lacking = is_out_of_memory(error)
            told = out_of_memory(self.learner, self.method, num_tasks) if lacking else None
            told = told or remedy(error, self.learner, self.kind)
            if told is None:
                raise
            raise InputError(told) from error


def _as_tensor(array: object) -> Tensor:
    """Numbers or truth values as a tensor. Raises InputError for anything else, such as objects and complex numbers."""
    try:
        tensor = torch.as_tensor(array)
    except TypeError:
        tensor = None
    if tensor is None or tensor.is_complex():
        raise InputError(
            f"a task holds an array of {getattr(array, 'dtype', type(array).__name__)}: give real numbers (of complex "
            "ones the real and imaginary parts as two inputs, of objects and text the numbers they stand for)"
        )
    return tensor


def _by_ways(told: Sequence[Hashable], compute: Callable[[list[int]], Sequence[Tensor]]) -> list[Tensor]:
    """What `compute` gives for the places of tasks of which the same is told, [T, ...] each, in the order of all tasks:
    so a task's result does not depend on how many classes its neighbours have."""
    groups = [[t for t, each in enumerate(told) if each == one] for one in dict.fromkeys(told)]
    parts = [compute(group) for group in groups]
    back = torch.tensor([t for group in groups for t in group]).argsort()
    return [torch.cat(own)[back.to(own[0].device)] for own in zip(*parts, strict=True)]


def _flat(weights: Tensors, task: Task, drawn: Tensors, told: tuple[int, Hashable]) -> tuple[Any, list[Tensor]]:
    """One list of tensors, and what is needed to take it apart again."""
    arrays = [*task.support.inputs, *task.support.targets, *task.query.inputs, *task.query.targets]
    structure = tuple(len(part) for examples in task for part in examples), tuple(drawn), told
    return structure, [*weights.values(), *arrays, *drawn.values()]
