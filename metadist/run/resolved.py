"""What a run computes with where its job says `auto` or nothing, by dotted setting."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metadist.config import Config
from metadist.core.errors import InputError
from metadist.core.files import is_uri
from metadist.engine import Engine
from metadist.models import LOSSES
from metadist.run.auto import aggregation, backend, chunk_size, worker_device
from metadist.run.build import Job
from metadist.run.plugins import model_name
from metadist.run.trust import outside_code


def resolved(job: Job, engine: Engine, baselines: Sequence[str]) -> dict[str, Any]:
    """Dotted setting -> its value, of those that a job may leave open; `engine` is the run's, on any device."""
    config, own, learner = job.config, job.config.evaluation, engine.learner
    later = job.evaluation_engine("cpu").learner
    named = {name.partition(":")[2]: name for name in own.baselines or [] if ":" in name}
    chosen: dict[str, Any] = {
        "model.name": model_name(config.model, job.shapes),
        "engine.kind": engine.kind,
        "engine.differentiation": engine.method.differentiation,
        "engine.chunk_size": chunk_size(config, engine),
        "engine.aggregate": aggregation(config, engine),
        "engine.device": worker_device(config),
        "fleet.backend": backend(config, engine),
        "evaluation.baselines": [named.get(name, name) for name in baselines],
    }
    if config.loss == "auto":
        chosen["loss"] = next(name for name, loss in LOSSES.items() if loss is job.loss)
    if job.dataset is not None:
        chosen["task.scheme"] = job.dataset.kind if config.task.scheme == "auto" else config.task.scheme
        chosen["evaluation.shots"] = own.shots or config.task.shots
        chosen["evaluation.queries"] = own.queries or config.task.queries
        if job.shapes.classification:
            chosen["evaluation.ways"] = own.ways or config.task.ways
    if not config.tasks_per_worker:
        chosen["meta_batch_size"] = config.batch_size(1)
    for name in ("inner_steps", "inner_lr"):
        if name not in learner.refused:
            chosen |= {f"learner.{name}": getattr(learner, name), f"evaluation.{name}": getattr(later, name)}
    return chosen


def decided(config: Config, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Of what was `chosen`, the settings that the job leaves to metadist: `auto`, and without a value of its own."""
    given = config.model_dump(mode="json")
    sections = {key: key.split(".") for key in chosen}
    values = {key: given[s[0]] if len(s) == 1 else given[s[0]].get(s[1]) for key, s in sections.items()}
    return {key: value for key, value in chosen.items() if values[key] in (None, "auto")}


def without_run(config: Config) -> dict[str, Any]:
    """`resolved` of a job that is only looked at. Raises InputError, which says why, where that takes data that is not
    on this machine, or code outside metadist, or where the job cannot be computed."""
    path, weights = config.data.path, config.model.weights
    if code := outside_code(config):
        raise InputError(f"{', '.join(code.values())} would be run: decided when the run begins")
    if path and (is_uri(path) or not Path(path).is_dir()):
        raise InputError(f"there is no data in {path} yet: decided when the data is read")
    if weights and is_uri(weights):
        raise InputError(f"model.weights={weights} would be fetched: decided when the run begins")
    job = Job(config)
    return resolved(job, job.engine("cpu"), job.baselines())
