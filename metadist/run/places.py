"""The places that a job names, paths and URIs: absolute, of use, and there to stay."""

import os
from pathlib import Path
from typing import Any

from metadist.config import Config
from metadist.core.errors import InputError
from metadist.core.files import is_uri
from metadist.core.storage import open_location, reaching
from metadist.run.trust import check_usable

_PACKAGES = "working_dir_files"


def checked(config: Config) -> Config:
    """With absolute paths, and places that can be used."""
    config = located(config)
    check_lasting(config)
    check_tracked(config)
    places = config.run_dir, config.data.path, config.model.weights, config.checkpoint.location
    check_usable(config.tracking.uri, config.fleet.address, *places)
    return config


def located(config: Config) -> Config:
    """The configuration with its paths made absolute, so that it means the same from anywhere; URIs as they are."""
    data, model, place = config.data, config.model, config.checkpoint.location
    changes: dict[str, Any] = {"run_dir": _absolute("run_dir", config.run_dir or "runs/run")}
    if data.path:
        changes["data"] = data.model_copy(update={"path": _absolute("data.path", data.path)})
    if model.weights:
        changes["model"] = model.model_copy(update={"weights": _absolute("model.weights", model.weights)})
    if place:
        place = _absolute("checkpoint.location", place)
        changes["checkpoint"] = config.checkpoint.model_copy(update={"location": place})
    return config.model_copy(update=changes)


def _absolute(setting: str, path: str) -> str:
    if is_uri(path):
        with reaching(f"{setting}={path}"):
            open_location(path, quick=True)
        return path
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
            "its working directory: give absolute paths on storage that all nodes share, or URIs such as "
            "s3://bucket/..."
        )


def check_tracked(config: Config) -> None:
    """Raises InputError where MLflow's database would be beside a run directory that no file system has."""
    if (
        is_uri(config.run_dir or "")
        and config.tracking.mlflow
        and not (config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"))
    ):
        raise InputError(
            f"run_dir={config.run_dir} has no place for MLflow's own database: set tracking.uri or MLFLOW_TRACKING_URI "
            "to an MLflow server, or tracking.mlflow=false"
        )
