"""What is printed of runs that have ended: results as tables, and what to type next."""

import math
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metadist.cli.tables import table
from metadist.core.files import is_uri, join
from metadist.core.measure import Measure
from metadist.core.redaction import redact
from metadist.tracking.description import figure

if TYPE_CHECKING:  # so that --help needs no torch
    from metadist.config import Config


OTHER_DATA = "not comparable"
"""The word of a run whose data is other than the first one's."""


def report(results: dict[str, Any]) -> str:
    """The results of a run as a table for people."""
    protocol = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in results["protocol"].items())
    lines = []
    if "theta_sha256" in results:
        lines.append(f"theta      {results['theta_sha256']} after {results['meta_steps']} steps")
    lines.append(f"evaluated  {results['evaluated_theta_sha256']} (step {results['evaluated_step']})")
    lines += [f"protocol   {protocol}", "", table(list(_figures(results, Measure.of(results))), left=2)]
    if "few_tasks" in results:
        lines += ["", f"note       {results['few_tasks']}"]
    lines += ["", f"verdict    {results['verdict']}"]
    lines += [f"try        {advice}" for advice in results.get("advice", [])]
    if "divergence" in results:
        lines += ["", f"diverged   {results['divergence']}"]
    if losses := results.get("online", {}).get("losses"):
        rounds = f"{len(losses)} rounds, loss {losses[0]:.4f} in the first, {losses[-1]:.4f} in the last"
        lines += ["", f"online     {rounds}, regret {results['online']['regret']:.4f}"]
    return "\n".join(lines)


def _figures(results: dict[str, Any], measure: Measure) -> Iterator[dict[str, str]]:
    """A row for each inner step and each baseline."""
    name, head, tasks = "", f"{measure.name}, 95 % interval", results["protocol"].get("tasks", 0)
    for k, point in enumerate(results[measure.name]["by_inner_step"]):
        label = f"after {k} inner step{'s' * (k > 1)}" if k else results["begun"]
        yield {name: label, head: figure(measure, point), "tasks": str(tasks)}
    for baseline, measured in results["baselines"].items():
        points = measured[measure.name] if isinstance(measured[measure.name], list) else [measured[measure.name]]
        for k, point in enumerate(points):
            label = baseline.replace("_", " ") + (f", {k} steps" if len(points) > 1 else "")
            yield {name: label, head: figure(measure, point), "tasks": str(measured["tasks"])}


def compared(rows: list[dict[str, Any]]) -> str:
    """The runs as a table, and why some are not paired with the first."""
    first = rows[0]["run"]
    measure = Measure(rows[0]["metric"], "higher" if rows[0]["higher_is_better"] else "lower")
    points = ", points" if measure.scale > 1 else ""

    def figure(mean: float, ci95: float, signed: bool = False) -> str:
        if math.isnan(mean):
            return "none: tasks diverged"
        if not signed:
            return measure.text(mean, ci95)
        by, digits = measure.scale, measure.digits
        return f"{by * mean:+.{digits}f} ± {by * ci95:.{digits}f}"

    shown = [
        {
            "run": row["run"],
            **({"data": row["data"]} if len({row["data"] for row in rows}) > 1 else {}),
            "learner": row["learner"],
            measure.name: figure(row["mean"], row["ci95"]),
            "tasks": str(row["tasks"]),
            f"better{points}": figure(row["better"], row["better_ci95"], signed=True)
            if "better" in row
            else "the first",
            "": "" if row.get("word") == OTHER_DATA else row.get("word", ""),
        }
        for row in rows
    ]
    lines = [table(shown, left=len(shown[0]) - 4)]
    lines += [_unpaired(row, first) for row in rows if "unpaired" in row]
    pairs = {row["paired_tasks"] for row in rows if row.get("paired_tasks")}
    lines += [f"paired over {' and '.join(map(str, sorted(pairs)))} tasks"] if pairs else []
    return "\n".join(lines)


def _unpaired(row: dict[str, Any], first: str) -> str:
    if row["word"] == OTHER_DATA:
        return (
            f"{row['run']} is on other data: {OTHER_DATA} with {first} ({row['unpaired']}); the difference of the two "
            "means may be that of the data"
        )
    return (
        f"{row['run']} is not paired with {first}, since their tasks are others ({row['unpaired']}): its interval is "
        "that of a difference of two means, which is wider"
    )


def next_commands(config: "Config", results: dict[str, Any]) -> str:
    """Where a trained run is, and how to evaluate and watch it."""
    from metadist.run.trust import trust_flag

    run_dir = redact(config.run_dir or "")
    steps, tasks = results["protocol"]["inner_steps"], results["protocol"].get("tasks")
    change = f"evaluation.test_tasks={2000 if tasks == 1000 else 1000}"  # other than what it was evaluated with
    if steps:
        change = f"evaluation.inner_steps={20 if steps == 10 else 10}"
    lines = [f"results    {quoted(join(run_dir, 'results.json'))}"]
    lines.append(f"evaluate   metadist evaluate {quoted(run_dir)} {change}{trust_flag(config)}")
    page = results.get("mlflow_page", "")
    if config.tracking.mlflow and not (config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")):
        database = Path(run_dir).absolute().parent / "mlflow.db"
        lines.append(f"watch      mlflow ui --backend-store-uri {shlex.quote(f'sqlite:///{database}')}")
        page = f"http://127.0.0.1:5000/{page}"
    if "mlflow_page" in results:
        lines.append(f"           {page}")
    return "\n".join(lines)


def quoted(path: str | Path) -> str:
    """A path as it is typed into a shell, from the current directory where it lies in it."""
    if is_uri(path):
        return shlex.quote(str(path))
    path = Path(path)
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))
