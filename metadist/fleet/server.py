"""The parameter server: owns theta and the outer optimizer, whole or cut into shards that step as one.

What is summed over the elements of theta (norms) is summed over blocks at fixed places, whose sums are then added: so
the bits do not depend on where theta is cut.
"""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from metadist.core.errors import Diverged
from metadist.core.messages import Chunk, ChunkReport, Weights
from metadist.core.task import TaskId
from metadist.engine.optimizers import SGD, Adam, AdamW, plain_step

BLOCK = 65_536


@dataclass(frozen=True)
class Optimization:
    """How the server steps. Rates are per meta-step; clipping applies to the mean meta-gradient, values before norm.

    The last so many elements of theta are `statistics`: moving averages, whose "gradient" is (theta - observed).
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    meta_lr: float = 1e-3
    meta_steps: int = 1000
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0
    final_lr: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    clip_norm: float | None = None
    clip_value: float | None = None
    batch_rule: Literal["none", "linear", "sqrt"] = "none"
    reference_batch: int = 1
    statistics: int = 0
    statistics_rate: float = 0.1

    def rate(self, step: int, num_tasks: int) -> float:
        """The meta learning rate of a step over `num_tasks` tasks."""
        if step < self.warmup_steps:
            base = self.meta_lr * (step + 1) / (self.warmup_steps + 1)
        else:
            done = (step - self.warmup_steps) / max(1, self.meta_steps - self.warmup_steps)
            left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + np.cos(np.pi * done)) / 2}[self.schedule]
            base = self.meta_lr if left == 1 else self.final_lr + (self.meta_lr - self.final_lr) * float(left)
        growth = num_tasks / self.reference_batch
        return base * {"none": 1.0, "linear": growth, "sqrt": growth**0.5}[self.batch_rule]


class Stats(NamedTuple):
    """Statistics of one meta-update, for plots."""

    loss: float
    gradient_norm: float
    task_norm: float
    agreement: float
    noise_scale: float
    meta_lr: float
    num_tasks: int


class Folded(NamedTuple):
    """A shard's sums of a step before theta moves: of each task [T], and of each block of its slice of the mean.

    squares: of its elements, summed; limited: likewise once they are limited one by one; along: the mean times the sum
    of the tasks' gradients, each divided by its norm (NaN where only sums of gradients came).
    """

    losses: np.ndarray
    norms: np.ndarray
    squares: list[float]
    limited: list[float]
    along: list[float]


class Trial(NamedTuple):
    """Whether a shard of so many elements can step: the first that would not be finite, of theta or of what the
    optimizer remembers, and what of it that is; None where there is none."""

    size: int
    first_bad: int | None = None
    what: str = ""


class Shard:
    """A contiguous slice of theta and its optimizer: an actor of its own, or one of several in this process.

    For each meta-step: take every chunk, fold, attempt, move. Arguments are as they come from the workers: `parts` are
    the reports of each bundle of chunks, then this shard's slices of the gradients of each bundle: float rows [n, p] of
    a chunk's tasks, or their float64 sum [p]. `first`: these are the first of their step, so that what was taken of it
    before is forgotten. What has been folded or applied can be gone through again, which changes nothing. Not
    thread-safe.
    """

    def __init__(self, theta: np.ndarray, optimization: Optimization, state: dict[str, Any] | None = None):
        """theta: the slice [p]; `state` is what `snapshot` returned, to continue from."""
        self.optimization = optimization
        self._theta = torch.from_numpy(np.array(theta))
        self._cut = len(theta) - optimization.statistics
        self._optimizer = make_optimizer(self._theta[: self._cut], optimization)
        self._step = 0
        self._reports: list[ChunkReport] = []
        self._diverged: TaskId | None = None  # the first task of the step that is not finite
        self._mean: np.ndarray | None = None
        self._folded: Folded | None = None
        self._tried: tuple[torch.Tensor, torch.optim.Optimizer] | None = None  # copies, where it is careful
        self._last: tuple[Weights, Stats] | None = None
        if state is not None:
            self._step = state["step"]
            self._optimizer.load_state_dict(deepcopy(state["optimizer"]))
        self._careful = not are_moderate(*remembered(self._optimizer).values(), self._theta)

    def weights(self) -> Weights:
        """The slice of theta as it is now, a copy."""
        return Weights(self._step, self._theta.numpy().copy())

    def snapshot(self) -> dict[str, Any]:
        """Plain types and tensors from which, with theta, an equal one is built."""
        return {"step": self._step, "optimizer": deepcopy(self._optimizer.state_dict())}

    def take(self, step: int, first: bool, *parts: Any) -> None:
        """Add the next chunks in task order. Raises ValueError for a chunk that is not the next one, or a step out of
        order."""
        if first:
            self._begin(step)
        bundles = len(parts) // 2
        for reports, gradients in zip(parts[:bundles], parts[bundles:], strict=True):
            for report, gradient in zip(reports, gradients, strict=True):
                self._add(step, report, gradient)

    def fold(self, step: int, first: bool, num_tasks: int | None, *parts: Any) -> Folded:
        """Add the last chunks, and divide the sum once. Raises ValueError unless the chunks taken were tasks 0..T-1 (T
        is `num_tasks`, where given), and Diverged for a loss or gradient that is not finite."""
        self.take(step, first, *parts)
        if self._folded is not None and (self._is_applied(step) or self._mean is not None):
            return self._folded
        taken = self._num_tasks()
        if not taken or taken != (num_tasks or taken):
            raise ValueError(f"meta-step {step} needs {num_tasks or 'some'} tasks; got {taken}")
        if self._diverged is not None:
            task = str(self._diverged)
            raise Diverged(f"task {task} has a loss or meta-gradient that is not finite", task=task)
        self._mean = self._sum / taken
        mean = self._mean[: self._cut]
        squares, unlimited = block_sums(np.square(mean)), self.optimization.clip_value is None
        self._folded = Folded(
            losses=np.concatenate([report.losses for report in self._reports]),
            norms=np.concatenate([report.norms for report in self._reports]),
            squares=squares,
            limited=squares if unlimited else block_sums(np.square(limit(mean, self.optimization))),
            along=block_sums(mean * (np.nan if self._units is None else self._units[: self._cut])),
        )
        return self._folded

    def attempt(self, step: int, *folded: Folded) -> Trial:
        """Whether the step that follows from what every shard folded, in order, leaves all finite; theta stays."""
        if self._is_applied(step):
            return Trial(len(self._theta))
        if step != self._step or self._mean is None:
            raise ValueError(f"meta-step {step} cannot move theta: its gradients have not been folded")
        norm = root([square for shard in folded for square in shard.limited])
        gradient, to_observed = np.split(self._mean, [self._cut])
        self._along = torch.from_numpy(clip(gradient, self.optimization, norm)).to(self._theta.dtype)
        self._to_observed = torch.from_numpy(self.optimization.statistics_rate * to_observed)
        rate = self.optimization.rate(step, self._num_tasks())
        self._careful = self._careful or not are_moderate(
            torch.tensor(rate), self._along, self._to_observed, self._theta
        )
        self._tried = self._theta, self._optimizer
        if not self._careful:
            return Trial(len(self._theta))
        theta = self._theta.clone()
        self._tried = theta, make_optimizer(theta[: self._cut], self.optimization)
        self._tried[1].load_state_dict(deepcopy(self._optimizer.state_dict()))
        self._descend(*self._tried, rate)
        return first_not_finite(theta, self._tried[1])

    def move(self, step: int, *results: Any) -> tuple[Weights, Stats]:
        """Step once, knowing what every shard folded, in order, then what each attempted; doing it again returns the
        same result. Raises Diverged, and stays as it was, where theta or what its optimizer remembers would not be
        finite in one of the shards."""
        if self._is_applied(step) and self._last is not None:
            return self._last
        folded, attempts = results[: len(results) // 2], results[len(results) // 2 :]
        if self._tried is None:
            raise ValueError(f"meta-step {step} cannot move theta: it has not been tried")
        stats = make_stats(folded, self.optimization.rate(step, self._num_tasks()))
        first = 0
        for tried in attempts:
            if tried.first_bad is not None:
                raise Diverged(
                    f"the step along the mean meta-gradient (norm {stats.gradient_norm:.3g}) would make {tried.what} "
                    "infinite or NaN: set optimizer.clip_norm or lower meta_lr",
                    element=first + tried.first_bad,
                )
            first += tried.size
        if self._tried[0] is self._theta:
            self._descend(*self._tried, stats.meta_lr)
        self._theta, self._optimizer = self._tried
        self._step, self._mean, self._reports, self._tried = self._step + 1, None, [], None
        self._last = self.weights(), stats
        return self._last

    def apply(self, step: int, first: bool, num_tasks: int | None, *parts: Any) -> tuple[Weights, Stats]:
        """All of a step at once, where there is but one shard."""
        folded = self.fold(step, first, num_tasks, *parts)
        return self.move(step, folded, self.attempt(step, folded))

    def pid(self) -> int:
        """Its process."""
        return os.getpid()

    def proof(self) -> str:
        """See `server_proof`."""
        return server_proof()

    def _begin(self, step: int) -> None:
        if self._is_applied(step):
            return
        if step != self._step:
            raise ValueError(f"the server has applied {self._step} meta-steps; it cannot apply step {step}")
        self._reports, self._diverged, self._mean, self._tried = [], None, None, None
        self._sum = np.zeros(self._theta.numel(), np.float64)
        self._units: np.ndarray | None = None

    def _add(self, step: int, report: ChunkReport, gradient: np.ndarray) -> None:
        if self._is_applied(step) or self._mean is not None:
            return
        chunk, expected = report.chunk, self._num_tasks()
        if chunk[:3] != ("train", step, expected) or len(report.losses) != chunk.stop - chunk.start:
            raise ValueError(f"meta-step {step} needs training task {expected} next; got {chunk}")
        if gradient.ndim == 2 and not self._reports:
            self._units = np.zeros(len(self._sum), gradient.dtype)
        self._reports.append(report)
        self._diverged = self._diverged or report.first_not_finite()
        if self._diverged is not None:
            return
        rows = gradient.reshape(-1, len(self._sum))
        inverse = np.divide(1, report.norms, out=np.zeros(len(report.norms)), where=report.norms > 1e-30)
        for start in range(0, len(self._sum), BLOCK):  # each block of the rows is read from memory once
            block = slice(start, start + BLOCK)
            for row in rows:
                np.add(self._sum[block], row[block], out=self._sum[block])
            if self._units is not None:
                self._units[block] += np.einsum("i,ij->j", inverse.astype(gradient.dtype), gradient[:, block])

    def _descend(self, theta: torch.Tensor, optimizer: torch.optim.Optimizer, rate: float) -> None:
        """Step in place."""
        group = optimizer.param_groups[0]
        group["lr"], group["params"][0].grad = rate, self._along
        plain_step(optimizer)
        if len(self._to_observed):
            theta[self._cut :] -= self._to_observed

    def _is_applied(self, step: int) -> bool:
        return step == self._step - 1 and self._last is not None

    def _num_tasks(self) -> int:
        return self._reports[-1].chunk.stop if self._reports else 0


class Server:
    """A parameter server in this process, for a loop of one's own: all of theta and the outer optimizer."""

    def __init__(self, theta: np.ndarray, optimization: Optimization, state: dict[str, Any] | None = None):
        """theta: [P]; `state` is what `snapshot` returned, to continue from."""
        self._shard = Shard(theta, optimization, state)

    def weights(self) -> Weights:
        """theta as it is now, a copy."""
        return self._shard.weights()

    def snapshot(self) -> dict[str, Any]:
        """See `Shard.snapshot`."""
        return self._shard.snapshot()

    def apply(
        self, step: int, *chunks: tuple[ChunkReport, np.ndarray], num_tasks: int | None = None
    ) -> tuple[Weights, Stats]:
        """Meta-update number `step` from chunks in task order; applying the last one again returns the same result.

        Each chunk is its report and float rows [n, P], or their float64 sum [P]. Raises ValueError for a step out of
        order, or training tasks that are not 0..T-1, each once (T is `num_tasks`, where given); Diverged for a loss or
        gradient that is not finite, or if theta would not be: then all is as before the step.
        """
        reports, gradients = [report for report, _ in chunks], [gradient for _, gradient in chunks]
        return self._shard.apply(step, True, num_tasks, reports, gradients)


