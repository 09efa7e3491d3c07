"""The figures of an evaluation as metrics, tags and files of a tracker: the run's, or one of its own."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from metadist.config import shown
from metadist.core.errors import Interrupted
from metadist.core.files import replace_text
from metadist.core.measure import BUILT_IN, Measure
from metadist.run.mirror import run_file, working_folder
from metadist.run.prepare import Prepared
from metadist.run.tracker import RUN_ID_FILE, flat, known_run_id
from metadist.tracking import Status, Tracker, Trackers
from metadist.tracking.description import DESCRIPTION, results_table
from metadist.tracking.jsonl import JsonlTracker
from metadist.tracking.mlflow import MlflowTracker, tracking_uri


@contextmanager
def nested_tracker(
    prepared: Prepared, run: str | Path, name: str, folder: Path, followed: bool, say: Callable[[str], None]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that takes the summary of an evaluation `name` of a run, whose files are in `folder`; where that run
    is in MLflow, it is shown as a run nested in it. `followed`: the job's `tracking.uri` is the user's own, or
    trusted."""
    config, folder_of_run = prepared.job.config, working_folder(str(run))
    trackers: list[Tracker] = []
    parent, uri = known_run_id(run_file(run, RUN_ID_FILE).parent, None, None), config.tracking.uri
    if config.tracking.mlflow and parent and not followed:
        say(f"not shown in MLflow: only the saved run names tracking.uri={uri}: give it yourself, or --trust-code")
    elif config.tracking.mlflow and parent:
        title = f"{config.tracking.run_name or folder_of_run.name} {name.rpartition('/')[2]}"
        note = partial(replace_text, folder / RUN_ID_FILE)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        trackers = [
            JsonlTracker(folder / "metrics.jsonl"),
            MlflowTracker(
                tracking_uri(uri, folder_of_run.absolute().parent), config.tracking.experiment, title,
                known_run_id(folder, None, None), folder, say, note, parent,
            ),
        ]  # fmt: skip
    tracker = Trackers(*trackers)
    status: Status = "FAILED"
    tracker.params(flat(shown(config)) | flat(prepared.resolved()))
    try:
        yield lambda summary: log_evaluation(tracker, summary, folder)
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


def log_evaluation(tracker: Tracker, summary: Mapping[str, Any], folder: Path) -> None:
    """Send an evaluation of its own: the adaptation curve, with the inner step as the step; the results; the files."""
    split, metric = summary["protocol"]["split"], Measure.of(summary).name
    curve = summary[metric]["by_inner_step"]
    for k, point in enumerate(curve):
        values = {f"{split}/{metric}": point["mean"], f"{split}/{metric}_ci95": point["ci95"]}
        tracker.metrics(values if k + 1 < len(curve) else final_metrics(summary), k)
    names = ("evaluated_step", "evaluated_theta_sha256", "verdict")
    tags = {f"metadist.{name}": str(summary[name]) for name in names}
    tracker.tags({**tags, DESCRIPTION: results_table(summary)})
    for file in ("results.json", "tasks.arrow", "adaptation_curve.png", *summary.get("figures", [])):
        tracker.artifact(folder / file)


def final_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an evaluation by metric name: `test/accuracy`, `test/accuracy_ci95`, `test/baseline/ridge`, ...,
    with the metrics of the user's own beside the measure of success."""
    split, metric = summary["protocol"]["split"], Measure.of(summary).name
    values = {f"{split}/diverged_tasks": float(summary["diverged_tasks"])}
    for name, figures in summary.items():
        if isinstance(figures, Mapping) and "by_inner_step" in figures and (name == metric or name not in BUILT_IN):
            after = figures["after"]
            values |= {f"{split}/{name}": after["mean"], f"{split}/{name}_ci95": after["ci95"]}
    if summary["begun"] == "before adaptation":
        values[f"{split}/{metric}_before"] = summary[metric]["before"]["mean"]
    for name, measured in summary["baselines"].items():
        point = measured[metric][-1] if isinstance(measured[metric], list) else measured[metric]
        values[f"{split}/baseline/{name}"] = point["mean"]
    return values
