"""Finished runs beside one another."""

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from metadist.core.errors import InputError
from metadist.core.files import bare, read_file
from metadist.core.measure import Measure
from metadist.evaluation.comparison import Difference, Measured, difference
from metadist.evaluation.figures import Compared, comparison
from metadist.run.mirror import run_file

MOST_BYTES = 1 << 30


def compare(runs: Sequence[str], figure: str | Path | None = None) -> list[dict[str, Any]]:
    """Runs, or evaluations of them, beside the first.

    Args:
        runs: run directories or URIs, or folders that `metadist evaluate` has left.
        figure: where to write a PNG of the comparison.

    Returns one row each: run, learner, metric, higher_is_better, mean, ci95, tasks; and, but for the first, `better`
    (how much better it is than the first, in the metric's unit, with `better_ci95`), `word` (ahead, level, behind,
    unknown, or "not comparable" where its data is other), `paired_tasks` and, where it is not paired, `unpaired`, the
    reason. NaN where a task diverged.

    Raises InputError where a folder has no results that can be compared; it says what to type.

    Example:
        >>> compare(["runs/maml", "runs/protonet"])[1]["word"]  # doctest: +SKIP
        'ahead'
    """
    found = [_results(run) for run in runs]
    measured = [_measured(run, results) for run, results in zip(runs, found, strict=True)]
    if len({each.measure for each in measured}) > 1:
        named = (
            f"{run} {each.measure.name}, where {each.measure.better} is better"
            for run, each in zip(runs, measured, strict=True)
        )
        raise InputError(f"runs that measure different things cannot be compared: {', '.join(named)}")
    rows = [_row(*each, measured[0] if n else None) for n, each in enumerate(zip(runs, found, measured, strict=True))]
    if figure is not None:
        title = ", ".join(dict.fromkeys(str(row["data"]) for row in rows))
        comparison([_drawn(row) for row in rows], title, Path(figure), measured[0].measure)
    return rows


def _results(run: str) -> dict[str, Any]:
    path = run_file(run, "results.json")
    try:
        results = json.loads(read_file(path))
    except FileNotFoundError:
        raise InputError(f"{run} has no results.json: name a run that has ended, or its evaluation") from None
    except (OSError, ValueError) as error:
        raise InputError(f"the results.json of {run} cannot be read ({error})") from None
    if not isinstance(results, dict) or not isinstance(results.get("tasks_of"), dict):
        raise InputError(
            f"{run} was evaluated before its tasks were kept for comparisons, or not to the end: type `metadist "
            f"evaluate {shlex.quote(run)}`, and compare the folder that it prints"
        )
    return results


def _measured(run: str, results: dict[str, Any]) -> Measured:
    """The figures of its tasks. Raises InputError where tasks.arrow does not have those of results.json."""
    try:
        measure = Measure.of(results)
        metric = measure.name
        steps = len(results[metric]["by_inner_step"]) - 1
        table = pa.ipc.open_file(pa.BufferReader(read_file(run_file(run, "tasks.arrow"), MOST_BYTES))).read_all()
        values = table[f"{metric}_after_{steps}"].to_numpy().astype(np.float64)
        results[metric]["after"] = {
            name: math.nan if results[metric]["after"][name] is None else float(results[metric]["after"][name])
            for name in ("mean", "ci95")
        }
        results["protocol"]["learner"] = str(results["protocol"]["learner"])
        results["tasks_of"]["data"] = str(results["tasks_of"].get("data"))
    except FileNotFoundError:
        raise InputError(f"{run} has no tasks.arrow, the figures of its tasks: evaluate it again") from None
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"the results.json and tasks.arrow of {run} do not fit ({error!r}): evaluate it again"
        ) from None
    return Measured(measure, values, results["tasks_of"])


def _row(run: str, results: dict[str, Any], own: Measured, reference: Measured | None) -> dict[str, Any]:
    learner = results["protocol"]["learner"]
    row = {"run": bare(run), "data": own.tasks["data"], "learner": learner, "metric": own.measure.name}
    row["higher_is_better"] = own.measure.better == "higher"
    row |= {**results[own.measure.name]["after"], "tasks": len(own.values)}
    if reference is not None:
        found: Difference = difference(own, reference)
        row |= {"better": found.better, "better_ci95": found.ci95, "word": found.word, "paired_tasks": found.tasks}
        row |= {"unpaired": found.why} if found.why else {}
    return row


def _drawn(row: dict[str, Any]) -> Compared:
    label = f"{Path(row['run']).name}\n({row['learner']})"
    return Compared(label, row["mean"], row["ci95"], row.get("better", math.nan), row.get("better_ci95", math.nan),
                    "unpaired" not in row)  # fmt: skip
