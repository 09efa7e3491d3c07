"""The protocol behind every number we report: fixed tasks, intervals, curves and baselines."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from scipy.special import stdtrit

from metadist.config import Config
from metadist.core.errors import InputError
from metadist.core.messages import Chunk, plan
from metadist.core.task import Split
from metadist.engine import Engine
from metadist.evaluation.figures import CurvePoint, adaptation_curve
from metadist.evaluation.joint import check_joint, fine_tuning, joint_results
from metadist.learners import Learner
from metadist.models.losses import LOSSES
from metadist.run.auto import chunk_size
from metadist.run.build import Shapes


class Evaluator(Protocol):
    """The part of a fleet that evaluation needs."""

    def evaluate(
        self, weights: Any, chunks: Sequence[Chunk], baselines: tuple[str, ...] = ()
    ) -> list[dict[str, np.ndarray]]: ...


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
    quantile = float(stdtrit(count - 1, 0.975))
    return Interval(float(values.mean()), quantile * float(values.std(ddof=1)) / count**0.5)


def count_diverged(*results: np.ndarray) -> int:
    """The number of tasks of which one of these [T, ...] is not finite."""
    bad = [~np.isfinite(values).reshape(len(values), -1).all(axis=1) for values in results]
    return int(np.any(bad, axis=0).sum())


def measure(
    fleet: Evaluator,
    weights: Any,
    split: Split,
    num_tasks: int,
    size: int,
    baselines: tuple[str, ...] = (),
    step: int = 0,
) -> dict[str, np.ndarray]:
    """Per-task results of tasks 0..num_tasks-1 of a split: {metric: [T, inner_steps + 1]}, {"baseline/metric": [T]}."""
    results = fleet.evaluate(weights, plan(split, step, num_tasks, size), baselines)
    return {name: np.concatenate([result[name] for result in results]) for name in results[0]}


def default_baselines(config: Config, shapes: Shapes) -> Sequence[str]:
    """What suits the kind of task, unless the job says."""
    suited = ["nearest_class_mean"] if shapes.classification else ["support_mean", "ridge", "joint"]
    suited.append("from_scratch")
    if config.evaluation.baselines is None:  # a loss of the job's own may mean something else by outputs and targets
        return suited if shapes.classification or config.loss in ("auto", *LOSSES) else []
    chosen = list(config.evaluation.baselines)
    unfit = [name for name in chosen if name not in (*suited, "joint")]
    if unfit:
        kind = "classification" if shapes.classification else "regression"
        raise InputError(f"evaluation.baselines: {unfit[0]} does not suit {kind}; take of {', '.join(suited)}")
    if "joint" in chosen:
        check_joint(config, shapes)
    return chosen


def evaluate_run(
    config: Config,
    shapes: Shapes,
    engine: Engine,
    fleet: Evaluator,
    weights: Any,
    baselines: Sequence[str],
    say: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The full evaluation of a run's weights on `evaluation.split`: a summary as plain types, and per-task results.

    Baselines see the same tasks; from_scratch, which is slow, the first `evaluation.baseline_tasks` of them.
    """
    own = config.evaluation
    size = chunk_size(config, engine)
    quick = tuple(name for name in baselines if name not in ("from_scratch", "joint"))
    say(f"evaluating {own.test_tasks} tasks of split {own.split!r}")
    results = measure(fleet, weights, own.split, own.test_tasks, size, quick)
    if "from_scratch" in baselines and own.baseline_tasks:
        say(f"training from scratch on {min(own.baseline_tasks, own.test_tasks)} of them")
        few = measure(fleet, weights, own.split, min(own.baseline_tasks, own.test_tasks), size, ("from_scratch",))
        results |= {name: values for name, values in few.items() if name.startswith("from_scratch/")}
    if "joint" in baselines:
        say(f"training the joint baseline for {own.joint_steps} steps")
        joint = joint_results(config, shapes, engine.learner)
        results |= {f"joint/{name}": values for name, values in joint.items()}
    told = protocol(config, shapes, engine)
    if "joint" in baselines:
        told["joint_inner_lr"] = fine_tuning(config, shapes, engine.learner)[0]
    figures = summary(results)
    if text := divergence(figures, engine.learner, own.test_tasks):
        say(text)
        figures["divergence"] = text
    return {"protocol": told, "begun": engine.learner.before, **figures}, results


