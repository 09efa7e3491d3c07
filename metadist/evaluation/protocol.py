"""The protocol behind every number we report: fixed tasks, intervals, curves and baselines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from metadist.config.schema import EvaluationConfig
from metadist.core.measure import Measure
from metadist.core.messages import Chunk, Progress, plan, unseen
from metadist.core.task import Split
from metadist.evaluation.figures import CurvePoint, adaptation_curve
from metadist.evaluation.intervals import count_diverged, interval
from metadist.evaluation.joint import Joint
from metadist.evaluation.verdict import verdict
from metadist.learners import Learner

Doing = Callable[[str, int, int], None]
"""Takes what is being done, how much of it is, and of how much."""


class EvaluatingFleet(Protocol):
    """The part of a fleet that evaluation needs."""

    def evaluate(
        self, weights: Any, chunks: Sequence[Chunk], baselines: tuple[str, ...] = (), progress: Progress = unseen
    ) -> list[dict[str, np.ndarray]]: ...


def measure(
    fleet: EvaluatingFleet,
    weights: Any,
    split: Split,
    num_tasks: int,
    size: int,
    baselines: tuple[str, ...] = (),
    step: int = 0,
    progress: Progress = unseen,
) -> dict[str, np.ndarray]:
    """Per-task results of tasks 0..num_tasks-1 of a split: {metric: [T, inner_steps + 1]}, {"baseline/metric": [T]};
    see `Worker.evaluate`. `progress` is told how many tasks are done."""

    def chunks_done(done: int, total: int) -> None:
        progress(num_tasks if done == total else done * size, num_tasks)

    chunks = plan(split, step, num_tasks, size)
    results = fleet.evaluate(weights, chunks, baselines, chunks_done)
    return {name: np.concatenate([result[name] for result in results]) for name in results[0]}


@dataclass(frozen=True)
class Evaluation:
    """The full evaluation of one job's weights: its tasks, baselines and caption.

    caption: how the figures come about, in the words of a paper's table. measure: what tasks are judged by. learner:
    the run's. joint: the joint baseline, where `baselines` has it.
    """

    settings: EvaluationConfig
    caption: Mapping[str, Any]
    measure: Measure
    learner: Learner
    chunk_size: int
    baselines: Sequence[str]
    joint: Joint | None = None

    def run(
        self, fleet: EvaluatingFleet, weights: Any, say: Callable[[str], None], doing: Doing = unseen
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Evaluate weights on `evaluation.split`: a summary as plain types, and per-task results.

        Baselines see the same tasks; from_scratch, which is slow, the first `evaluation.baseline_tasks` of them.
        `doing` takes what is being done, how much of it is, and of how much.
        """
        settings = self.settings
        split, tasks = settings.split, settings.test_tasks
        quick = tuple(name for name in self.baselines if name not in ("from_scratch", "joint"))
        say(f"evaluating {tasks} tasks of split {split!r}")
        results = measure(
            fleet, weights, split, tasks, self.chunk_size, quick, progress=partial(doing, "evaluated tasks")
        )
        few = min(settings.baseline_tasks, tasks)
        if "from_scratch" in self.baselines and few:
            say(f"training from scratch on {few} of them (evaluation.baseline_tasks=0 leaves that out)")
            progress = partial(doing, "tasks trained from scratch")
            results |= measure(fleet, weights, split, few, self.chunk_size, ("from_scratch",), progress=progress)
        caption = dict(self.caption)
        if self.joint is not None and "joint" in self.baselines:
            others = ",".join(name for name in self.baselines if name != "joint")
            skip = f"evaluation.baselines=[{others}] leaves it out"
            say(f"training the joint baseline for {settings.joint_steps} steps ({skip})")
            found = self.joint.results(partial(doing, "steps of the joint baseline"))
            results |= {f"joint/{name}": values for name, values in found.items()}
            caption["joint_inner_lr"] = self.joint.inner_lr
        figures = summary(results)
        figures["verdict"] = verdict(results, self.measure)
        if text := divergence(figures, self.learner, tasks):
            say(text)
            figures["divergence"] = text
        about = {"protocol": caption, "measure": self.measure.saved(), "begun": self.learner.before}
        return about | figures, results


