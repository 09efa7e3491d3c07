"""A job file that suits a dataset: tasks that its splits can give, a network for its inputs, a learner's settings."""

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from metadist.config import Config
from metadist.config.yaml import commented
from metadist.core.task import TaskId
from metadist.data import Dataset, Shapes, cached, dataset_at, open_dataset
from metadist.data.description import far_from_zero
from metadist.run.build import Job
from metadist.run.learner_settings import Settings, learner_settings
from metadist.run.plugins import model_name
from metadist.run.task_sizes import TaskSizes, left_out, task_sizes

LARGE_PICTURE, MOST_WORKERS, TRAINING_QUERIES, PATIENCE = 64, 4, 5, 4
"""Pixels from which a picture is pooled; workers at first; query pictures of a class, and half the other examples, in
training, where each takes time; validations, of ten in all, that may be no better than the best."""
ORDER = ("", "optimizer", "fleet", "data", "task", "model", "learner", "evaluation")


def suited_job(place: str | None, learner: str | None = None) -> tuple[str, list[str]]:
    """YAML of a job for the dataset in a folder or at a URI (None: the built-in digits), with the reason for each
    choice; and what its user should know of the data. What it says has been tried: a task of each split, the model.

    Raises InputError where the data cannot make tasks, or where there is no such learner or it does not suit the data.
    """
    dataset = dataset_at(place) if place else open_dataset(cached("digits"))
    sizes = task_sizes(dataset)
    settings: Settings = {
        "data": {"path": (place, "")} if place else {"family": ("digits", "")},
        "task": _task(dataset, sizes),
    }
    shapes = _job(settings).shapes
    model, name = model_name(_job(settings).config.model, shapes), learner or _learner(dataset, shapes)
    settings["model"] = dict(_model(model, shapes))
    queries = min(sizes.queries, TRAINING_QUERIES if model == "conv4" else 2 * TRAINING_QUERIES)
    settings["task"]["queries"] = (queries, "Q to judge on, likewise")
    settings |= _pace(model, shapes)
    support = sizes.shots * max(1, sizes.ways)
    own = learner_settings(name, model, not shapes.classification, support, settings[""]["meta_steps"][0])
    settings["evaluation"] = _evaluation(sizes, settings)
    for section, values in own.items():
        settings[section] = {**settings.get(section, {}), **values}
    job = _job(settings)
    for split in sizes.splits:
        job.evaluation_source(TaskId(split, 0, 0))
    for make in (job.engine, job.evaluation_engine):
        make("cpu")
    notes = [*left_out(dataset, sizes, queries), *far_from_zero(dataset)]
    return _text(dataset, settings, notes), notes


def _job(settings: Settings) -> Job:
    plain = {section: {key: value for key, (value, _) in given.items()} for section, given in settings.items()}
    return Job(Config.model_validate({**plain.pop("", {}), **plain}))


def _task(dataset: Dataset, sizes: TaskSizes) -> dict[str, tuple[Any, str]]:
    chosen: dict[str, tuple[Any, str]] = {"scheme": (dataset.kind, "as the data was imported")}
    if sizes.ways:
        chosen["ways"] = (sizes.ways, sizes.why_ways)
    each = "each class" if sizes.ways else "a task"
    chosen["shots"] = (sizes.shots, f"K examples of {each} to adapt on: {sizes.why_rows}")
    chosen["queries"] = (sizes.queries, "")
    if "time" in dataset.metadata["extra"]:
        column = dataset.metadata["extra"]["time"]
        chosen["order"] = ("time", f"adapt on earlier rows, judge on later ones: the import ordered them by {column}")
    if dataset.kind == "labelled" and _labels(dataset) == sizes.ways:
        chosen["permute_labels"] = (False, f"all groups share {sizes.ways} labels, which mean the same in each of them")
    return chosen


def _labels(dataset: Dataset) -> int:
    """How many labels all groups together have."""
    target = next(field.name for field in dataset.fields if field.role == "target")
    return len(set().union(*(np.unique(table.column(target)).tolist() for table in dataset.splits.values())))


