"""Whether a learner beats what is simpler: compared with its best baseline on the same tasks."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from metadist.core.measure import Measure
from metadist.evaluation.intervals import count_diverged, interval


class Comparison(NamedTuple):
    """A learner beside one baseline, over `tasks` tasks that both solved: `ahead` is the mean over tasks of how much
    better it is, in the metric's unit, with the half-width of its 95 % interval."""

    baseline: str
    ahead: float
    ci95: float
    tasks: int

    @property
    def standing(self) -> str:
        """Whether it is "ahead of" that baseline, "level with" it or "behind"; "" where one task is too few to tell."""
        if self.tasks < 2:
            return ""
        if abs(self.ahead) <= self.ci95:
            return "level with"
        return "ahead of" if self.ahead > 0 else "behind"


def compare(results: Mapping[str, np.ndarray], measure: Measure) -> Comparison | None:
    """The comparison with the best baseline; None where there is none to compare with. `results`: {metric: [T,
    inner_steps + 1]} and {"baseline/metric": [T'] or [T', steps + 1]}, whose tasks are the first T' of the learner's.

    The best is, of the baselines that solved most tasks, the one over which the learner is the least ahead. One that
    solved fewer is taken only where it is better than that one beyond the 95 % interval, paired over its own tasks: a
    mean over a few tasks says nothing beside a mean over many.
    """
    better, own = measure.sign, _after(results[measure.name])
    usable = {
        name: theirs
        for name, theirs in _baselines(results, measure).items()
        if not count_diverged(theirs, own[: len(theirs)])
    }
    if not usable:
        return None
    most = max(map(len, usable.values()))
    best = max((name for name in usable if len(usable[name]) == most), key=lambda name: better * usable[name].mean())
    leads = {
        name: interval(better * (theirs - usable[best][: len(theirs)]))
        for name, theirs in usable.items()
        if len(theirs) < most
    }
    surely = [name for name, lead in leads.items() if lead.mean > lead.ci95]
    best = max(surely, key=lambda name: leads[name].mean, default=best)
    return compare_with(best, results, measure)


def compare_with(baseline: str, results: Mapping[str, np.ndarray], measure: Measure) -> Comparison | None:
    """The comparison with that baseline, of `results` as `compare` takes them; None where that was not computed, or
    tasks diverged."""
    theirs = _baselines(results, measure).get(baseline)
    if theirs is None:
        return None
    own = _after(results[measure.name])[: len(theirs)]
    if count_diverged(theirs, own):
        return None
    ahead = interval(measure.sign * (own - theirs))
    return Comparison(baseline, ahead.mean, ahead.ci95, len(theirs))


def verdict(results: Mapping[str, np.ndarray], measure: Measure) -> str:
    """A sentence on whether the learner is ahead of its best baseline, level with it, or behind, without its stop."""
    found, baselines = compare(results, measure), _baselines(results, measure)
    if count_diverged(_after(results[measure.name])):
        return "no verdict, since tasks diverged"
    left_out = ", ".join(name.replace("_", " ") for name, theirs in baselines.items() if count_diverged(theirs))
    if found is None:
        return f"no verdict, since tasks of {left_out} diverged" if left_out else "no baseline to compare with"
    name, figure = found.baseline.replace("_", " "), measure.difference(found.ahead, found.ci95)
    over = f"paired over {found.tasks} tasks{f'; tasks of {left_out} diverged' if left_out else ''}"
    if not found.standing:
        return "no verdict, since one task is too few to compare"
    if found.standing == "level with":
        return f"level with its best baseline, {name} (a difference in {measure.name} of {figure}, {over})"
    return f"{found.standing} its best baseline, {name}, by {figure} ({over})"


def _baselines(results: Mapping[str, np.ndarray], measure: Measure) -> dict[str, np.ndarray]:
    """Of each baseline what its tasks have after their last step, in the metric that is compared."""
    named = {name.rpartition("/"): values for name, values in results.items() if "/" in name}
    return {name: _after(values) for (name, _, metric), values in named.items() if metric == measure.name}


def _after(values: np.ndarray) -> np.ndarray:
    """[T]: what each task has after its last step."""
    return values.reshape(len(values), -1)[:, -1]
