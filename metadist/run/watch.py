"""What a user should know of a run while it trains: said once each, with the remedy."""

import math
import shlex
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from statistics import median

import numpy as np

from metadist.config import Config
from metadist.core.measure import ACCURACY, LOSS
from metadist.core.messages import ChunkReport
from metadist.core.task import Task, TaskId
from metadist.evaluation.baselines import support_mean
from metadist.evaluation.intervals import interval
from metadist.models import LOSSES
from metadist.run.facts import inner_rate
from metadist.run.prepare import Prepared
from metadist.run.remedies import joined, steadier
from metadist.run.trust import trust_flag

ABSURD = 10
"""How many times the loss of a trivial predictor the first loss must be for a warning."""
PATIENCE = 3
"""Validations, and logged steps, in a row that must show it."""
DOMINANT, MANY = 0.5, 8
"""The share of all gradient norms from which one task decides a step, where there are so many tasks."""
SOLVED = 0.1
"""The part of a trivial predictor's loss up to which tasks are as good as solved."""
NORMS, SPIKE = 100, 1000
"""Meta-gradients whose norm is remembered; how many times the median a norm must be for a warning."""


class Watch:
    """Warnings of one run. `say_once` takes a kind and a sentence, and says one of each kind."""

    def __init__(self, say_once: Callable[[str, str], None], prepared: Prepared):
        self._say_once, self._prepared = say_once, prepared
        self._config = prepared.job.config
        self.norms: deque[float] = deque(maxlen=NORMS)
        self._poor = self._dominated = 0
        self._support_mean: float | None = None

    def first_loss(self, loss: float) -> None:
        """Compare the first meta-step's loss with a trivial predictor's on those tasks: ln N, or the support mean's."""
        value, what = self._trivial
        if loss > ABSURD * value:
            self._say_once(
                "first loss",
                f"the first loss is {loss:.3g}, and {what} {value:.3g} (said once): adaptation or large inputs make "
                f"it explode; {steadier(self._prepared, updated=False)}",
            )

    @cached_property
    def _trivial(self) -> tuple[float, str]:
        """The loss of a trivial predictor on the first meta-step's tasks, and what has it, in words; infinite where
        that is not known: of another loss than metadist's own, of a learner that is judged otherwise."""
        if self._prepared.engine.learner.measures:
            return math.inf, ""
        shapes, own = self._prepared.job.shapes, self._prepared.job.loss
        if own is LOSSES["cross_entropy"] and shapes.classification:
            return math.log(shapes.outputs), f"even chances of {shapes.outputs} classes have"
        if own is LOSSES["mse"] and not shapes.classification:
            error = float(np.mean([_mean_error(task) for task in self._prepared.chunk]))
            return error or math.inf, "the support mean has"
        return math.inf, ""

    @property
    def baselines(self) -> tuple[str, ...]:
        """What the next validation must compute beside the learner."""
        job = self._prepared.job
        known = job.measure == LOSS and not job.shapes.classification and job.loss is LOSSES["mse"]
        return ("support_mean",) if known and self._support_mean is None else ()

    def validation(self, results: Mapping[str, np.ndarray], done: int) -> None:
        """Compare a validation, {metric: [T, inner_steps + 1]} with those of `baselines`, with a trivial predictor."""
        if "support_mean/loss" in results:
            self._support_mean = float(results["support_mean/loss"].mean())
        measure, trivial, what = self._prepared.job.measure, self._support_mean, "the support mean's loss"
        if measure == ACCURACY:
            trivial, what = 1 / self._prepared.job.evaluation_source.outputs, "chance"
        if trivial is None:
            return
        mean, ci95 = interval(results[measure.name][:, -1])
        poor = mean - ci95 <= trivial if measure == ACCURACY else mean >= trivial
        self._poor = self._poor + 1 if poor else 0
        if self._poor >= PATIENCE:
            rates = " or ".join(filter(None, [inner_rate(self._prepared.engine.learner), "meta_lr"]))
            told = "labels" if self._prepared.job.shapes.classification else "targets"
            self._say_once(
                "trivial",
                f"validation is no better than {what} ({mean:.3g}, {what} {trivial:.3g}) in {self._poor} validations, "
                f"up to step {done} (said once): nothing is learned; "
                f"{joined(self._prepared, [f'change {rates} by a factor of ten'])}, and see whether {told} can be told "
                "from the inputs",
            )

    def tasks(self, reports: Sequence[ChunkReport], done: int) -> None:
        """Look for a task whose gradient is longer than those of all others of its meta-step together. Where the loss
        is small that is no fault: most tasks are solved, and one is not."""
        norms = np.concatenate([report.norms for report in reports])
        share = float(norms.max() / norms.sum()) if norms.sum() else 0.0
        loss, (trivial, _) = np.concatenate([report.losses for report in reports]).mean(), self._trivial
        solved = loss <= SOLVED * trivial < math.inf
        self._dominated = self._dominated + 1 if len(norms) >= MANY and share > DOMINANT and not solved else 0
        if self._dominated >= PATIENCE:
            names = [name for report in reports for name in report.chunk.tasks]
            rate = inner_rate(self._prepared.engine.learner)
            batch = "tasks_per_worker" if self._config.tasks_per_worker else "meta_batch_size"
            changes = [f"lower {rate}"] * bool(rate) + [f"set a larger {batch}"]
            self._say_once(
                "dominant",
                f"one task, {names[int(norms.argmax())]}, has {share:.0%} of the lengths of all {len(norms)} gradients "
                f"of meta-step {done - 1}, and one likewise in the {PATIENCE - 1} logged before it (said once): it "
                f"decides the step alone; {joined(self._prepared, changes)}",
            )

    def steadier(self, **about: bool) -> str:
        """What keeps losses and gradients of this run finite, see `remedies.steadier`."""
        return steadier(self._prepared, **about)

    def norm(self, step: int, norm: float) -> None:
        """Say it where one meta-gradient is so much longer than the others that Adam's second moment remembers it: with
        1000 times the usual gradient its rate is below a fifth of the usual one for more than 1000 steps."""
        own, size = self._config.optimizer, self._prepared.engine.layout.size
        limited = min(norm, own.clip_norm or norm, (own.clip_value or norm) * size**0.5)
        self.norms.append(limited)
        largest = max(self.norms)
        if largest <= SPIKE * min(self.norms):  # which is at most the median, and found in less time
            return
        usual = median(self.norms)
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
