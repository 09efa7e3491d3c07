"""The parameter server: owns theta and the outer optimizer."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from metadist.errors import Diverged
from metadist.messages import ChunkReport, Weights, fold


@dataclass(frozen=True)
class Optimization:
    """How the server steps. Rates are per meta-step; clipping applies to the mean meta-gradient, values before norm."""

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
    """What one meta-update tells: everything a user plots of it."""

    loss: float
    gradient_norm: float
    task_norm: float
    agreement: float
    noise_scale: float
    meta_lr: float
    num_tasks: int


class Server:
    """Applies each meta-step once: folds per-task meta-gradients in task order in float64, divides once, steps.

    Without Ray it is this plain class; in a cluster one actor holds it. Not thread-safe.
    """

    def __init__(self, theta: np.ndarray, optimization: Optimization, state: dict[str, Any] | None = None):
        """theta [P]; `state` is what `snapshot` returned, to continue from."""
        self.optimization = optimization
        self._theta = torch.from_numpy(np.array(theta))
        self._optimizer = make_optimizer(self._theta, optimization)
        self._step = 0
        self._last: tuple[Weights, Stats] | None = None
        if state is not None:
            self._step = state["step"]
            self._optimizer.load_state_dict(deepcopy(state["optimizer"]))

    def weights(self) -> Weights:
        """theta as it is now, a copy."""
        return Weights(self._step, self._theta.numpy().copy())

    def snapshot(self) -> dict[str, Any]:
        """Plain types and tensors from which, with theta, an equal server is built."""
        return {"step": self._step, "optimizer": deepcopy(self._optimizer.state_dict())}

    def apply(
        self, step: int, *chunks: tuple[ChunkReport, np.ndarray], num_tasks: int | None = None
    ) -> tuple[Weights, Stats]:
        """Meta-update number `step` from chunks in task order; applying the last one again returns its kept result.

        Each chunk is its report and float rows [n, P], or their float64 sum [P]. Raises ValueError for a step out of
        order, or training tasks that are not 0..T-1, each once (T is `num_tasks`, where given); Diverged for a loss or
        gradient that is not finite.
        """
        if step == self._step - 1 and self._last is not None:
            return self._last
        if step != self._step:
            raise ValueError(f"the server has applied {self._step} meta-steps; it cannot apply step {step}")
        reports = [report for report, _ in chunks]
        _check_coverage(step, reports, num_tasks)
        for report in reports:
            task = report.first_not_finite()
            if task is not None:
                raise Diverged(f"task {task} has a loss or meta-gradient that is not finite")
        num_tasks = reports[-1].chunk.stop
        mean = fold([gradient for _, gradient in chunks], self._theta.numel()) / num_tasks
        stats = _stats(mean, chunks, num_tasks, self.optimization.rate(step, num_tasks))
        self._theta.grad = torch.from_numpy(clip(mean, self.optimization)).to(self._theta.dtype)
        for group in self._optimizer.param_groups:
            group["lr"] = stats.meta_lr
        self._optimizer.step()
        self._step += 1
        self._last = self.weights(), stats
        return self._last


def clip(gradient: np.ndarray, optimization: Optimization) -> np.ndarray:
    """The gradient [P] limited by element, then by norm."""
    if optimization.clip_value is not None:
        gradient = np.clip(gradient, -optimization.clip_value, optimization.clip_value)
    if optimization.clip_norm is not None:
        gradient = gradient * min(1.0, optimization.clip_norm / max(_norm(gradient), 1e-300))
    return gradient


def make_optimizer(theta: torch.Tensor, optimization: Optimization) -> torch.optim.Optimizer:
    """The outer optimizer over the one flat parameter."""
    decay, rate = optimization.weight_decay, optimization.meta_lr
    if optimization.optimizer == "sgd":
        return torch.optim.SGD([theta], lr=rate, momentum=optimization.momentum, weight_decay=decay, foreach=False)
    kind = torch.optim.AdamW if optimization.optimizer == "adamw" else torch.optim.Adam
    return kind([theta], lr=rate, weight_decay=decay, foreach=False)


def _norm(vector: np.ndarray) -> float:
    return float(np.sqrt(np.sum(np.square(vector))))  # not a BLAS product: its order depends on the thread count


def _check_coverage(step: int, reports: Sequence[ChunkReport], num_tasks: int | None) -> None:
    expected = 0
    for report in reports:
        chunk = report.chunk
        if chunk[:3] != ("train", step, expected) or len(report.losses) != len(chunk.tasks):
            raise ValueError(f"meta-step {step} needs training task {expected} next; got {chunk}")
        expected = chunk.stop
    if not expected or expected != (num_tasks or expected):
        raise ValueError(f"meta-step {step} needs {num_tasks or 'some'} tasks; got {expected}")


def _stats(mean: np.ndarray, chunks: Sequence[tuple[ChunkReport, np.ndarray]], num_tasks: int, rate: float) -> Stats:
    """Diagnostics from per-task norms: agreement is the mean cosine between a task's gradient and the mean.

    noise_scale = tr(covariance) / |mean|^2, both unbiased (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162,
    appendix A.1): about the meta-batch size beyond which more tasks a step stop helping. NaN where undefined.
    """
    losses = np.concatenate([report.losses for report, _ in chunks])
    norms = np.concatenate([report.norms for report, _ in chunks])
    norm = _norm(mean)
    agreement = noise_scale = float("nan")
    rows = [(report, gradient) for report, gradient in chunks if gradient.ndim == 2]
    if norm > 0 and len(rows) == len(chunks):
        unit = (mean / norm).astype(rows[0][1].dtype)
        along = np.concatenate([gradient @ unit for _, gradient in rows])
        agreement = float(np.mean(along / np.maximum(norms, 1e-300)))
    if num_tasks > 1:
        variance = (np.mean(norms**2) - norm**2) * num_tasks / (num_tasks - 1)
        signal = norm**2 - variance / num_tasks
        noise_scale = float(variance / signal) if signal > 0 else float("inf")
    return Stats(float(losses.mean()), norm, float(norms.mean()), agreement, noise_scale, rate, num_tasks)
