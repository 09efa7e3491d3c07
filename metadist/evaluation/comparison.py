"""Runs beside one another: how much better one is, paired over tasks where both had the same."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from metadist.core.measure import Measure
from metadist.evaluation.intervals import Interval, count_diverged, interval


class Measured(NamedTuple):
    """What an evaluation found: the `measure` of each task after its last inner step, values [T]; `tasks`: all that
    the tasks depend on, by name. Where two evaluations agree in that, their tasks of one number are the same."""

    measure: Measure
    values: np.ndarray
    tasks: Mapping[str, Any]


class Difference(NamedTuple):
    """How much better one run is than another in their measure's unit, with the
    half-width of its 95 % interval; NaN where a task diverged. tasks: paired over so many; 0 where it is not paired,
    and `why` not. comparable: whether the two are of the same data; of other data a difference says nothing of runs."""

    better: float
    ci95: float
    tasks: int
    why: str
    comparable: bool = True

    @property
    def word(self) -> str:
        """ahead, behind or level; unknown where there is no interval; "not comparable" where the data is other."""
        if not self.comparable:
            return "not comparable"
        if not np.isfinite([self.better, self.ci95]).all():
            return "unknown"
        return "level" if abs(self.better) <= self.ci95 else "ahead" if self.better > 0 else "behind"


def difference(run: Measured, reference: Measured) -> Difference:
    """How much better `run` is than `reference`, by the same measure: over the tasks that both have, or, where their
    tasks are others, of the two means."""
    sign, count = run.measure.sign, min(len(run.values), len(reference.values))
    if why := _unlike(run.tasks, reference.tasks):
        means = unpaired(sign * run.values, sign * reference.values)
        return Difference(*means, 0, why, _data(run.tasks) == _data(reference.tasks))
    return Difference(*interval(sign * (run.values[:count] - reference.values[:count])), count, "")


def unpaired(ours: np.ndarray, theirs: np.ndarray) -> Interval:
    """Two samples [T], [T'] of unequal variance -> the difference of their means and its 95 % interval (Welch 1947);
    both NaN where a value is not finite."""
    if count_diverged(ours) or count_diverged(theirs):
        return Interval(float("nan"), float("nan"))
    mean = float(ours.mean() - theirs.mean())
    if min(len(ours), len(theirs)) < 2:
        return Interval(mean, float("nan"))
    shares = [values.var(ddof=1) / len(values) for values in (ours, theirs)]
    if not sum(shares):
        return Interval(mean, 0.0)
    parts = (share**2 / (len(values) - 1) for share, values in zip(shares, (ours, theirs), strict=True))
    freedom = sum(shares) ** 2 / sum(parts)
    return Interval(mean, float(stdtrit(freedom, 0.975)) * sum(shares) ** 0.5)


def _data(tasks: Mapping[str, Any]) -> Any:
    """What tells data apart: its digest, or the name of a source of the user's own, which has none."""
    return tasks.get("digest") or tasks.get("data")


def _unlike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """In which of the names two evaluations differ, in words."""
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    shown = [name for name in names if name not in ("digest", "first_task")]
    hidden = {"digest": "the data's content", "first_task": "the tasks' content"}
    if shown:
        return ", ".join(f"{name.replace('_', ' ')} {theirs.get(name)} and {ours.get(name)}" for name in shown)
    return hidden[names[0]] if names else ""
