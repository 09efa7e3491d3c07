"""Whether torch differentiates a model rightly: a meta-gradient against finite differences, in float64.

Some layers have a wrong derivative, or a wrong second one, without any error. One directional finite difference finds
that, before a run starts: the derivative of the outer loss along one direction, from the meta-gradient and from values
of the loss. It takes about as long as three tasks of the run, with few queries and at most two inner steps.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metadist.core.random import Draws
from metadist.core.task import Examples, Task, TaskId
from metadist.engine.differentiation import Recorded, Tensors
from metadist.engine.engine import Engine
from metadist.engine.method import Method
from metadist.engine.recording import Mode
from metadist.learners import MAML, Context, Learner

QUERIES, INNER_STEPS = 8, 2  # of the task that is checked, at most
STEPS, LARGE_STEPS = (1e-7, 1e-8, 1e-6, 1e-5), (1e-3, 1e-2)
"""Of the differences, relative to each tensor's norm: small, since the gradient of an inner step jumps where a ReLU
switches; larger for a computation that is not float64 throughout."""
TOLERANCE, ROUGH = 1e-5, 0.1  # relative; ROUGH where a model or loss computes in float32 in between
ROUNDING = 1e-16  # of a loss however small: it comes of probabilities near 1, whose logarithms are no finer
DRAWS = 3  # of a point and a direction: at a kink (ReLU, max-pooling) differences say nothing


class Found(NamedTuple):
    """`error`: of the derivative along the direction, relative to it (NaN: differences were too coarse to tell).
    `tensor`: the part of theta whose derivative is the farthest off, where the error is too large, else None."""

    error: float
    tensor: str | None
    seconds: float


class _Casts(Mode):
    """Notes the coarsest type that something in float64 was converted to."""

    bits = 64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        fine = any(isinstance(each, Tensor) and each.dtype == torch.float64 for each in args)
        if fine and isinstance(result, Tensor) and result.is_floating_point():
            self.bits = min(self.bits, torch.finfo(result.dtype).bits)
        return result


class ValueOnly(Recorded):
    """Outer losses without their gradients."""

    def value_and_gradient(self, f: Callable[[Tensors], Tensor], at: Tensors) -> tuple[Tensor, Tensors]:
        value = f({name: tensor.detach() for name, tensor in at.items()})
        return value.detach(), {name: torch.zeros_like(tensor) for name, tensor in at.items()}


def claims_derivative(learner: Learner, meta_steps: int) -> bool:
    """Whether the learner's meta-gradient should be the exact derivative of the outer loss that it returns."""
    own = ("meta_gradient", "exact_meta_gradient")
    its = next(kind for kind in type(learner).__mro__ if any(name in vars(kind) for name in own))
    step = meta_steps - 1
    context = Context(step, meta_steps, {}, 0, learner.phase(step, meta_steps))
    return vars(its).get("exact_meta_gradient", False) and not learner.is_first_order(context)


def plain(learner: Learner) -> Learner:
    """What differentiates the model and the loss as often as the learner does, but rightly defined: one step of MAML,
    or none for a learner that takes first derivatives only."""
    rate = min(learner.inner_lr, 0.1)
    return MAML(model=learner.model, loss=learner.loss, inner_lr=rate, inner_steps=0 if learner.first_order else 1)


def check_gradient(learner: Learner, method: Method, theta: np.ndarray, task: Task, meta_steps: int = 1) -> Found:
    """Compare a learner's meta-gradient of one task with finite differences near theta [P].

    `learner` is built for this alone, as its model's constants become float64; `method` is the run's. Raises whatever
    model, loss and learner do where they cannot be computed in float64.
    """
    began = time.perf_counter()
    learner = replace(learner, inner_steps=min(learner.inner_steps, INNER_STEPS)) if learner.inner_steps else learner
    engine = Engine(learner, Method(method.kind, method.differentiation, method.spacing), dtype=torch.float64)
    few = _few(task)
    base, step = torch.from_numpy(theta.astype(np.float64)), meta_steps - 1
    with _Casts() as casts:
        _loss(engine, base, few, step, meta_steps)
    if casts.bits < 32:
        return Found(math.nan, None, time.perf_counter() - began)
    rough, best = casts.bits < 64, Found(math.inf, None, 0.0)
    for number in range(DRAWS):
        generator = torch.Generator().manual_seed(number)
        point = _near(engine, base, generator)
        losses, rows = engine.meta_gradients(point, [few], step, meta_steps, [_draws()])
        direction = _direction(engine, point, rows[0], generator)

        def value(along: Tensor, at: Tensor = point) -> float:
            return _loss(engine, at + along, few, step, meta_steps)

        error = _error(value, direction, float(rows[0] @ direction), float(losses[0]), rough)
        if error <= (ROUGH if rough else TOLERANCE):
            return Found(error, None, time.perf_counter() - began)
        if error < best.error:
            best = Found(error, _farthest(engine, value, direction, rows[0]), 0.0)
    error = best.error if best.tensor else math.nan
    return Found(error, best.tensor, time.perf_counter() - began)


