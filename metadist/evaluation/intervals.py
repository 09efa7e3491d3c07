"""Means over tasks with their intervals, and the tasks that have no figure."""

from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """Mean over tasks and the half-width of its 95 % confidence interval (Student's t; NaN for one task)."""

    mean: float
    ci95: float


def interval(values: np.ndarray) -> Interval:
    """values [T], one per task -> their mean and interval; both NaN where one of them is not finite, because a mean
    over the tasks that did not diverge would be of an easier set."""
    count = len(values)
    if count_diverged(values):
        return Interval(float("nan"), float("nan"))
    if count < 2:
        return Interval(float(values.mean()), float("nan"))
    from scipy.special import stdtrit  # a tenth of a second, which workers need not wait for

    quantile = float(stdtrit(count - 1, 0.975))
    return Interval(float(values.mean()), quantile * float(values.std(ddof=1)) / count**0.5)


def count_diverged(*results: np.ndarray) -> int:
    """The number of tasks of which one of these [T, ...] is not finite."""
    bad = [~np.isfinite(values).reshape(len(values), -1).all(axis=1) for values in results]
    return int(np.any(bad, axis=0).sum())
