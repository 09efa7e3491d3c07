"""What a user should know of a run while it trains: said once each, with the remedy."""

import math
import shlex
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import numpy as np

from metadist.config import Config
from metadist.core.messages import ChunkReport
from metadist.core.task import Task, TaskId
from metadist.evaluation.baselines import support_mean
from metadist.evaluation.intervals import interval
from metadist.models import LOSSES
from metadist.run.prepare import Prepared
from metadist.run.trust import trust_flag

ABSURD = 10
"""How many times the loss of a trivial predictor the first loss must be for a warning."""
PATIENCE = 3
"""Validations, and logged steps, in a row that must show it."""
DOMINANT, MANY = 0.5, 8
"""The share of all gradient norms from which one task decides a step, where there are so many tasks."""
NORMS, SPIKE = 100, 1000
"""Meta-gradients whose norm is remembered; how many times the median a norm must be for a warning."""


class Watch:
    """Warnings of one run. `say_once` takes a kind and a sentence, and says one of each kind."""

    def __init__(self, say_once: Callable[[str, str], None], prepared: Prepared, place: str):
        self._say_once, self._prepared, self._place = say_once, prepared, place
        self._config = prepared.job.config
        self.norms: deque[float] = deque(maxlen=NORMS)
        self._poor = self._dominated = 0
        self._support_mean: float | None = None

    def first_loss(self, loss: float) -> None:
        """Compare the first meta-step's loss with a trivial predictor's on those tasks: ln N, or the support mean's."""
        shapes, own = self._prepared.job.shapes, self._prepared.job.loss
        if own is LOSSES["cross_entropy"] and shapes.classification:
            trivial, what = math.log(shapes.outputs), f"even chances of {shapes.outputs} classes have"
        elif own is LOSSES["mse"] and not shapes.classification:
            trivial, what = float(np.mean([_mean_error(task) for task in self._prepared.chunk])), "the support mean has"
        else:
            return
        if loss > ABSURD * trivial > 0:
            self._say_once(
                "first loss",
                f"the first loss is {loss:.3g}, and {what} {trivial:.3g} (said once): adaptation or large inputs make "
                "it explode; lower learner.inner_lr, or scale inputs and targets (`--standardize` at import)",
            )

    @property
    def baselines(self) -> tuple[str, ...]:
        """What the next validation must compute beside the learner."""
        job = self._prepared.job
        known = not job.shapes.classification and job.loss is LOSSES["mse"]
        return ("support_mean",) if known and self._support_mean is None else ()

    def validation(self, results: Mapping[str, np.ndarray], done: int) -> None:
        """Compare a validation, {metric: [T, inner_steps + 1]} with those of `baselines`, with a trivial predictor."""
        if "support_mean/loss" in results:
            self._support_mean = float(results["support_mean/loss"].mean())
        trivial, what = self._support_mean, "the support mean's loss"
        if "accuracy" in results:
            trivial, what = 1 / self._prepared.job.evaluation_source.outputs, "chance"
        if trivial is None:
            return
        mean, ci95 = interval(results["accuracy" if "accuracy" in results else "loss"][:, -1])
        poor = mean - ci95 <= trivial if "accuracy" in results else mean >= trivial
        self._poor = self._poor + 1 if poor else 0
        if self._poor >= PATIENCE:
            self._say_once(
                "trivial",
                f"validation is no better than {what} ({mean:.3g}, {what} {trivial:.3g}) in {self._poor} validations, "
                f"up to step {done} (said once): nothing is learned; change learner.inner_lr or meta_lr by a factor of "
                "ten, scale inputs (`--standardize` at import), and see whether labels can be told from the inputs",
            )

    def tasks(self, reports: Sequence[ChunkReport], done: int) -> None:
        """Look for a task whose gradient is longer than those of all others of its meta-step together."""
        norms = np.concatenate([report.norms for report in reports])
        names = [name for report in reports for name in report.chunk.tasks]
        largest = int(norms.argmax())
        share = float(norms[largest] / norms.sum()) if norms.sum() else 0.0
        self._dominated = self._dominated + 1 if len(norms) >= MANY and share > DOMINANT else 0
        if self._dominated >= PATIENCE:
            self._say_once(
                "dominant",
                f"one task has {share:.0%} of the lengths of all {len(norms)} gradients of meta-step {done - 1}, and "
                f"likewise in the {PATIENCE - 1} logged before it (said once): it decides the step alone; lower "
                "learner.inner_lr, scale targets (`--standardize` at import), or set a larger meta_batch_size; "
                f"`{replay_command(self._config, self._place, names[largest])}` shows that task",
            )

    def norm(self, step: int, norm: float) -> None:
        """Say it where one meta-gradient is so much longer than the others that Adam's second moment remembers it: with
        1000 times the usual gradient its rate is below a fifth of the usual one for more than 1000 steps."""
        own, size = self._config.optimizer, self._prepared.engine.layout.size
        limited = min(norm, own.clip_norm or norm, (own.clip_value or norm) * size**0.5)
        self.norms.append(limited)
        largest, usual = max(self.norms), median(self.norms)
        if len(self.norms) > 2 and largest > SPIKE * usual > 0:
            at = step + 1 - len(self.norms) + list(self.norms).index(largest)
            slow = (
                "Adam's rate stays small for thousands of steps after it" if own.name != "sgd" else "it moves theta far"
            )
            self._say_once(
                "norm",
                f"meta-gradient of meta-step {at} has norm {largest:.3g}, more than {SPIKE} times the usual "
                f"{usual:.3g}: {slow} (said once), set optimizer.clip_norm to a few times the usual norm",
            )


def replay_command(config: Config, place: str, task: TaskId | str | None) -> str:
    """What computes one task of the run at `place` again, step by step."""
    return f"metadist replay {shlex.quote(place)} --task {task}{trust_flag(config)}"


def _mean_error(task: Task) -> float:
    values = [np.asarray(y, np.float64).reshape(len(y), -1) for y in task.query.targets]
    return float(np.square(support_mean(task) - np.concatenate(values, axis=1)).mean())
