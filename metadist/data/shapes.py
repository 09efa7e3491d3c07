"""The shapes and kinds of a task's arrays: all that a model and a loss need to know of the data."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from metadist.core.errors import InputError
from metadist.core.task import TaskId
from metadist.data.online import Stream
from metadist.data.sources import LabelledSource, Source
from metadist.data.table import Dataset


class Shapes(NamedTuple):
    """Shapes and kinds of a task's arrays. They travel in the checkpoint, so that a model can be made without data."""

    inputs: list[list[int]]  # shape of each input of one example
    tokens: bool  # the inputs are token numbers and their mask
    vocabulary_size: int | None
    outputs: int
    classification: bool
    input_units: Sequence[dict[str, Any]] = ()  # of each input: the "dtype" it is stored in, "offset" and "scale"
    target_units: Sequence[dict[str, Any]] = ()  # of each target; a task holds (stored - offset) * scale
    dtypes: Sequence[str] = ()  # of each input as a task holds it, floating point ones as float32
    targets: Sequence[list[int]] = ()  # shape of each target of one example
    vocabularies: Sequence[int | None] = ()  # of each input that is an identifier, how many numbers it can be (from 0)
    observations: Sequence[list[int]] = ()  # of what a model is called with, where that is not a task's inputs
    labels: Sequence[str] = ()  # of each output what it stands for, where labels mean the same in every task

    @property
    def model_inputs(self) -> Sequence[list[int]]:
        """Shape of each input that a model is called with, of one example."""
        return self.observations or self.inputs


def task_shapes(source: Source, dataset: Dataset | None) -> Shapes:
    """Shapes of the first training task of `source`, whose rows come from `dataset` (None: from elsewhere).

    Raises InputError where there is no such task.
    """
    support, query = source(TaskId("train", 0, 0))
    if len(support.inputs) != len(query.inputs) or len(support.targets) != len(query.targets):
        raise InputError("the source gives support and query sets with different fields")
    inputs = [np.asarray(array.cpu() if isinstance(array, torch.Tensor) else array) for array in support.inputs]
    return Shapes(
        inputs=[list(array.shape[1:]) for array in support.inputs],
        tokens=is_text(support.inputs),
        vocabulary_size=dataset.metadata["extra"].get("vocabulary_size") if dataset else None,
        outputs=source.outputs,
        classification=len(support.targets) == 1 and np.issubdtype(support.targets[0].dtype, np.integer),
        input_units=_units(dataset, "input"),
        target_units=_units(dataset, "target"),
        dtypes=["float32" if array.dtype.kind == "f" else array.dtype.name for array in inputs],
        targets=[list(array.shape[1:]) for array in support.targets],
        observations=getattr(source, "observation_shapes", ()),
        vocabularies=_vocabularies(dataset),
        labels=_labels(source, dataset),
    )


def is_text(inputs: tuple[np.ndarray, ...]) -> bool:
    """Whether the inputs are token numbers [n, length] and the mask of those present."""
    return (
        len(inputs) == 2
        and inputs[0].ndim == 2
        and np.issubdtype(inputs[0].dtype, np.integer)
        and inputs[1].dtype == bool
        and inputs[0].shape == inputs[1].shape
    )


def _vocabularies(dataset: Dataset | None) -> Sequence[int | None]:
    """Of each input field; nothing where none is an identifier."""
    sizes = dataset.metadata["extra"].get("vocabularies", {}) if dataset else {}
    return [sizes.get(f.name) for f in dataset.fields if f.role == "input"] if dataset and sizes else ()


def _labels(source: Source, dataset: Dataset | None) -> Sequence[str]:
    """Of each output the label that it stands for, as the data had it, where labels mean the same in every task."""
    origin = source.source if isinstance(source, Stream) else source
    if dataset is None or not isinstance(origin, LabelledSource):
        return ()
    (target,) = (field.name for field in dataset.fields if field.role == "target")
    names = dataset.metadata["extra"].get("names", {}).get(target)
    return [str(names[label] if names else label) for label in origin.labels]


def _units(dataset: Dataset | None, role: str) -> list[dict[str, Any]]:
    fields = [field for field in dataset.fields if field.role == role] if dataset else []
    columns = dataset.metadata["extra"].get("standardized", {}) if dataset else {}
    return [{"dtype": f.dtype, "offset": f.offset, "scale": f.scale, **columns.get(f.name, {})} for f in fields]
