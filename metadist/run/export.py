"""A trained model as a folder of its own, for use without its run, as MLflow keeps it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from metadist.checkpoint.format import Checkpoint, encode, write_synced
from metadist.config import Config, dump_config
from metadist.core.files import reason
from metadist.core.task import Task, TaskId
from metadist.run.directory import Run
from metadist.run.few_shot import FewShotLearner
from metadist.run.predictor import learner_of
from metadist.run.prepare import Prepared
from metadist.run.tracker import MODELS_FOLDER
from metadist.run.trust import computing_code
from metadist.tracking import SavedModel


def unexportable(config: Config) -> str:
    """Why a model of this job is not logged in MLflow, in a sentence; empty where it is."""
    named = ", ".join(f"{key}={name}" for key, name in computing_code(config).items() if key != "data.source")
    if not named:
        return ""
    return (
        f"the model is not logged in MLflow: whoever loads it would run code that is not metadist's ({named}); "
        "metadist.load(run, trust_code=True) uses it where that code is"
    )


def unlogged(prepared: Prepared) -> list[str]:
    """Why the models of a run will not be logged in MLflow, where that can be known before its first step: at most one
    sentence. Its initial model is described as its trained ones will be."""
    config, shapes = prepared.job.config, prepared.job.shapes
    if not config.tracking.mlflow:
        return []
    if why := unexportable(config):
        return [why]
    if prepared.engine.learner.measures:
        return [f"the model is not logged in MLflow: learner {config.learner.name} does not predict targets"]
    weights = prepared.engine.layout.named_arrays(prepared.theta) | prepared.constants
    initial = Checkpoint(0, weights, {}, dump_config(config), {}, {"shapes": shapes._asdict()})
    try:
        described(initial, "initial", Path(), prepared.job.evaluation_source(TaskId(config.evaluation.split, 0, 0)))
    except Exception as error:
        return [f"the run's models will not be logged in MLflow ({type(error).__name__}: {reason(error)})"]
    return []


def log_models(prepared: Prepared, run: Run, best: Checkpoint | None) -> None:
    """The best model, if there is one, and the last one, where that is another, go to MLflow; the first of these was
    evaluated. They are copies: what keeps one from MLflow is said, and does not end the run."""
    if not run.config.tracking.mlflow or unexportable(run.config) or prepared.engine.learner.measures:
        return  # which was said before the first step
    try:
        final = run.store.load("latest")
        models = {"best": best, "final": final} if best else {"final": final}
        if best and best.step == final.step:
            del models["final"]
        task = prepared.job.evaluation_source(TaskId(run.config.evaluation.split, 0, 0))
        evaluated = next(iter(models))
        for name, checkpoint in models.items():
            run.tracker.model(export_model(checkpoint, name, run.path, task, name == evaluated))
    except Exception as error:
        run.say(
            f"what was trained is not (all) logged in MLflow as a model ({type(error).__name__}: {reason(error)}); "
            f"`metadist.load` reads it from {run.place}"
        )


def export_model(checkpoint: Checkpoint, name: str, run_dir: Path, task: Task, evaluated: bool) -> SavedModel:
    """The model in a checkpoint, written to RUN/models/NAME without what only training needs; `task` is one of
    evaluation, of which the example of a request is a part. Raises OSError."""
    folder = run_dir / MODELS_FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in encode(replace(checkpoint, trainer={})).items():
        write_synced(folder / file, content)
    return described(checkpoint, name, folder, task, evaluated)


def described(checkpoint: Checkpoint, name: str, folder: Path, task: Task, evaluated: bool = False) -> SavedModel:
    """The model in a checkpoint, which is or will be in `folder`."""
    learner = learner_of(checkpoint, folder)
    classes, scaled = learner.shapes.classification, bool(learner.shapes.target_units)
    outputs: dict[str, tuple[str, list[int]]] = {"values": ("float64" if scaled else "float32", [-1, -1])}
    if classes:
        outputs = {"labels": ("int64", [-1]), "probabilities": ("float64", [-1, -1])}
    short = {"inner_steps": "steps", "inner_lr": "lr"}
    settings = {short[key]: value for key, value in learner.settings.items()}
    example = request(learner, task)
    return SavedModel(name, checkpoint.step, folder, learner.fields, outputs, settings, example, evaluated)


def request(learner: FewShotLearner, task: Task) -> dict[str, np.ndarray]:
    """A small request, in the units of the data as it was before import: of a task's support set an
    example of each class (three, in regression), of its query set one."""
    labels = np.asarray(task.support.targets[0])
    rows = np.unique(labels, return_index=True)[1] if learner.shapes.classification else np.arange(min(3, len(labels)))
    arrays = [np.asarray(array)[rows] for array in (*task.support.inputs, *task.support.targets)]
    arrays += [np.asarray(array)[:1] for array in task.query.inputs]
    shapes = learner.shapes
    inputs = shapes.input_units or [None] * len(shapes.inputs)
    units = [*inputs, *(shapes.target_units or [None] * len(task.support.targets)), *inputs]
    named = zip(learner.fields.items(), arrays, units, strict=True)
    return {name: _before_import(array, unit).astype(dtype) for (name, (dtype, _)), array, unit in named}


def _before_import(array: np.ndarray, unit: dict[str, Any] | None) -> np.ndarray:
    if unit is None or np.dtype(unit["dtype"]).kind != "f":
        return array
    return array.astype(np.float64) / unit["scale"] + unit["offset"]