def _model(name: str, shapes: Shapes) -> Iterator[tuple[str, tuple[Any, str]]]:
    if name == "conv4":
        side = min(shapes.inputs[0][1:])
        yield "name", (name, f"pictures {'x'.join(map(str, shapes.inputs[0]))}: four blocks of 3x3 convolutions")
        yield "channels", (32, "64 in some papers, which takes three times as long")
        if side >= LARGE_PICTURE:
            yield "pool", (True, f"halved by max-pooling, as is usual from {LARGE_PICTURE} pixels")
    elif name == "bag":
        yield "name", (name, "texts: a weighted mean of token embeddings")
    else:
        sizes = shapes.vocabularies or [None] * len(shapes.inputs)
        numbers = sum(math.prod(shape) for shape, size in zip(shapes.inputs, sizes, strict=True) if size is None)
        parts = [f"{numbers} number{'s' * (numbers != 1)}"] * bool(numbers)
        parts += [f"one of {size - 1:,} names by its embedding" for size in sizes if size is not None]
        yield "name", (name, f"{', '.join(parts)} an example: a fully connected network")
        yield "hidden", ([64, 64], "widths of its hidden layers")


def _learner(dataset: Dataset, shapes: Shapes) -> str:
    """Of few-shot classes the one that learns fastest, of texts the one of jobs/clinc150*.yaml, else MAML."""
    return "maml" if dataset.kind != "classes" else "anil" if shapes.tokens else "protonet"


def _pace(model: str, shapes: Shapes) -> Settings:
    """How long, how much at once, and by how many workers."""
    large = model == "conv4" and min(shapes.inputs[0][1:]) >= LARGE_PICTURE
    cores = min(MOST_WORKERS, os.cpu_count() or 1)
    apart = model == "conv4" and cores > 1
    steps = {"conv4": 500 if large else 1000, "bag": 800}.get(model, 2000)
    where = (
        "convolutions take long enough for workers of their own" if apart else "a small network: one process is fastest"
    )
    workers = f"the cores here, up to {MOST_WORKERS}; more are faster, with the same result" if apart else "one process"
    return {
        "": {
            "num_workers": (cores if apart else 1, workers),
            "meta_steps": (steps, "to begin with; more learn more. Ctrl-C saves, --resume auto goes on"),
            "meta_batch_size": (16, "tasks a meta-step"),
            "meta_lr": (0.001, "Adam's rate"),
        },
        "fleet": {"backend": ("ray" if apart else "local", where)},
    }


def _evaluation(sizes: TaskSizes, settings: Settings) -> dict[str, tuple[Any, str]]:
    """Validation where there is a split for it; the final figures on test, or on validation that nothing was chosen
    by."""
    every = settings[""]["meta_steps"][0] // 10
    chosen: dict[str, tuple[Any, str]] = {
        "every": (every, "meta-steps between validations, which find the best weights")
    }
    if "validation" not in sizes.splits:
        chosen["every"] = (0, "no usable split validation: the last weights are evaluated, not the best")
    elif "test" not in sizes.splits:
        chosen["every"] = (0, "validation serves as the test, so nothing may be chosen by it")
        chosen["split"] = ("validation", "no usable split test")
    else:
        chosen["patience"] = (PATIENCE, "stop after so many validations without a better one; null: never")
    chosen["tasks"] = (100, "validation tasks")
    chosen["test_tasks"] = (600, "of the final figures: their interval is then about 1 %")
    if sizes.queries > settings["task"]["queries"][0]:
        chosen["queries"] = (sizes.queries, "more than in training: figures are steadier")
    return chosen


def _text(dataset: Dataset, settings: Settings, notes: Sequence[str]) -> str:
    what = "classes" if dataset.kind == "classes" else "groups"
    parts = (f"{split} {len(table.counts)} {what}, {table.num_rows} rows" for split, table in dataset.splits.items())
    head = [
        "metadist train THIS_FILE.yaml; `metadist config schema` has every setting",
        f"The data: {'; '.join(parts)}",
        *(f"Mind: {note}" for note in notes),
    ]
    sections = {section: settings[section] for section in ORDER if section in settings}
    tree = {section: {key: value for key, (value, _) in given.items()} for section, given in sections.items()}
    reasons = {f"{section}.{key}": why for section, given in sections.items() for key, (_, why) in given.items()}
    comments = {key.removeprefix("."): why for key, why in reasons.items()}
    return "".join(f"# {line}\n" for line in head) + commented({**tree.pop(""), **tree}, comments)
