"""What a run directory holds, and whether a run may begin or go on in it."""

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from metadist.checkpoint.format import Checkpoint, local_folder
from metadist.checkpoint.store import CheckpointStore
from metadist.config import Config, dump_config
from metadist.config.load import parse_config
from metadist.core.errors import InputError
from metadist.core.files import finite, read_file, reason, replace_text
from metadist.core.redaction import redacted
from metadist.run.identity import bound_settings
from metadist.run.predictor import config_file, read_checkpoint, saved_place

_PACKAGES = "working_dir_files"
TARGET_FILE = "target_workers"
MOST_WORKERS = 100_000


def located(config: Config) -> Config:
    """The configuration with its paths made absolute, so that it means the same from anywhere."""
    data, model, place = config.data, config.model, config.checkpoint.location
    changes: dict[str, Any] = {"run_dir": _absolute("run_dir", config.run_dir or "runs/run")}
    if data.path:
        changes["data"] = data.model_copy(update={"path": _absolute("data.path", data.path)})
    if model.weights:
        changes["model"] = model.model_copy(update={"weights": _absolute("model.weights", model.weights)})
    if place and "://" not in place:
        place = _absolute("checkpoint.location", place)
        changes["checkpoint"] = config.checkpoint.model_copy(update={"location": place})
    return config.model_copy(update=changes)


def _absolute(setting: str, path: str) -> str:
    absolute = str(Path(path).absolute())
    try:
        absolute.encode()
    except UnicodeEncodeError:
        raise InputError(f"{setting}={absolute!r} is not UTF-8, as every path here must be: rename it") from None
    return absolute


