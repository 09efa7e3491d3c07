"""The description of a run, which MLflow shows at the head of its page: rewritten at each validation and at the end."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from metadist.core.measure import Measure
from metadist.tracking import Status, Tracker
from metadist.tracking.best import Best

DESCRIPTION = "mlflow.note.content"
RECENT = 10  # noise scales, each of which is noisy itself
_ENDS = {"FINISHED": "finished", "FAILED": "**failed**", "KILLED": "**stopped** by a signal, saved"}


class RunDescription(Tracker):
    """Task and learner, the best validation, the status, and what to do next, in Markdown.

    `publish` takes tags. `about` says what the run is, `commands` what its user may type, `results` how it ended.
    """

    def __init__(
        self, publish: Callable[[dict[str, str]], None], total_steps: int, measure: Measure | None = None
    ) -> None:
        self._publish, self._total = publish, total_steps
        self.about = self.commands = self.results = ""
        self._best, self._step = Best(measure), 0
        self._latest: dict[str, float] = {}
        self._noise: deque[float] = deque(maxlen=RECENT)

    def remember(self, values: Mapping[str, float], step: int) -> None:
        """A validation of an earlier try of this run."""
        self._best.offer(values, step)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._step = max(self._step, step)
        self._latest.update(values)
        if "train/noise_scale_tasks" in values:
            self._noise.append(values["train/noise_scale_tasks"])
        if "validation/diverged_tasks" in values:
            self._best.offer(values, step)
            self._publish({DESCRIPTION: self._text("running")})

    def finish(self, status: Status) -> None:
        self._publish({DESCRIPTION: self._text(_ENDS[status])})

    def _text(self, status: str) -> str:
        lines = [f"**Status**: {status}, step {self._step} of {self._total}{self._workers()}"]
        if self._best.step is not None:
            best = self._best.measure.text(self._best.value, self._best.ci95)
            lines.append(f"**Best validation**: {self._best.measure.name} {best}, step {self._best.step}")
        if (noise := [value for value in self._noise if math.isfinite(value)]) and self._latest:
            lines.append(noise_reading(median(noise), self._latest.get("train/meta_batch_size", math.nan)))
        return "\n\n".join(filter(None, [*lines[:2], self.results, self.about, *lines[2:], self.commands]))

    def _workers(self) -> str:
        if "workers/alive" not in self._latest:
            return ""
        return f", {self._latest['workers/alive']:g} of {self._latest['workers/target']:g} workers"


def noise_reading(noise_scale: float, batch_size: float) -> str:
    """What the gradient noise scale says of the meta-batch, both in tasks, in words."""
    found = f"**Gradient noise scale**: about {noise_scale:.0f} tasks, meta-batch {batch_size:.0f}: "
    if noise_scale > 2 * batch_size:
        return f"{found}more tasks a step (and more workers) would help"
    if noise_scale < batch_size / 2:
        return f"{found}fewer tasks a step (and fewer workers) would learn as much a step"
    return f"{found}the meta-batch suits"


def figure(measure: Measure, point: Mapping[str, float]) -> str:
    """A mean with its 95 % interval: accuracies in per cent."""
    if point.get("diverged_tasks"):
        return f"none: {point['diverged_tasks']} tasks diverged"
    return measure.text(point["mean"], point["ci95"])


def results_table(results: Mapping[str, Any]) -> str:
    """The figures of an evaluation with its baselines, and the verdict, in Markdown."""
    measure = Measure.of(results)
    own, split = results[measure.name], results["protocol"]["split"]
    steps = len(own["by_inner_step"]) - 1
    last = f"after {steps} inner step{'s' * (steps != 1)}" if steps else results["begun"]
    rows = [(f"**{last}**", f"**{figure(measure, own['after'])}**", results["protocol"]["tasks"])]
    if steps:
        rows.append((results["begun"], figure(measure, own["before"]), results["protocol"]["tasks"]))
    for name, measured in results["baselines"].items():
        points = measured[measure.name]
        point = points[-1] if isinstance(points, list) else points
        rows.append((name.replace("_", " "), figure(measure, point), measured["tasks"]))
    table = "\n".join(f"| {label} | {value} | {tasks} |" for label, value, tasks in rows)
    head = f"| {split} | {measure.name}, 95 % interval | tasks |\n|---|---|---|\n"
    advice = "".join(f"- Try: {text}\n" for text in results.get("advice", []))
    note = f"\n\n{results['few_tasks']}." if "few_tasks" in results else ""
    verdict = f"{results['verdict'][0].upper()}{results['verdict'][1:]}."
    return f"{verdict}\n\n{advice}{chr(10) if advice else ''}{head}{table}{note}"