def _error(value: Callable[[Tensor], float], direction: Tensor, expected: float, loss: float, rough: bool) -> float:
    """The smallest relative difference over the step sizes that are not drowned by rounding. NaN where all are, or
    where the sizes do not agree on it: a wrong derivative is off by the same at each."""
    if not (math.isfinite(expected) and math.isfinite(loss)):
        return math.nan
    tiny = 1e-10 * direction
    noise = abs(value(tiny) - 2 * value(0 * direction) + value(-tiny)) + ROUNDING
    noise += (1e-6 if rough else 1e-15) * abs(loss)
    tolerance, errors = ROUGH if rough else TOLERANCE, []
    for size in LARGE_STEPS if rough else STEPS:
        found = (value(size * direction) - value(-size * direction)) / (2 * size)
        scale = max(abs(found), abs(expected))
        if scale < 1e-12:
            return 0.0
        if noise / size > tolerance * scale:
            continue
        errors.append(abs(found - expected) / scale)
        if errors[-1] <= tolerance:
            return errors[-1]
    return min(errors) if errors and max(errors) < 2 * min(errors) else math.nan


def _farthest(engine: Engine, value: Callable[[Tensor], float], direction: Tensor, row: Tensor) -> str:
    """The tensor of theta whose own part of the directional derivative is the farthest off."""
    worst, farthest, start = "", -1.0, 0
    for name, size in zip(engine.layout.names, engine.layout.sizes, strict=True):
        part = torch.zeros_like(direction)
        part[start : start + size] = direction[start : start + size]
        found = (value(STEPS[0] * part) - value(-STEPS[0] * part)) / (2 * STEPS[0])
        off = abs(found - float(row @ part))
        if off > farthest:
            worst, farthest = name, off
        start += size
    return worst


def _near(engine: Engine, theta: Tensor, generator: torch.Generator) -> Tensor:
    """A point near theta, where nothing is zero by construction (biases, heads, padding): there derivatives may be
    one-sided."""
    sizes = [max(float(piece.square().mean().sqrt()), 0.1) for piece in theta.split(engine.layout.sizes)]
    scale = torch.tensor(sizes).repeat_interleave(torch.tensor(engine.layout.sizes)).to(theta)
    return theta + 0.03 * scale * torch.randn(len(theta), generator=generator).to(theta)


def _direction(engine: Engine, point: Tensor, row: Tensor, generator: torch.Generator) -> Tensor:
    """Half at random, half along the gradient, in proportion to each tensor's norm, so that every tensor matters and
    the derivative is not zero by chance. Statistics, which are not descended, stay."""
    parts = []
    for piece, gradient in zip(point.split(engine.layout.sizes), row.split(engine.layout.sizes), strict=True):
        chance = torch.randn(len(piece), generator=generator).to(piece)
        along = gradient / gradient.norm().clamp(min=1e-300)
        parts.append(piece.norm() * (chance / chance.norm() + along))
    direction = torch.cat(parts)
    direction[len(direction) - engine.num_statistics :] = 0
    return direction


def _few(task: Task) -> Task:
    """The task with a few of its queries, from all over the query set."""
    count = len(task.query.inputs[0])
    rows = np.unique(np.linspace(0, count - 1, min(count, QUERIES)).astype(np.int64))
    return task._replace(query=Examples(*(tuple(array[rows] for array in part) for part in task.query)))


def _draws() -> Draws:
    return Draws(0, TaskId("train", 0, 0), stream=1)


def _loss(engine: Engine, theta: Tensor, task: Task, step: int, meta_steps: int) -> float:
    return engine.outer_loss(theta, task, ValueOnly(), _draws(), step, meta_steps)