def check_lasting(config: Config) -> None:
    """Raises InputError where a job that was submitted to a cluster would leave its run, or has its initial weights, in
    the copy of its working directory: that is thrown away, and has another name after the smallest change."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return
    places = {
        "run_dir": config.run_dir,
        "checkpoint.location": config.checkpoint.location,
        "model.weights": config.model.weights,
    }
    lost = [f"{setting}={place}" for setting, place in places.items() if place and _PACKAGES in Path(place).parts]
    if lost:
        raise InputError(
            f"{' and '.join(lost)} would vanish with the job, since relative paths of a submitted job lie in a copy of "
            "its working directory: give absolute paths on storage that all nodes share (checkpoint.location may also "
            "be a URI such as s3://...)"
        )


def find_checkpoint(config: Config, run_dir: Path, resume: str | Path | None) -> Checkpoint | None:
    """Where a run goes on from, or None at its start. Raises InputError when the directory is in use unasked."""
    if resume is not None and resume != "auto":
        checkpoint = read_checkpoint(resume, "latest", saved_place(resume, trust_code=True))
        if (run_dir / "config.yaml").exists() and not is_own(checkpoint, run_dir):
            raise InputError(
                f"{run_dir} already holds another run: --resume auto continues that one; set run_dir=... to go on "
                f"from {resume} in a place of its own"
            )
        store = CheckpointStore(location(config, run_dir))
        if config.checkpoint.location and store.steps():
            _check_owner(store.location, run_dir, store.load("latest"))
        return checkpoint
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"run_dir={run_dir} is a file: choose another")
    if (run_dir / "config.yaml").exists() and resume is None:
        raise InputError(
            f"{run_dir} already holds a run: add --resume auto to continue it, or run_dir=... to start another"
        )
    try:
        store = CheckpointStore(location(config, run_dir))
        found = store.steps()
    except OSError as error:
        raise InputError(f"checkpoints cannot be kept in {location(config, run_dir)}: {error}") from error
    if not found:
        lost = store.report_incomplete()
        if lost and local_folder(store.location):  # where a checkpoint appears whole or not at all
            raise InputError(
                f"no checkpoint in {store.location} is complete: restore the meta.json of {lost[-1]}, or remove these "
                "directories, then --resume auto computes the run again from its start"
            )
        return None
    if resume is None:
        raise InputError(f"{location(config, run_dir)} holds another run's checkpoints: set checkpoint.location anew")
    checkpoint = store.load("latest")
    if config.checkpoint.location:
        _check_owner(store.location, run_dir, checkpoint)
        return checkpoint
    return replace(checkpoint, run={**checkpoint.run, "run_dir": str(run_dir)})  # even if it was moved


def _check_owner(place: str, run_dir: Path, latest: Checkpoint) -> None:
    """Raises InputError where the place that a job gives for its checkpoints holds those of a run in another directory,
    which this one neither is nor was before it was moved."""
    owner = latest.run.get("run_dir")
    before = _job_there(run_dir / "config.yaml")
    if owner != str(run_dir) and (before is None or before.run_dir != owner):
        raise InputError(
            f"{place} holds the checkpoints of the run in {owner}: set checkpoint.location to a place of this "
            f"run's own, or run_dir={shlex.quote(str(owner))} to go on with that one"
        )


def begin_directory(config: Config, run_dir: Path, checkpoint: Checkpoint | None) -> None:
    """The run directory with its config.yaml; a run that starts anew forgets what an earlier try noted, but for the
    tasks of each step where the job is the same and its checkpoints are gone, or were yet to come."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        text, path = dump_config(config), run_dir / "config.yaml"
        forgotten = ["results.json"] if checkpoint else ["results.json", "metrics.jsonl"]
        before = None if checkpoint else _job_there(path)
        if not checkpoint and (before is None or bound_settings(before) != bound_settings(config)):
            forgotten += ["journal.jsonl", TARGET_FILE]
        if before and before.num_workers != config.num_workers:
            forgotten.append(TARGET_FILE)
        for name in forgotten:
            (run_dir / name).unlink(missing_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise InputError(
            f"run_dir={run_dir} cannot be written to ({reason(error.__cause__ or error)}): choose another"
        ) from None


def _job_there(path: Path) -> Config | None:
    """The configuration in config.yaml, where that is one."""
    try:
        return parse_config(read_file(path).decode(), str(path))
    except (FileNotFoundError, UnicodeDecodeError, InputError):
        return None


def first_target(config: Config, run_dir: Path, checkpoint: Checkpoint | None) -> int:
    """How many workers to begin with: what the job says; if it says what it said before, as many as there were."""
    if checkpoint:
        before = parse_config(checkpoint.config, "the checkpoint's configuration")
        if before.num_workers == config.num_workers:
            return checkpoint.trainer["target"]
        (run_dir / TARGET_FILE).unlink(missing_ok=True)
    return config.num_workers


def is_own(checkpoint: Checkpoint | None, run_dir: Path) -> bool:
    """Whether a checkpoint was written by the run of this directory, rather than by one that it goes on from."""
    return checkpoint is not None and checkpoint.run.get("run_dir") == str(run_dir)


def location(config: Config, run_dir: Path) -> str:
    """Where a run's checkpoints are."""
    return config.checkpoint.location or str(run_dir / "checkpoints")


def scale(run_dir: str | Path, target: int) -> None:
    """Ask a running job for `target` workers; it follows from its next meta-step."""
    path = config_file(run_dir).parent
    if not 1 <= target <= MOST_WORKERS:
        raise InputError(f"a run has between 1 and {MOST_WORKERS} workers, not {target}")
    replace_text(path / TARGET_FILE, str(target))


def asked_target(run_dir: Path) -> int | None:
    """The number of workers asked for; None where what the file holds is none."""
    try:
        target = int(read_file(run_dir / TARGET_FILE))
    except (OSError, ValueError):
        return None
    return target if 1 <= target <= MOST_WORKERS else None


def write_json(told: Any, path: Path) -> None:
    """Results as strict JSON; a number that is not finite is null."""
    replace_text(path, json.dumps(finite(redacted(told)), indent=2, allow_nan=False) + "\n")
