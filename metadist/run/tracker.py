"""The trackers of a run: metrics.jsonl, the terminal and MLflow, opened at the start, closed with a truthful status."""

import json
import math
import shlex
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from metadist.checkpoint.format import Checkpoint
from metadist.config import Config, shown
from metadist.core.errors import Interrupted
from metadist.core.files import bare, lock_holder, read_file, replace_text
from metadist.core.measure import Measure
from metadist.run.identity import digest, train_command
from metadist.tracking import Status, Tracker, Trackers
from metadist.tracking.console import ConsoleTracker
from metadist.tracking.description import RunDescription, results_table
from metadist.tracking.jsonl import JsonlTracker, read_metrics
from metadist.tracking.mlflow import MlflowTracker, close_run, tracking_uri
from metadist.tracking.provenance import git_tags, job_git_tags, source_tags, submitted_job, version_tags

SIGNAL_GRACE_S = 2.0
RUN_ID_FILE = "mlflow_run_id"
MODELS_FOLDER = "models"
"""Of a run's directory, for MLflow: copies of the weights in two of its checkpoints."""


class RunTracker:
    """The trackers of one run: metrics.jsonl, the terminal and, unless switched off, MLflow."""

    def __init__(
        self, config: Config, run_dir: Path, checkpoint: Checkpoint | None, quiet: bool = False,
        measure: Measure | None = None,
    ):  # fmt: skip
        own = config.tracking
        self.config = config
        self.run_dir = run_dir
        self._console = ConsoleTracker(config.meta_steps, quiet=quiet, measure=measure)
        self.say, self.doing = self._console.say, self._console.doing
        trackers: list[Tracker] = [JsonlTracker(run_dir / "metrics.jsonl"), self._console]
        self._mlflow: MlflowTracker | None = None
        self._description: RunDescription | None = None
        if own.mlflow:
            name = own.run_name or run_dir.name
            run_id = known_run_id(run_dir, checkpoint, config.run_dir)
            note = partial(replace_text, run_dir / RUN_ID_FILE)
            self._mlflow = MlflowTracker(
                own.uri, own.experiment, name, run_id, run_dir, self.say, note, register=own.register
            )
            self._description = RunDescription(self._mlflow.tags, config.meta_steps, measure)
            trackers += [self._description, self._mlflow]
        self.tracker: Tracker = Trackers(*trackers)
        if checkpoint is not None and (run_dir / "metrics.jsonl").exists():
            self._remember(read_metrics(run_dir / "metrics.jsonl"), checkpoint.step)

    def _remember(self, rows: Iterable[Mapping[str, Any]], until: int) -> None:
        """The validations of earlier tries of this run, up to the step at which it goes on."""
        for row in rows:
            if row.get("step", math.inf) <= until:
                values = {name: value for name, value in row.items() if isinstance(value, float)}
                self._console.remember(values, row["step"])
                if self._description:
                    self._description.remember(values, row["step"])

    def mlflow_run_id(self) -> str | None:
        """The MLflow run to continue after a restart, once there is one."""
        return self._mlflow.wait_run_id(0) if self._mlflow else None

    def mlflow_page(self) -> str | None:
        """Where a browser finds the run, once it is there."""
        return self._mlflow.page if self._mlflow else None

    def describe(
        self, identity: dict[str, Any], data: tuple[str, str, str] | None, resolved: dict[str, Any], about: str,
        trust_flag: str,
    ) -> None:  # fmt: skip
        """Send parameters, tags, the data (name, digest, path), the configuration, and what the run is about."""
        self.tracker.params(flat(shown(self.config)) | flat(resolved))
        job = submitted_job()
        self.tracker.tags(
            (job_git_tags(job) or git_tags(Path.cwd()))
            | version_tags()
            | source_tags(sys.argv, job)
            | {"metadist.identity": digest(identity), "metadist.run_dir": bare(self.config.run_dir or "")}
        )
        if self._description:
            run_dir = bare(self.config.run_dir or "")
            place = shlex.quote(run_dir)
            self._description.about = about
            self._description.commands = (
                f"Continue: `{train_command(self.config, run_dir, resume=True)}`\n\n"
                f"Evaluate: `metadist evaluate {place}{trust_flag}`\n\nUse: `metadist.load({run_dir!r})`"
            )
        if data is not None:
            self.tracker.dataset(*data, "train")
        self.tracker.artifact(self.run_dir / "config.yaml")

    def conclude(self, results: dict[str, Any]) -> None:
        """The results, as tags and in the description."""
        names = ("theta_sha256", "evaluated_theta_sha256", "verdict")
        self.tracker.tags({f"metadist.{name}": str(results[name]) for name in names})
        if self._description:
            self._description.results = results_table(results)

    def finish(self, error: type[BaseException] | None) -> None:
        """Close with the status that the end of the run has: `error` is what ended it, if anything."""
        status: Status = "FINISHED" if error is None else "FAILED"
        if error is not None and issubclass(error, Interrupted | KeyboardInterrupt):
            status = "KILLED"
            if self._mlflow and self._description:
                self._description.finish(status)
                self._mlflow.finish(status, SIGNAL_GRACE_S)
        self.tracker.finish(status)


def close_stale(run_dir: Path, uri: str | None) -> str:
    """Show a run as KILLED that MLflow, at `uri` or by default where runs in that place are, still shows as running
    though its driver is gone; what was done, in a sentence, or "" for nothing. The lock is not taken: a driver that
    begins meanwhile would be refused."""
    run_id = known_run_id(run_dir, None, None)
    if run_id is None or lock_holder(run_dir):
        return ""
    return close_run(tracking_uri(uri, run_dir.absolute().parent), run_id, "KILLED")


def known_run_id(folder: Path, checkpoint: Checkpoint | None, run_dir: str | None) -> str | None:
    """The MLflow run that this run directory already has (in `folder`); a checkpoint of another does not count."""
    if (folder / RUN_ID_FILE).exists():
        return read_file(folder / RUN_ID_FILE).decode(errors="replace")
    if checkpoint and checkpoint.run["run_dir"] == bare(run_dir or ""):
        return checkpoint.run["mlflow_run_id"]
    return None


def flat(tree: dict[str, Any], path: str = "") -> dict[str, str]:
    """Nested settings as {"dotted.key": text}; lists as JSON, absent values as "null"."""
    settings: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            settings |= flat(value, f"{path}{key}.")
        else:
            settings[path + key] = value if isinstance(value, str) else json.dumps(value)
    return settings
