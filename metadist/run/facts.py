"""What advice is given from: the facts of a run that was evaluated."""

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from metadist.evaluation.advice import FEW, Facts
from metadist.evaluation.verdict import Comparison
from metadist.learners import LEARNERS, Learner, MetaSGD
from metadist.run.identity import evaluate_command, train_command
from metadist.run.plugins import model_name
from metadist.run.prepare import Prepared
from metadist.tracking.jsonl import read_metrics

SMALL = 64 * 64
"""Numbers of an example, up to which a wide layer of all of them is tried."""
WIDE = 1024


def facts(
    prepared: Prepared, summary: dict[str, Any], found: Comparison, run: str, metrics: Path, pooled: str = ""
) -> Facts:
    """What advice is given from, of the run at `run`, which stands to the pooled baseline as `pooled` says."""
    job, measure = prepared.job, prepared.job.measure
    config, learner = job.config, job.evaluation_engine("cpu").learner
    curve = summary[measure.name]["by_inner_step"]
    rated = "inner_lr" not in learner.refused and not learner.learned_rates
    groups = job.training_groups()
    return Facts(
        measure=measure,
        baseline=found.baseline,
        curve=[point["mean"] for point in curve],
        ci95=curve[-1]["ci95"],
        validation=_validations(metrics, measure.name, config.meta_steps),
        meta_steps=config.meta_steps,
        inner_lr=learner.inner_lr if rated else None,
        smaller_rates=smaller_rates(learner),
        descends="inner_steps" not in learner.refused,
        closed_form=closed_form(prepared, groups),
        groups=groups,
        columns=columns(prepared),
        pictures=bool(config.data.path) and [len(shape) for shape in job.shapes.inputs] == [3],
        pooled=pooled,
        evaluate=evaluate_command(config, run),
        train=f"{train_command(config, run)} run_dir={shlex.quote(run.rstrip('/') + '_next')}",
        resume=train_command(config, run, resume=True),
    )  # fmt: skip


def _validations(metrics: Path, metric: str, last: int) -> list[tuple[int, float, float]]:
    """The validations of a run by step: those that were done again count once."""
    rows = read_metrics(metrics) if metrics.exists() else []
    found = {
        row["step"]: (row["step"], row[f"validation/{metric}"], row[f"validation/{metric}_ci95"])
        for row in rows
        if row["step"] <= last and np.isfinite(row.get(f"validation/{metric}", np.nan))
    }
    return [found[step] for step in sorted(found)]


def inner_rate(learner: Learner) -> str:
    """The setting of how far an inner step goes; "" where the learner takes none."""
    if "inner_lr" not in learner.refused:
        return "learner.inner_lr"
    return "learner.highest_rate" if isinstance(learner, MetaSGD) else ""


def smaller_rates(learner: Learner) -> str:
    """Settings of a tenth of a learner's inner rates, learned ones as they begin; "" where it has none."""
    if isinstance(learner, MetaSGD):
        low, high = learner.lowest_rate / 10, learner.highest_rate / 10
        return f"learner.lowest_rate={low:.3g} learner.highest_rate={high:.3g}"
    return f"learner.inner_lr={learner.inner_lr / 10:.3g}" if inner_rate(learner) else ""


def columns(prepared: Prepared) -> tuple[float, float] | None:
    """Of the columns of numbers in training tasks, the smallest deviation there is (of those that vary) and the largest
    root of a mean square; None where inputs are texts or pictures."""
    job, kinds = prepared.job, "f"
    if job.shapes.tokens or prepared.engine.learner.measures:
        return None
    if model_name(job.config.model, job.shapes) == "mlp":
        kinds = "fiu"  # elsewhere whole numbers may be those of things, for an embedding
    tasks = [part.inputs for task in prepared.chunk for part in task]
    identifiers = job.shapes.vocabularies or [None] * len(job.shapes.inputs)
    numbers = [
        np.concatenate([np.asarray(array, np.float64).reshape(len(array), -1) for array in field])
        for size, *field in zip(identifiers, *tasks, strict=True)
        if size is None and field[0].ndim <= 2 and np.asarray(field[0]).dtype.kind in kinds
    ]
    if not numbers:
        return None
    deviations = np.concatenate([rows.std(axis=0) for rows in numbers])
    sizes = np.concatenate([np.sqrt(np.square(rows).mean(axis=0)) for rows in numbers])
    vary = deviations > 1e-12 * sizes
    return (float(deviations[vary].min()), float(sizes[vary].max())) if vary.any() else None


def closed_form(prepared: Prepared, groups: int | None) -> str:
    """The settings of a learner in closed form, with what of the job's own it would not take set to null; "" where the
    model has no features to make a head for.

    Where few classes are known it gets a wide layer of all numbers: features that a deep network learns of them do not
    tell others apart.
    """
    job, learner = prepared.job, prepared.engine.learner
    if not learner.model.splits or learner.measures:
        return ""
    few, shapes = groups is not None and groups < FEW, job.shapes
    name = "protonet" if shapes.classification and not few else "r2d2"
    kind, own = LEARNERS[name][0], job.config.learner.options
    taken = {field.name for field in fields(kind)} - set(kind.refused)
    dropped = [f"learner.{key}=null" for key in own if key not in taken]
    evaluation = {key: getattr(job.config.evaluation, key) for key in ("inner_lr", "inner_steps")}
    dropped += [f"evaluation.{key}=null" for key, value in evaluation.items() if value is not None]
    model = []
    if few and not shapes.tokens and sum(map(np.prod, shapes.inputs)) <= SMALL:
        model = ["model.name=mlp", f"'model.hidden=[{WIDE}]'"]
        model += [f"model.{key}=null" for key in job.config.model.options if key != "hidden"]
    return " ".join([f"learner.name={name}", *dropped, *model])
