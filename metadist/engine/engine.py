"""A chunk of tasks computed: a loop over tasks, or all of them at once with vmap.

Both derive adaptation and meta-gradient from the same learner and agree to rounding.
"""

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from metadist.core.errors import InputError
from metadist.core.random import Draws
from metadist.core.task import Examples, Task, TaskId, Tasks, as_labels, stack, ways_of
from metadist.engine.differentiation import Differentiator, Recorded, Tensors, Transformed
from metadist.engine.frozen_trunk import Trunk, trunk_of
from metadist.engine.graph_cache import Program, Watched
from metadist.engine.layout import Layout
from metadist.engine.method import Kind, Method
from metadist.engine.remedies import CHANGED_EXAMPLES, CHANGED_WEIGHT, remedy
from metadist.learners.learner import Context, Fast, Learner, predict_query
from metadist.models.losses import Loss
from metadist.models.model import DROPOUT


class MetaGradients(NamedTuple):
    """What a chunk of T tasks yields: outer losses [T] and one meta-gradient a row [T, P]."""

    losses: Tensor
    rows: Tensor


_Structure = tuple[tuple[int, ...], tuple[str, ...]]
"""Of a task and its draws: how many support inputs, support targets, query inputs and query targets; draws' names."""


class _Case(NamedTuple):
    """What of a task's context decides which computation it needs; see `Context`."""

    ways: int
    phase: Hashable