PROOF_SIZE = 10_007  # so few that one thread computes it, and a remainder whatever the width of a machine's vectors
PROOF_OPTIMIZATIONS = (
    Optimization("adam", clip_value=0.3, statistics=13),
    Optimization("adamw", weight_decay=0.01, clip_norm=1.0),
    Optimization("sgd", momentum=0.9, schedule="cosine"),
)


@cache
def server_proof() -> str:
    """A hash of theta after three meta-updates of every optimizer on fixed numbers: servers with the same one are taken
    to compute the same bits. It does not depend on the job."""
    hashed = hashlib.sha256()
    for optimization in PROOF_OPTIMIZATIONS:
        server = Server(_fixed_numbers(0), optimization)
        for step in range(3):
            rows = np.stack([_fixed_numbers(2 * step + 1), _fixed_numbers(2 * step + 2)])
            norms = np.array([float(np.sqrt(np.square(row, dtype=np.float64).sum())) for row in rows])
            report = ChunkReport(Chunk("train", step, 0, 2), np.zeros(2), norms, {})
            weights, stats = server.apply(step, (report, rows))
            hashed.update(weights.theta.tobytes() + np.array(stats).tobytes())
    return hashed.hexdigest()[:16]


def _fixed_numbers(stream: int) -> np.ndarray:
    """float32 [PROOF_SIZE] in -0.5 ... 0.5, by whole-number arithmetic that is the same everywhere."""
    index = np.arange(PROOF_SIZE, dtype=np.uint64) + np.uint64(stream * PROOF_SIZE + 1)
    mixed = (index * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return (mixed.astype(np.float64) / 2**24 - 0.5).astype(np.float32)


def slices(size: int, count: int) -> list[slice]:
    """theta [size] cut into at most `count` slices of nearly the same number of whole blocks, at least one each."""
    blocks = -(-size // BLOCK)
    count = min(count, blocks)
    edges = [min(size, shard * blocks // count * BLOCK) for shard in range(count + 1)]
    return [slice(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


def shares(optimization: Optimization, pieces: Sequence[slice]) -> list[Optimization]:
    """How each slice's shard steps: each has those of the statistics that fall into it."""
    first = pieces[-1].stop - optimization.statistics
    return [replace(optimization, statistics=max(0, piece.stop - max(piece.start, first))) for piece in pieces]


def cut_state(state: dict[str, Any], piece: slice) -> dict[str, Any]:
    """The part of a whole server's snapshot that belongs to one slice of theta."""
    return _with_tensors(state, lambda key: _tensors(state)[key][piece])


def join_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The snapshot of one server that holds what these shards hold, in order."""
    return _with_tensors(states[0], lambda key: torch.cat([_tensors(state)[key] for state in states]))


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    return state["optimizer"]["state"].get(0, {})


def _with_tensors(state: dict[str, Any], change: Callable[[str], torch.Tensor]) -> dict[str, Any]:
    """The state with every vector of its optimizer replaced; numbers are the same in all shards."""
    tensors = _tensors(state)
    changed = {key: change(key) if getattr(value, "ndim", 0) else value for key, value in tensors.items()}
    return {**state, "optimizer": {**state["optimizer"], "state": {0: changed} if tensors else {}}}


def limit(gradient: np.ndarray, optimization: Optimization) -> np.ndarray:
    """The gradient [P], or a slice of it, limited by element."""
    most = optimization.clip_value
    return gradient if most is None else np.clip(gradient, -most, most)


def clip(gradient: np.ndarray, optimization: Optimization, norm: float | None = None) -> np.ndarray:
    """The gradient limited by element, then by `norm`: that of all of it so limited, where this is but a slice."""
    gradient = limit(gradient, optimization)
    if optimization.clip_norm is None:
        return gradient
    norm = root(block_sums(np.square(gradient))) if norm is None else norm
    return gradient * min(1.0, optimization.clip_norm / max(norm, 1e-300))


def make_optimizer(theta: torch.Tensor, optimization: Optimization) -> torch.optim.Optimizer:
    """The outer optimizer over the one flat parameter."""
    decay, rate = optimization.weight_decay, optimization.meta_lr
    if optimization.optimizer == "sgd":
        return SGD([theta], lr=rate, momentum=optimization.momentum, weight_decay=decay, foreach=False)
    kind = AdamW if optimization.optimizer == "adamw" else Adam
    return kind([theta], lr=rate, weight_decay=decay, foreach=False)


def are_moderate(*tensors: torch.Tensor) -> bool:
    """Whether every element is below a bound (4e9 in float32) from which an optimizer's squares, moments and steps are
    far from overflowing."""
    most = torch.finfo(tensors[-1].dtype).max ** 0.25
    return all(abs(float(end)) < most for tensor in tensors if tensor.numel() for end in torch.aminmax(tensor))


def remembered(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's moments [p], by name."""
    state = optimizer.state.get(optimizer.param_groups[0]["params"][0], {})
    return {name: value for name, value in state.items() if getattr(value, "ndim", 0)}


def first_not_finite(theta: torch.Tensor, optimizer: torch.optim.Optimizer) -> Trial:
    """Of a slice of theta after a step, and of the optimizer's moments."""
    moments = {f"the optimizer's {name}": values for name, values in remembered(optimizer).items()}
    for what, values in {"theta": theta, **moments}.items():
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            return Trial(len(theta), int(bad[0, 0]), what)
    return Trial(len(theta))


def block_sums(values: np.ndarray) -> list[float]:
    """The sum of each block of a slice. Not a BLAS product: its order depends on the thread count."""
    return [float(np.sum(values[start : start + BLOCK])) for start in range(0, len(values), BLOCK)]


def root(squares: Sequence[float]) -> float:
    """The square root of the sum, which is exact and then rounded once."""
    return math.sqrt(math.fsum(squares))


def make_stats(folded: Sequence[Folded], rate: float) -> Stats:
    """Diagnostics from per-task norms: agreement is the mean cosine between a task's gradient and the mean.

    noise_scale = tr(covariance) / |mean|^2, both unbiased (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162,
    appendix A.1): about the meta-batch size beyond which more tasks a step stop helping. NaN where undefined.
    """
    losses, norms = folded[0].losses, folded[0].norms
    norm, num_tasks = root([square for shard in folded for square in shard.squares]), len(folded[0].losses)
    agreement = noise_scale = float("nan")
    if norm > 0:
        agreement = math.fsum(part for shard in folded for part in shard.along) / (norm * num_tasks)
    if num_tasks > 1:
        variance = (np.mean(norms**2) - norm**2) * num_tasks / (num_tasks - 1)
        signal = norm**2 - variance / num_tasks
        noise_scale = float(variance / signal) if signal > 0 else float("inf")
    return Stats(float(losses.mean()), norm, float(norms.mean()), agreement, noise_scale, rate, num_tasks)
