"""What the bits of a run depend on, whether it may be continued under another configuration, and what it is called."""

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from typing import Any

import numpy as np
import torch

from metadist.config import Config, shown
from metadist.config.schema import DataConfig
from metadist.core.errors import InputError, is_submitted
from metadist.core.files import bare
from metadist.core.measure import Measure
from metadist.core.redaction import redacted_settings
from metadist.core.task import TaskId
from metadist.engine import Engine
from metadist.run.auto import aggregation, chunk_size, worker_device
from metadist.run.build import Job
from metadist.run.trust import trust_flag

FREE = {"run_dir", "num_workers", "max_time_s", "fleet", "evaluation", "checkpoint", "tracking", "meta_steps"}
"""Settings that may change when a run is continued; under a schedule, meta_steps then counts as drift."""
JUDGED = {*FREE, "seed", "data", "engine"}
"""Settings that may be others when a finished run is evaluated again."""


def run_identity(job: Job, engine: Engine) -> dict[str, Any]:
    """The identity of a run, within which theta is the same to the bit whatever the number of workers. Plain values."""
    config, dataset = job.config, job.dataset
    return {
        "settings": bound_settings(config),
        "scheduled_steps": None if config.optimizer.schedule == "constant" else config.meta_steps,
        "data_digest": dataset.digest if dataset else None,
        "engine": asdict(engine.method),
        "chunk_size": chunk_size(config, engine),
        "aggregate": aggregation(config, engine),
        "threads": config.fleet.threads_per_worker,
        "metadist": metadata.version("metadist"),
        "torch": torch.__version__,
        "device": engine.fingerprint() if worker_device(config) == "cpu" else "GPU",
    }


def data_title(config: Config) -> str:
    """The data's name, for people."""
    data = config.data
    return data.family or (bare(data.path).rstrip("/").rpartition("/")[2] if data.path else data.source or "")


def figure_title(config: Config) -> str:
    """Data, learner, run: what the figures of a run are called."""
    run = bare(config.run_dir or "").rstrip("/").rpartition("/")[2]
    return ", ".join(filter(None, [data_title(config), config.learner.name, config.tracking.run_name or run]))


def evaluate_command(config: Config, run: str) -> str:
    """What evaluates the run at `run` again."""
    return f"metadist evaluate {shlex.quote(run)}{trust_flag(config)}"


def train_command(config: Config, run: str, resume: bool = False) -> str:
    """What trains by the settings of the run at `run`, to be followed by changes to them; with `resume` from where that
    run is. A submitted job's user has its file, and types `metadist submit`, which always goes on from there."""
    if is_submitted():
        return "metadist submit JOB.yaml --address URL"
    file = shlex.quote(f"{run.rstrip('/')}/config.yaml")
    return f"metadist train {file}{trust_flag(config)}{' --resume auto' if resume else ''}"


def check_measure(progress: Mapping[str, Any], job: Job) -> None:
    """Raises InputError where the run would be judged otherwise than before: its best checkpoint is by that."""
    saved = progress.get("measure")
    before = Measure.parse(saved) if saved else Measure.of({"accuracy": 0} if job.shapes.classification else {})
    if progress.get("best") is not None and before != job.measure:
        raise InputError(
            f"the run is judged by {before.name} ({before.better} is better) so far, and its best checkpoint is the "
            f"best by that: leave evaluation.metrics and evaluation.better as they were, or give another run_dir "
            f"(`metadist evaluate` judges what is trained by {job.measure.name})"
        )


def evaluation_tasks(job: Job) -> dict[str, Any]:
    """All that the tasks of evaluation depend on, by name, and a hash of the first of them: where two jobs agree in it,
    their tasks of one number are the same."""
    config, own, task = job.config, job.config.evaluation, job.config.task
    content = hashlib.sha256()
    for part in job.evaluation_source(TaskId(own.split, 0, 0)):
        for array in (np.asarray(each) for arrays in part for each in arrays):
            content.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    found = {"data": data_title(config), "digest": None, "split": own.split, "seed": config.seed}
    if job.dataset is not None:
        found["digest"] = job.dataset.digest
        found |= {"ways": own.ways or task.ways} if job.shapes.classification else {}
        found |= {"shots": own.shots or task.shots, "queries": own.queries or task.queries}
        found |= {"within_parent": task.within_parent, "permute_labels": task.permute_labels}
    return {**found, "steps_per_round": task.steps_per_round, "first_task": content.hexdigest()[:16]}


def digest(identity: dict[str, Any]) -> str:
    """A short name for an identity (16 hex digits)."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def bound_settings(config: Config) -> dict[str, Any]:
    """The settings that theta depends on. Where the data lies is not what it holds."""
    settings = {key: value for key, value in shown(config).items() if key not in FREE}
    settings["data"].pop("path")
    settings["engine"].pop("gradient_check")
    return settings


def check_settings(before: dict[str, Any], config: Config) -> None:
    """Raise InputError where a run would go on under other settings, key by key."""
    changed = _differences(_completed(before["settings"]), bound_settings(config))
    if changed:
        raise InputError(
            f"this is not the run in the checkpoint; changed: {'; '.join(changed)}: "
            "change it back, or start another run with its own run_dir"
        )


def check_evaluation(before: dict[str, Any], config: Config) -> None:
    """Raise InputError where a run would be evaluated under settings of training that were not its own."""
    trained, now = (
        {key: value for key, value in settings.items() if key not in JUDGED}
        for settings in (_completed(before["settings"]), bound_settings(config))
    )
    if changed := _differences(trained, now):
        raise InputError(
            f"a run is evaluated as it was trained; changed: {'; '.join(changed)}: leave it out "
            "(evaluation, data, engine, fleet and seed may be others)"
        )


def drift(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What makes a continued run differ from an uninterrupted one, in words. Raises InputError where it is the data."""
    if before["data_digest"] != now["data_digest"]:
        raise InputError(
            f"the data is not what the run began with (digest {before['data_digest']}, now {now['data_digest']}): "
            "set data.path to that, or start another run with its own run_dir"
        )
    return [f"{key} {before[key]} -> {now[key]}" for key in now if key != "settings" and before.get(key) != now[key]]


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    """A run's settings, with those that did not exist when it began at their defaults: what was done without them."""
    completed = redacted_settings(settings)
    for key, default in bound_settings(Config.model_construct(data=DataConfig.model_construct())).items():
        own = settings.get(key, default)
        completed[key] = {**default, **own} if isinstance(default, dict) and isinstance(own, dict) else own
    return completed


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [d for key in keys for d in _differences(before.get(key), now.get(key), f"{path}.{key}".strip("."))]
    return [] if before == now else [f"{path} {before!r} -> {now!r}"]