class Engine:
    """Computes one learner on one device: meta-gradients, evaluation, adaptation.

    `theta` is always the flat vector [P] of `layout`, in `dtype` on any device. Tasks are numpy arrays or tensors;
    their floating point fields are converted to `dtype`.

    Args:
        learner: the mathematics; see `Learner`.
        method: "loop" (task by task), "vmap" (all tasks of a call at once), or a whole `Method`.
        device: "cpu" or "cuda".
        dtype: of theta and of floating point examples.

    Raises:
        InputError: where the method cannot compute the learner, or the device is not there.

    Example:
        >>> import torch
        >>> from metadist import MAML, Engine, Model, Task
        >>> from metadist.models.losses import mean_squared_error
        >>> engine = Engine(MAML(model=Model(torch.nn.Linear(1, 1)), loss=mean_squared_error, inner_lr=0.5))
        >>> x = torch.linspace(-1, 1, 5).unsqueeze(1)
        >>> task = Task.of(x, 2 * x + 1, x, 2 * x + 1)
        >>> theta = engine.initial_theta()
        >>> for step in range(50):
        ...     losses, rows = engine.meta_gradients(theta, [task], step)
        ...     theta = theta - 0.5 * rows.mean(dim=0)
        >>> predict = engine.adapt(theta, task.support)
        >>> float((predict(x) - (2 * x + 1)).abs().max()) < 0.01
        True
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
        self._evaluation = Program(self._evaluate)
        self._trunk: Trunk | None = None
        self._settled = self._checked_given = False
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

    def tensors(self, task: Task) -> Task:
        """The task's arrays on the engine's device, floating point ones in its dtype, labels as int64."""
        return as_labels(task).map(self._tensor)

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

        Args:
            theta: meta-parameters [P].
            tasks: T tasks; with vmap, of equal shapes.
            step, meta_steps: the meta-step and how many there are, for learners that anneal.
            draws: the tasks' own random streams; by default they are keyed by (step, place in `tasks`).
            diagnostics: a dictionary into which the learner's diagnostics are put, [T] each.

        Raises:
            InputError: where memory does not suffice or torch cannot differentiate the model, with what to change.
        """
        self.settle(tasks[0])
        with self._computing(len(tasks)):
            weights = self._weights(theta)

            def compute(task: Task, drawn: Tensors, case: _Case) -> Sequence[Tensor]:
                return self._run(weights, task, drawn, case, step, meta_steps)

            losses, rows, *found = self._each(compute, tasks, draws, step, self._cases(tasks, step, meta_steps))
        if diagnostics is not None:
            diagnostics.update(zip(self.learner.diagnostics, found, strict=True))
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
        """{metric: [T, inner_steps + 1]}: each metric on the query set before adaptation and after every inner step. Of
        a learner with `measures` it is these in the place of `metrics`. A metric is a function of outputs and targets
        alone: it is played back with the rest, and then not called.

        `transductive`: all query examples are predicted as one batch, sharing its normalisation statistics. Otherwise
        each is predicted in a batch with the support set, without the other queries (Nichol et al. 2018, section 6.1).
        """
        self.settle(tasks[0])
        with self._computing(len(tasks)):
            weights = self._weights(theta)
            measure = self._evaluation if transductive else self._evaluate  # one by one, a recording would be long

            def compute(task: Task, drawn: Tensors, case: _Case) -> Sequence[Tensor]:
                structure, tensors = _pack(task, drawn)
                called = tuple(metric.__call__ for metric in metrics.values())  # hashable, even where a metric is not
                asked = structure, case, called, transductive
                return measure(asked, step, meta_steps, [*weights.values(), *tensors])

            cases = self._cases(tasks, step, meta_steps)
            names = self.learner.measures or metrics
            return dict(zip(names, self._each(compute, tasks, draws, 0, cases, training=False), strict=True))

    def adapt(self, theta: Tensor, support: Examples) -> Callable[..., Tensor]:
        """Adapt to a support set; returns `predict(*inputs, transductive=True) -> outputs [n, ...]`, see `evaluate`."""
        weights = self._weights(theta)
        task = as_labels(Task(support, support)).map(self._copy)
        drawn = self._draw(len(task.support.inputs[0]), Draws(0, TaskId("test", 0, 0), stream=1), training=False)
        with self._computing(1):
            context = Context(0, 1, drawn, *self._cases([task], 0, 1)[0])
            fast = self._ops.adapt(self.learner, weights, task.support, context)

        @torch.no_grad()
        def predict(*inputs: Tensor, transductive: bool = True) -> Tensor:
            query = Examples(tuple(map(self._copy, inputs)), ())
            return self.learner.predict_query(weights, fast, Task(task.support, query), transductive)

        return predict

    def trace(
        self, theta: Tensor, task: Task, draws: Draws, step: int = 0, meta_steps: int = 1
    ) -> list[tuple[float, float]]:
        """Support loss and norm of the fast weights before and after every inner step of one task, as in training."""
        learner, weights, task = self.learner, self._weights(theta), self.tensors(task)
        steps, traced = learner.inner_steps, []
        with self._computing(1):
            context = self._context(task, draws, step, meta_steps)
            for k, fast in enumerate(self._ops.trajectory(learner, weights, task.support, context)):
                last = min(k, max(0, steps - 1))
                loss = float(learner.inner_loss(weights, fast, task.support, last).detach()) if steps else float("nan")
                traced.append((loss, sum(float(w.detach().square().sum()) for w in fast.weights.values()) ** 0.5))
        return traced

    def trajectory(self, theta: Tensor, task: Task, draws: Draws) -> tuple[Tensors, list[Fast], Task]:
        """theta by name, the fast weights before and after every inner step of a task of evaluation, and the task, all
        as tensors without a gradient."""
        weights, task = self._weights(theta), self.tensors(task)
        drawn = self._draw(len(task.support.inputs[0]), draws, training=False)
        context = Context(0, 1, drawn, *self._cases([task], 0, 1)[0])
        with self._computing(1):
            fasts = [
                Fast(*({name: value.detach() for name, value in part.items()} for part in fast))
                for fast in self._ops.trajectory(self.learner, weights, task.support, context)
            ]
        return weights, fasts, task

    @torch.no_grad()
    def outer_loss(
        self, theta: Tensor, task: Task, ops: Differentiator, draws: Draws, step: int = 0, meta_steps: int = 1
    ) -> float:
        """The loss that `meta_gradients` gives of one task, by other means of differentiation."""
        with self._computing(1):
            task = self.tensors(task)
            context = self._context(task, draws, step, meta_steps)
            return float(self.learner.meta_gradient(ops, self._weights(theta), task, context)[0])

    def outputs(self, weights: Tensors, task: Task, transductive: bool) -> Tensor:
        """Query outputs of the bare model with `weights`, in one batch or each with the support set, see `evaluate`."""
        return predict_query(lambda inputs: self.learner.model(weights, *inputs), task, transductive)

    def operations(self, tasks: Sequence[Task]) -> list[Node]:
        """What `meta_gradients` computes of a chunk (with a loop: of its first task), on tensors without memory."""
        self.settle(tasks[0])
        with self._computing(len(tasks)):
            weights, draws, case = (
                self._weights(self.initial_theta()),
                _own_draws(tasks, 0),
                self._cases(tasks, 0, 1)[0],
            )
            task, drawn = self._stacked(tasks, draws) if self.kind == "vmap" else self._copied(tasks[0], draws[0])
            structure, tensors = _pack(task, drawn)
            return self._program.operations((structure, case), 0, 1, [*weights.values(), *tensors])

    def settle(self, task: Task) -> None:
        """Decide, once, from a task at the initial theta, whether the trunk is computed apart. Whoever builds the
        engines of a run settles all of them on one task: it must not depend on the first that each happens to see."""
        if not self._settled:
            self._settled = True
            with self._computing(1):
                self._trunk = trunk_of(self.learner, self._weights(self.initial_theta()), self.tensors(task))

    def _run(
        self, weights: Tensors, task: Task, drawn: Tensors, case: _Case, step: int, meta_steps: int
    ) -> Sequence[Tensor]:
        """Loss, meta-gradient and diagnostics of a task (vmap: of stacked tasks), as it stands or played back."""
        structure, tensors = _pack(task, drawn)
        given = [*weights.values(), *tensors]
        before = None if self._checked_given else [tensor.clone() for tensor in given]
        results = self._program((structure, case), step, meta_steps, given)
        if before is not None:
            self._checked_given = True
            _refuse_changed(self.layout.names, given, before)
        return results

    def _compute(
        self, structure: tuple[_Structure, _Case], step: int, meta_steps: int, tensors: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """What `_run` returns, from the tensors of weights, task and draws; this is what is recorded."""
        weights = dict(zip(self.layout.names, tensors, strict=False))
        task, drawn = _unpack(structure[0], tensors[len(weights) :])

        def one(weights: Tensors, task: Task, drawn: Tensors) -> tuple[Tensor, Tensors]:
            context = Watched.by(self._program.read, step, meta_steps, drawn, *structure[1])
            compute = self._trunk.meta_gradient if self._trunk else self.learner.meta_gradient
            loss, gradient = compute(self._ops, weights, task, context)
            return loss.detach().to(self.dtype), {name: g.detach() for name, g in gradient.items()}

        if self.kind == "loop":
            loss, gradient = one(weights, task, drawn)
            return loss, self.layout.flatten(gradient), *(gradient[name] for name in self.learner.diagnostics)
        losses, gradients = torch.func.vmap(one, (None, 0, 0))(weights, task, drawn)
        return losses, self.layout.flatten_rows(gradients), *(gradients[name] for name in self.learner.diagnostics)

    def _evaluate(
        self,
        asked: tuple[_Structure, _Case, Sequence[Loss], bool],
        step: int,
        meta_steps: int,
        tensors: Sequence[Tensor],
    ) -> Sequence[Tensor]:
        """Metrics of a task, or of stacked ones, from the tensors of weights, task and draws."""
        structure, case, metrics, transductive = asked
        weights = dict(zip(self.layout.names, tensors, strict=False))
        task, drawn = _unpack(structure, tensors[len(weights) :])

        def one(task: Task, drawn: Tensors) -> list[Tensor]:
            context = Watched.by(self._evaluation.read, step, meta_steps, drawn, *case)
            return self._measure(weights, task, context, metrics, transductive)

        return torch.func.vmap(one)(task, drawn) if self.kind == "vmap" else one(task, drawn)

    def _measure(
        self, theta: Tensors, task: Task, context: Context, metrics: Sequence[Loss], transductive: bool
    ) -> list[Tensor]:
        """Of one task, each metric [inner_steps + 1]."""
        learner = self.learner
        if self._trunk and transductive and not learner.measures:
            theta, task = self._trunk.rest(theta, task, self._trunk.features(theta, task))
            learner = self._trunk.learner
        measured: list[list[Tensor]] = []
        for fast in self._ops.trajectory(learner, theta, task.support, context):
            with torch.no_grad():
                if learner.measures:
                    found = learner.measure(theta, fast, task.query)
                    measured.append([found[name] for name in learner.measures])
                else:
                    outputs = learner.predict_query(theta, fast, task, transductive)
                    measured.append([metric(outputs, *task.query.targets) for metric in metrics])
        return [torch.stack(values) for values in zip(*measured, strict=True)]

    def _each(
        self,
        compute: Callable[[Task, Tensors, _Case], Sequence[Tensor]],
        tasks: Sequence[Task],
        draws: Sequence[Draws] | None,
        step: int,
        cases: Sequence[_Case],
        training: bool = True,
    ) -> list[Tensor]:
        """What `compute` returns for every task, [T, ...] each. With vmap, tasks of one case are stacked and computed
        at once: so a task's result does not depend on how many classes its neighbours have."""
        draws = draws or _own_draws(tasks, step)
        if self.kind == "loop":
            results: list[Tensor] = []
            for t, (task, case) in enumerate(zip(tasks, cases, strict=True)):
                found = compute(*self._copied(task, draws[t], training), case)
                results = results or [each.new_empty(len(tasks), *each.shape) for each in found]
                for whole, each in zip(results, found, strict=True):
                    whole[t] = each
            return results
        if len(set(cases)) == 1:
            return list(compute(*self._stacked(tasks, draws, training), cases[0]))
        groups = [[t for t, each in enumerate(cases) if each == case] for case in dict.fromkeys(cases)]
        parts = []
        for places in groups:
            alike = self._stacked([tasks[t] for t in places], [draws[t] for t in places], training)
            parts.append(compute(*alike, cases[places[0]]))
        back = torch.tensor([t for places in groups for t in places]).argsort()
        return [torch.cat(own)[back.to(own[0].device)] for own in zip(*parts, strict=True)]

    def _cases(self, tasks: Sequence[Task], step: int, meta_steps: int) -> list[_Case]:
        phase, known = self.learner.phase(step, meta_steps), self.learner.needs_ways
        ways = ways_of(tasks, covered=self.learner.any_ways) if known else [0] * len(tasks)
        return [_Case(each, phase) for each in ways]

    def _context(self, task: Task, draws: Draws, step: int, meta_steps: int) -> Context:
        """Of one task in training."""
        drawn = self._draw(len(task.support.inputs[0]), draws, training=True)
        return Context(step, meta_steps, drawn, *self._cases([task], step, meta_steps)[0])

    def _weights(self, theta: Tensor) -> Tensors:
        return self.layout.unflatten(theta.to(self.device, self.dtype))

    def _tensor(self, array: object) -> Tensor:
        tensor = _as_tensor(array)
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

    def _copy(self, array: object) -> Tensor:
        """As `_tensor`, never in the array's own memory: results may depend on where in memory arguments begin."""
        return self._tensor(_as_tensor(array).clone(memory_format=torch.contiguous_format))

    def _draw(self, support_size: int, draws: Draws, training: bool) -> Tensors:
        """What the learner draws and, in training, a key for dropout."""
        drawn = {name: self._tensor(value) for name, value in self.learner.draw(draws, support_size).items()}
        if training and self.learner.model.has_dropout:
            drawn[DROPOUT] = self._tensor(draws.word() >> 1)
        return drawn

    def _copied(self, task: Task, draws: Draws, training: bool = True) -> tuple[Task, Tensors]:
        """A task and what is drawn for it, as tensors."""
        return as_labels(task).map(self._copy), self._draw(len(task.support.inputs[0]), draws, training)

    def _stacked(self, tasks: Sequence[Task], draws: Sequence[Draws], training: bool = True) -> tuple[Task, Tensors]:
        """Tasks of equal shapes as one, [T, ...] each, and what is drawn for them."""
        if isinstance(tasks, Tasks):
            task = as_labels(tasks.stacked).map(self._copy)
        else:
            separate = [task.map(_as_tensor) for task in map(as_labels, tasks)]
            task = self.tensors(stack(separate, torch.stack))
        if type(self.learner).draw is Learner.draw and not self.learner.model.has_dropout:
            return task, {}
        drawn = [self._draw(task.support.inputs[0].shape[1], each, training) for each in draws]
        return task, {name: torch.stack([each[name] for each in drawn]) for name in drawn[0]}

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
            what_to_change = remedy(error, self.learner, self.method, num_tasks)
            if what_to_change is None:
                raise
            raise InputError(what_to_change) from error


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


def _pack(task: Task, drawn: Tensors) -> tuple[_Structure, list[Tensor]]:
    """One list of tensors, and what takes it apart again; by hand, as pytree takes a tenth of a small task's time."""
    parts = [part for examples in task for part in examples]
    return (tuple(map(len, parts)), tuple(drawn)), [*(each for part in parts for each in part), *drawn.values()]


def _unpack(structure: _Structure, tensors: Sequence[Tensor]) -> tuple[Task, Tensors]:
    left = iter(tensors)
    parts = [tuple(next(left) for _ in range(count)) for count in structure[0]]
    return Task(Examples(*parts[:2]), Examples(*parts[2:])), {name: next(left) for name in structure[1]}


def _own_draws(tasks: Sequence[Task], step: int) -> list[Draws]:
    """Random streams by (step, place in `tasks`)."""
    return [Draws(0, TaskId("train", step, t), stream=1) for t in range(len(tasks))]


def _refuse_changed(names: Sequence[str], given: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Raise InputError where a model has changed its weights, which come first and have `names`, behind autograd's
    back, or it, the loss or the learner a task's examples."""
    for number, (tensor, was) in enumerate(zip(given, before, strict=True)):
        if torch.equal(tensor, was) or not bool(was.isfinite().all()):
            continue
        if number >= len(names):
            raise InputError(CHANGED_EXAMPLES)
        raise InputError(CHANGED_WEIGHT.format(names[number]))