def divergence(figures: Mapping[str, Any], learner: Learner, num_tasks: int) -> str:
    """A sentence on the tasks that diverged, empty where none did; `figures` is the summary."""
    counts = {"": (figures["diverged_tasks"], num_tasks)}
    counts |= {
        f" of the baseline {name}": (measured["diverged_tasks"], measured["tasks"])
        for name, measured in figures["baselines"].items()
    }
    parts = [f"{bad} of {tasks} tasks{whose} diverged" for whose, (bad, tasks) in counts.items() if bad]
    if not parts:
        return ""
    remedy = "lower evaluation.inner_lr or evaluation.inner_steps"
    if "inner_lr" in learner.refused or learner.learned_rates:
        remedy = "lower meta_lr or set optimizer.clip_norm, and train again"
    if not figures["diverged_tasks"]:
        remedy = "the learner's own tasks did not"
    return f"{', '.join(parts)} (an output or loss is not finite), so these figures have no mean: {remedy}"


def summary(results: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Means and intervals per metric (before the first inner step, after each, after the last) and per baseline.

    `diverged_tasks` is how many tasks have a value that is not finite: of a figure, or of any metric after the last
    step.
    """
    after = {name: values.reshape(len(values), -1)[:, -1] for name, values in results.items()}
    own = [values for name, values in after.items() if "/" not in name]
    figures: dict[str, Any] = {"diverged_tasks": count_diverged(*own), "baselines": {}}
    for name, values in results.items():
        baseline, slash, metric = name.rpartition("/")
        columns = values.reshape(len(values), -1).T
        curve = [{**interval(column)._asdict(), "diverged_tasks": count_diverged(column)} for column in columns]
        if slash:
            all_of_it = [values for name, values in after.items() if name.rpartition("/")[0] == baseline]
            fresh = {"tasks": len(values), "diverged_tasks": count_diverged(*all_of_it)}
            measured = figures["baselines"].setdefault(baseline, fresh)
            measured[metric] = curve[0] if values.ndim == 1 else curve
        else:
            figures[metric] = {"before": curve[0], "after": curve[-1], "by_inner_step": curve}
    return figures


def write_results(results: Mapping[str, np.ndarray], path: Path) -> None:
    """Per-task results as an Arrow file: `task`, `METRIC_after_K`, and a column per baseline (null where not run)."""
    count = max(len(values) for values in results.values())
    columns: dict[str, list[Any]] = {"task": list(range(count))}
    for name, values in results.items():
        flat = values.reshape(len(values), -1)
        for k, column in enumerate(flat.T):
            label = name.replace("/", "_") + (f"_after_{k}" if values.ndim == 2 else "")
            columns[label] = column.tolist() + [None] * (count - len(values))
    table = pa.table(columns)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def draw_curve(figures: Mapping[str, Any], title: str, path: Path) -> None:
    """The adaptation curve with its baselines, as a PNG."""
    measure = Measure.of(figures)
    curves = {"meta-learned": figures[measure.name]["by_inner_step"]}
    curves |= {name.replace("_", " "): measured[measure.name] for name, measured in figures["baselines"].items()}
    points = []
    for name, curve in curves.items():
        steps = list(enumerate(curve)) if isinstance(curve, list) else [(None, curve)]
        label = f"{name} (diverged)" if any(point.get("diverged_tasks") for _, point in steps) else name
        points += [CurvePoint(label, k, point["mean"], point["ci95"]) for k, point in steps]
    adaptation_curve(points, title, path, measure)


def round_loss(fleet: EvaluatingFleet, weights: Any, number: int, tasks: int, size: int) -> float:
    """The loss after adaptation on the task that arrives in round `number` (online), a mean over `tasks` ways to divide
    it into support and query set. Called before theta has been trained on it, it is that round's performance."""
    return float(measure(fleet, weights, "validation", tasks, size, step=number + 1)["loss"][:, -1].mean())


def regret(fleet: EvaluatingFleet, weights: Any, losses: Mapping[int, float], tasks: int, size: int) -> dict[str, Any]:
    """The regret of follow the meta-leader (Finn et al. 2019, equation 3): the summed differences between the losses of
    the rounds (all, unless the run began from another's checkpoint) and those of the last theta, which stands for the
    best in hindsight."""
    hindsight = [round_loss(fleet, weights, number, tasks, size) for number in losses]
    lost = sum(losses.values()) - sum(hindsight)
    return {"rounds": list(losses), "losses": list(losses.values()), "in_hindsight": hindsight, "regret": lost}
