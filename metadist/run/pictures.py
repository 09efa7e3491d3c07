"""The figures of a run, drawn from its numbers and from one of its tasks."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from metadist.core.errors import Diverged, InputError, StorageFailed
from metadist.core.files import reason, writing
from metadist.core.measure import Measure
from metadist.core.random import LEARNER_STREAM, Draws
from metadist.core.task import Task, TaskId
from metadist.engine import Engine
from metadist.evaluation.figures import scaling, task_picture, training_curve
from metadist.run.build import Job
from metadist.run.prepare import Prepared
from metadist.tracking.jsonl import read_metrics


def draw_run(path: Path, title: str, measure: Measure) -> list[str]:
    """The training curve and, where there was more than one number of workers, the scaling; the files' names."""
    rows, files = read_metrics(path / "metrics.jsonl"), []
    with writing(path):
        if any("train/loss" in row for row in rows):
            training_curve(rows, path / "training_curve.png", title, measure)
            files.append("training_curve.png")
        if len({row["workers/alive"] for row in rows if "workers/alive" in row}) > 1:
            scaling(rows, path / "scaling.png", title)
            files.append("scaling.png")
    return files


def draw_task(
    prepared: Prepared, theta: np.ndarray, path: Path, say: Callable[[str], None], title: str = ""
) -> list[str]:
    """One task of the evaluation, where it is of pictures: its support set, and which of its queries theta [P] takes
    for which class. Computed in this process; the name of the file, if there is one. What cannot be computed so is
    said, and does not end the run."""
    job = prepared.job
    unit, *others = job.shapes.input_units or [{"dtype": ""}]
    shape = job.shapes.inputs[0]
    if others or unit["dtype"] != "uint8" or len(shape) != 3 or shape[0] not in (1, 3) or not job.shapes.classification:
        return []
    try:
        task = job.evaluation_source(TaskId(job.config.evaluation.split, 0, 0))
        confusion = _confusion(prepared, theta, task)
    except Exception as error:  # of a user's model or learner, which nothing else calls like this
        say(f"task.png is not drawn: its task cannot be computed ({type(error).__name__}: {reason(error)})")
        return []
    with writing(path):
        labels = np.asarray(task.support.targets[0])
        task_picture(task.support.inputs[0], labels, confusion, path / "task.png", title)
    return ["task.png"]


def draw_own(job: Job, engine: Engine, constants: Mapping[str, np.ndarray], theta: np.ndarray, path: Path) -> list[str]:
    """The user's figures of the first task of evaluation at theta [P], each written to `path`; their files' names.
    `engine` is the run's. Raises InputError where a function fails or gives no figure."""
    if not job.own_figures:
        return []
    own = job.evaluation_engine("cpu", job.evaluation_outputs(engine))
    own.learner.model.load_constants(constants)
    name = TaskId(job.config.evaluation.split, 0, 0)
    draws = Draws(job.config.seed, name, LEARNER_STREAM)
    weights, fasts, task = own.trajectory(torch.from_numpy(theta.copy()), job.evaluation_source(name), draws)
    for label, draw in job.own_figures.items():
        code = f"evaluation.figures.{label}={job.config.evaluation.figures[label]}"
        try:
            figure = draw(own.learner, weights, fasts, task)
            if hasattr(figure, "savefig"):
                with writing(path):
                    figure.savefig(path / f"{label}.png", format="png")
        except StorageFailed:
            raise
        except Exception as error:  # whatever a user's function raises, or matplotlib of what it drew
            raise InputError(
                f"{code} fails ({type(error).__name__}: {reason(error)}): it is called with the learner, theta by "
                f"name, the {len(fasts)} fast weights before and after each inner step and a task as tensors, and must "
                "give a Figure of matplotlib: correct the function, or leave the figure out (-v shows the traceback)"
            ) from error
        if not hasattr(figure, "savefig"):
            raise InputError(f"{code} gave a {type(figure).__name__}: it must give a Figure of matplotlib")
    return [f"{label}.png" for label in job.own_figures]


def _confusion(prepared: Prepared, theta: np.ndarray, task: Task) -> np.ndarray:
    """[ways, ways]: how many queries of each class [row] were taken for which. Raises Diverged."""
    job = prepared.job
    engine = job.evaluation_engine("cpu", job.evaluation_outputs(prepared.engine))
    engine.learner.model.load_constants(prepared.constants)
    outputs = engine.adapt(torch.from_numpy(theta.copy()), task.support)
    found = outputs(*task.query.inputs, transductive=job.config.evaluation.transductive)
    true, ways = np.asarray(task.query.targets[0]), int(np.max(task.support.targets[0])) + 1
    found = found.detach().numpy()[:, :ways]
    if not np.isfinite(found).all():  # of NaN argmax makes class 0
        raise Diverged("its outputs are not finite")
    confusion = np.zeros((ways, ways), int)
    np.add.at(confusion, (true, found.argmax(axis=1)), 1)
    return confusion
