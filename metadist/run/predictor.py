"""Using a trained run: load it, adapt to a few examples, predict."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from metadist.checkpoint.format import Checkpoint, load_checkpoint
from metadist.config.load import parse_config
from metadist.core.errors import InputError
from metadist.core.task import Examples
from metadist.data import Preprocessing, Shapes
from metadist.run.build import Job
from metadist.run.few_shot import SUPPORT, Adapted, FewShotLearner, evaluation_settings, numbered
from metadist.run.inputs import Inputs
from metadist.run.saved import is_checkpoint, read_checkpoint, saved_place
from metadist.run.trust import check_trusted, computing_code

EVALUATION = ("inner_steps", "inner_lr", "transductive")
"""The settings of evaluation by which a learner adapts and predicts."""


def load(
    run: str | Path,
    checkpoint: str = "best",
    *,
    trust_code: bool = False,
    inner_steps: int | None = None,
    inner_lr: float | None = None,
    transductive: bool | None = None,
) -> FewShotLearner:
    """The learner of a run directory, or of one checkpoint directory. `checkpoint`: "best" by validation (the latest
    where none was validated), "latest", or "step_...". It adapts by `inner_steps` of rate `inner_lr`, and predicts
    several examples together where `transductive`, by default as the run evaluates. Raises InputError when there is
    none, it is damaged or its learner takes no such settings.

    A run may come from anywhere: its model, learner and loss are imported only where they are metadist's own, and its
    checkpoints read only in the run's directory. One of your own, or one you trust, is loaded with `trust_code=True`;
    its modules must be importable. Raises InputError that names them otherwise.
    """
    saved = read_checkpoint(run, checkpoint, saved_place(run, trust_code=trust_code))
    own = {"inner_steps": inner_steps, "inner_lr": inner_lr, "transductive": transductive}
    return learner_of(saved, run, trust_code, {name: value for name, value in own.items() if value is not None})


def load_adapted(path: str | Path, *, trust_code: bool = False) -> Adapted:
    """An adapted learner that `Adapted.save` wrote: it holds theta and the support set, and adapts again, to the same
    bits. It is as safe to load as a run, see `load`. Raises InputError where it is damaged, or none.

    Example:
        >>> metadist.load("runs/birds").adapt(pictures, names).save("adapted/garden")
        >>> metadist.load_adapted("adapted/garden").predict("new.jpg")
        'wren'
    """
    if not is_checkpoint(path):
        raise InputError(f"{path} is no adapted learner as `Adapted.save` writes one; a run is read by `metadist.load`")
    saved = load_checkpoint(path)
    about = saved.run.get("adapted")
    if not isinstance(about, Mapping):
        raise InputError(f"{path} is no adapted learner, but a checkpoint: `metadist.load` takes it")
    settings = {name: value for name, value in dict(about.get("evaluation", {})).items() if name in EVALUATION}
    learner = learner_of(saved, path, trust_code, settings)
    try:
        return _adapted(learner, saved.weights, about)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} holds no support set that its model can take: it is damaged") from error


def _adapted(learner: FewShotLearner, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> Adapted:
    """The adapted learner of a saved support set. Raises InputError, or whatever a damaged one leads to."""
    shapes = learner.shapes
    inputs = tuple(arrays[f"{SUPPORT}input_{i}"] for i in range(len(shapes.inputs)))
    targets = tuple(arrays[f"{SUPPORT}target_{i}"] for i in range(1 if shapes.classification else len(shapes.targets)))
    dtypes = shapes.dtypes or ["float32"] * len(inputs)
    count, classes = len(inputs[0]), None
    wanted = [(np.dtype(dtype), (count, *shape)) for dtype, shape in zip(dtypes, shapes.inputs, strict=True)]
    wanted += [(array.dtype, (count, *shape)) for array, shape in zip(targets, shapes.targets or [[]], strict=True)]
    if shapes.classification:
        dtype = np.dtype(about["dtype"])  # a text's says how long the longest may be, and numpy makes room for that
        classes = np.array(about["classes"], None if dtype.kind == "U" else dtype)
        known, numbers = numbered(classes)
        if len(known) != len(classes) or not np.array_equal(numbers[targets[0]], targets[0]):
            raise ValueError("the classes are not those of the labels")
    if not count or wanted != [(array.dtype, array.shape) for array in (*inputs, *targets)]:
        raise ValueError("the arrays are not those of the model")
    return Adapted(learner, Examples(inputs, targets), classes, {})


def learner_of(
    checkpoint: Checkpoint, run: str | Path, trust_code: bool = False, evaluation: Mapping[str, Any] | None = None
) -> FewShotLearner:
    """The learner that a checkpoint of `run` holds, which adapts as its configuration says, `evaluation` changed so."""
    config = parse_config(checkpoint.config, "the checkpoint's configuration")
    code = computing_code(config)
    code.pop("data.source", None)  # is not needed
    check_trusted(run, code, trust_code)
    adapted = evaluation_settings(config.evaluation.model_dump(), evaluation or {})
    weights = config.model.model_copy(update={"weights": None})
    config = config.model_copy(update={"model": weights, "evaluation": adapted})
    try:
        shapes = TypeAdapter(Shapes).validate_python(checkpoint.run.get("shapes"))
    except ValidationError as error:
        first = error.errors()[0]
        entry = ".".join(map(str, ("shapes", *first["loc"])))
        raise InputError(f"the checkpoint does not say what its model takes: {entry}: {first['msg']}") from None
    engine = Job(config, shapes).evaluation_engine("cpu")
    engine.learner.model.load_constants(checkpoint.weights)
    inputs = Inputs(shapes, Preprocessing.parse(checkpoint.run.get("preprocessing")))
    return FewShotLearner(config.learner.name, engine, inputs, checkpoint, config.evaluation.transductive)
