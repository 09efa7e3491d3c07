"""Models in MLflow: a trained model logged with its run, and registered under a name where that is asked for."""

import logging
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from metadist.tracking import SavedModel

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.models import ModelSignature

SCRIPT = Path(__file__).with_name("logged_model.py")
REQUIRED = ("metadist", "mlflow", "numpy", "torch", "safetensors", "pydantic", "pyarrow")
ALIAS = "best"


def log_model(
    client: "MlflowClient", run_id: str, model: SavedModel, metrics: Iterable["Metric"], register: str | None
) -> None:
    """Log the model, whole or as failed. `metrics`: those of the run that are this model's figures. The one that was
    evaluated becomes a version of the registered model `register`, with the alias `best`."""
    from mlflow.entities import LoggedModelOutput, Metric

    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    experiment = client.get_run(run_id).info.experiment_id
    settings = {name: f"{value:g}" for name, value in model.settings.items()}
    logged = client.create_logged_model(experiment, model.name, run_id, params=settings, model_type="few-shot")
    try:
        _send_files(client, run_id, model, logged.model_id)
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")  # else it would be shown as pending for ever
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, model.step)])
    own = [Metric(m.key, m.value, m.timestamp, m.step, logged.model_id, run_id=run_id) for m in metrics]
    client.log_batch(run_id, metrics=own)  # equal to the run's own to the millisecond, they are not there twice
    if register and model.evaluated:
        served = client.tracking_uri.startswith("http")
        source = f"models:/{logged.model_id}" if served else logged.artifact_location  # a database looks up no models
        _register(client, register, run_id, source, logged.model_id)


def _send_files(client: "MlflowClient", run_id: str, model: SavedModel, model_id: str) -> None:
    from mlflow.models import Model
    from mlflow.pyfunc import save_model

    with tempfile.TemporaryDirectory() as folder:
        place = str(Path(folder, "model"))
        save_model(
            place,
            python_model=str(SCRIPT),
            artifacts={"checkpoint": str(model.folder)},
            signature=signature(model),
            input_example=dict(model.example),
            pip_requirements=[f"{package}=={version(package).partition('+')[0]}" for package in REQUIRED],
            mlflow_model=Model(run_id=run_id, model_id=model_id),
        )
        for file in filter(Path.is_file, Path(place).rglob("*")):
            file.chmod(0o600)  # the script would stay as readable as it is where metadist is installed
        client.log_model_artifacts(model_id, place)


def signature(model: SavedModel) -> "ModelSignature":
    """Its inputs, outputs and settings, for people and for the parsing of a request's parameters. MLflow does not check
    inputs by it (as where it comes from a type hint): its errors would not name the field, `logged_model.py`'s do."""
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    inputs, outputs = (
        Schema([TensorSpec(np.dtype(dtype), tuple(shape), name) for name, (dtype, shape) in fields.items()])
        for fields in (model.inputs, model.outputs)
    )
    kinds = {int: DataType.long, float: DataType.double}
    params = [ParamSpec(name, kinds[type(value)], value) for name, value in model.settings.items()]
    found = ModelSignature(inputs, outputs, *([ParamSchema(params)] if params else []))
    found._is_signature_from_type_hint = True
    return found


def _register(client: "MlflowClient", name: str, run_id: str, source: str, model_id: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = client.create_model_version(name, source, run_id, await_creation_for=0, model_id=model_id)
    client.set_registered_model_alias(name, ALIAS, made.version)