def protocol(config: Config, shapes: Shapes, engine: Engine) -> dict[str, Any]:
    """How the numbers came about, in the words of a paper's table caption."""
    own, task = config.evaluation, config.task
    sizes: dict[str, Any] = {"source": config.data.source}
    if not config.data.source:
        sizes = {"ways": own.ways or task.ways} if shapes.classification else {}
        sizes |= {"shots": own.shots or task.shots, "queries": own.queries or task.queries}
    learner = engine.learner
    rate = "learned" if learner.learned_rates else own.inner_lr or learner.inner_lr
    options = {key: value for key, value in config.learner.options.items() if key not in ("inner_steps", "inner_lr")}
    return {
        "learner": config.learner.name,
        **options,
        "split": own.split,
        "tasks": own.test_tasks,
        **sizes,
        **({"target_unit": "as standardized"} if any(_scaled(unit) for unit in shapes.target_units) else {}),
        "inner_steps": learner.inner_steps if own.inner_steps is None else own.inner_steps,
        **({} if "inner_steps" in learner.refused else {"inner_lr": rate}),
        "transductive": own.transductive,
        "seed": config.seed,
    }


def _scaled(unit: Mapping[str, Any]) -> bool:
    return bool(np.any(np.not_equal(unit["scale"], 1)) or np.any(unit["offset"]))


def divergence(told: Mapping[str, Any], learner: Learner, num_tasks: int) -> str:
    """What to say where tasks diverged, or nothing; `told` is the summary."""
    counts = {"": (told["diverged_tasks"], num_tasks)}
    counts |= {
        f" of the baseline {name}": (own["diverged_tasks"], own["tasks"]) for name, own in told["baselines"].items()
    }
    parts = [f"{bad} of {tasks} tasks{whose} diverged" for whose, (bad, tasks) in counts.items() if bad]
    if not parts:
        return ""
    remedy = "lower evaluation.inner_lr or evaluation.inner_steps"
    if "inner_lr" in learner.refused or learner.learned_rates:
        remedy = "lower meta_lr or set optimizer.clip_norm, and train again"
    if not told["diverged_tasks"]:
        remedy = "the learner's own tasks did not"
    return f"{', '.join(parts)} (an output or loss is not finite), so these figures have no mean: {remedy}"


def summary(results: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Per metric: before the first inner step, after each, after the last; per baseline: its metrics.

    `diverged_tasks` is how many tasks have a value that is not finite: of a figure, or of any metric after the last
    step.
    """
    after = {name: values.reshape(len(values), -1)[:, -1] for name, values in results.items()}
    own = [values for name, values in after.items() if "/" not in name]
    told: dict[str, Any] = {"diverged_tasks": count_diverged(*own), "baselines": {}}
    for name, values in results.items():
        baseline, slash, metric = name.rpartition("/")
        columns = values.reshape(len(values), -1).T
        curve = [{**interval(column)._asdict(), "diverged_tasks": count_diverged(column)} for column in columns]
        if slash:
            all_of_it = [values for name, values in after.items() if name.rpartition("/")[0] == baseline]
            fresh = {"tasks": len(values), "diverged_tasks": count_diverged(*all_of_it)}
            measured = told["baselines"].setdefault(baseline, fresh)
            measured[metric] = curve[0] if values.ndim == 1 else curve
        else:
            told[metric] = {"before": curve[0], "after": curve[-1], "by_inner_step": curve}
    return told


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


def draw_curve(told: Mapping[str, Any], title: str, path: Path) -> None:
    """The adaptation curve with its baselines, as a PNG."""
    metric = "accuracy" if "accuracy" in told else "loss"
    curves = {"meta-learned": told[metric]["by_inner_step"]}
    curves |= {name.replace("_", " "): measured[metric] for name, measured in told["baselines"].items()}
    points = []
    for name, curve in curves.items():
        steps = list(enumerate(curve)) if isinstance(curve, list) else [(None, curve)]
        label = f"{name} (diverged)" if any(point.get("diverged_tasks") for _, point in steps) else name
        points += [CurvePoint(label, k, point["mean"], point["ci95"]) for k, point in steps]
    adaptation_curve(points, title, path, metric)
