"""The trackers of a run: metrics.jsonl, the terminal and MLflow, opened at the start, closed with a truthful status."""

import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from metadist.checkpoint.format import Checkpoint
from metadist.config import Config
from metadist.config.load import shown
from metadist.core.errors import Interrupted
from metadist.core.files import bare, read_file, replace_text
from metadist.core.redaction import command_line
from metadist.run.identity import digest
from metadist.tracking import Status, Tracker, Trackers
from metadist.tracking.console import ConsoleTracker
from metadist.tracking.jsonl import JsonlTracker, read_metrics
from metadist.tracking.mlflow import MlflowTracker
from metadist.tracking.provenance import git_tags, version_tags

SIGNAL_GRACE_S = 2.0
RUN_ID_FILE = "mlflow_run_id"


class RunTracker:
    """The trackers of one run: metrics.jsonl, the terminal and, unless switched off, MLflow."""

    def __init__(self, config: Config, run_dir: Path, checkpoint: Checkpoint | None, quiet: bool):
        own = config.tracking
        self.config = config
        self.run_dir = run_dir
        self._console = ConsoleTracker(config.meta_steps, quiet=quiet)
        self.say = self._console.say
        if checkpoint is not None and (run_dir / "metrics.jsonl").exists():
            for row in read_metrics(run_dir / "metrics.jsonl"):
                if row.get("step", math.inf) <= checkpoint.step:
                    self._console.remember(row, row["step"])
        trackers: list[Tracker] = [JsonlTracker(run_dir / "metrics.jsonl"), self._console]
        self._mlflow: MlflowTracker | None = None
        if own.mlflow:
            name = own.run_name or run_dir.name
            run_id = known_run_id(run_dir, checkpoint, config.run_dir)
            note = partial(replace_text, run_dir / RUN_ID_FILE)
            self._mlflow = MlflowTracker(own.uri, own.experiment, name, run_id, run_dir, self.say, note)
            trackers.append(self._mlflow)
        self.tracker: Tracker = Trackers(*trackers)

    def mlflow_run_id(self) -> str | None:
        """The MLflow run to continue after a restart, once there is one."""
        return self._mlflow.wait_run_id(0) if self._mlflow else None

    def describe(self, identity: dict[str, Any], data: tuple[str, str, str] | None) -> None:
        """Send parameters, tags, the data (name, digest, path) and the configuration."""
        self.tracker.params(flat(shown(self.config)))
        self.tracker.tags(
            git_tags(Path.cwd())
            | version_tags()
            | {
                "mlflow.source.name": command_line(sys.argv),
                "mlflow.source.type": "JOB" if os.environ.get("RAY_JOB_ID") else "LOCAL",
                "metadist.identity": digest(identity),
                "metadist.run_dir": bare(self.config.run_dir or ""),
            }
        )
        if data is not None:
            self.tracker.dataset(*data, "train")
        self.tracker.artifact(self.run_dir / "config.yaml")

    def finish(self, error: type[BaseException] | None) -> None:
        """Close with the status that the end of the run has: `error` is what ended it, if anything."""
        status: Status = "FINISHED" if error is None else "FAILED"
        if error is not None and issubclass(error, Interrupted | KeyboardInterrupt):
            status = "KILLED"
            if self._mlflow:
                self._mlflow.finish(status, SIGNAL_GRACE_S)
        self.tracker.finish(status)


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
