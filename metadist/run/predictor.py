"""Using a trained run: load it, adapt to a few examples, predict."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from metadist.checkpoint.format import Checkpoint
from metadist.config.load import parse_config
from metadist.config.schema import EvaluationConfig
from metadist.core.errors import Diverged, InputError
from metadist.core.task import Examples
from metadist.data import Shapes
from metadist.engine import Engine
from metadist.run.build import Job
from metadist.run.saved import read_checkpoint, saved_place
from metadist.run.trust import check_trusted, outside_code

Arrays = np.ndarray | torch.Tensor | Sequence[float] | tuple[np.ndarray, ...]


class Adapted:
    """A learner adapted to one support set. `classes` [ways]: the different labels in it, sorted (classification);
    `places` [ways]: which of the model's outputs stands for each."""

    def __init__(
        self,
        outputs: Callable[..., torch.Tensor],
        shapes: Shapes,
        transductive: bool,
        classes: np.ndarray | None,
        places: np.ndarray | None = None,
    ):
        self.classes = classes
        self._places = places
        self._outputs = outputs
        self._shapes = shapes
        self._transductive = transductive

    def outputs(self, x: Arrays, transductive: bool | None = None) -> np.ndarray:
        """What the model gives for inputs [n, ...] (several inputs: a tuple of arrays): a logit for each of `classes`
        [n, ways], or values [n, d].

        `transductive`: the n examples share one batch, and its normalisation; False: each is predicted with the support
        set alone, whatever else is asked. Default: as the run evaluates, but one example alone with the support set.
        """
        inputs = _inputs(x, self._shapes)
        chosen = self._transductive and len(inputs[0]) > 1 if transductive is None else transductive
        outputs = self._outputs(*inputs, transductive=chosen).cpu().numpy()
        if self.classes is not None:
            return outputs[:, self._places]  # the others are no class of this task
        if not self._shapes.target_units:
            return outputs
        units = self._shapes.target_units
        offset, scale = (np.concatenate([np.atleast_1d(unit[key]) for unit in units]) for key in ("offset", "scale"))
        return outputs / scale + offset

    def probabilities(self, x: Arrays, transductive: bool | None = None) -> np.ndarray:
        """The softmax of `outputs`, float64 [n, ways], for classification."""
        outputs = self.outputs(x, transductive).astype(np.float64)
        shares = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
        return shares / shares.sum(axis=-1, keepdims=True)

    def predict(self, x: Arrays, transductive: bool | None = None) -> np.ndarray:
        """Labels [n] out of the support set's in classification, values [n, d] in regression; see `outputs`. Raises
        Diverged where outputs are not finite."""
        outputs = self.outputs(x, transductive)
        if not np.isfinite(outputs).all():  # of NaN argmax makes class 0
            raise Diverged("adaptation diverged, the model's outputs are not finite: lower evaluation.inner_lr")
        return outputs if self.classes is None else self.classes[outputs.argmax(axis=-1)]


class FewShotLearner:
    """A trained theta with its learner: `load(run).adapt(x, y).predict(x)`."""

    def __init__(self, engine: Engine, theta: torch.Tensor, shapes: Shapes, transductive: bool):
        self.engine = engine
        self.transductive = transductive
        self.theta = theta
        self.shapes = shapes

    @property
    def fields(self) -> dict[str, tuple[str, list[int]]]:
        """What it takes as named arrays, dtype and shape of each (-1: any number): support_x, support_y and query_x, or
        support_x_0, support_x_1, ... where an example has several inputs."""
        shapes, units = self.shapes, self.shapes.input_units or [None] * len(self.shapes.inputs)
        dtypes = shapes.dtypes or ["float32"] * len(shapes.inputs)
        fields = zip(units, dtypes, shapes.inputs, strict=True)
        inputs = [(_accepted(unit, dtype), [-1, *shape]) for unit, dtype, shape in fields]
        targets = [("int64", [-1])] if shapes.classification else [("float64", [-1, *each]) for each in shapes.targets]
        return {**_named("support_x", inputs), **_named("support_y", targets), **_named("query_x", inputs)}

    @property
    def settings(self) -> dict[str, float]:
        """What of its adaptation may be changed (`load(run, inner_steps=10)`), with the values it has."""
        learner = self.engine.learner
        fixed = {*learner.refused, *(["inner_lr"] if learner.learned_rates else [])}
        return {name: getattr(learner, name) for name in ("inner_steps", "inner_lr") if name not in fixed}

    def adapt(self, x: Arrays, y: Arrays) -> Adapted:
        """Run the inner loop on a support set: inputs [n, ...] and targets, which are labels [n] or values [n, d], in
        the units of the data as it was before import; images as uint8, or as floats in 0..1, [n, channels, height,
        width]. Labels are texts or whole numbers, whichever; those that number the model's outputs stand for these.
        Raises InputError on shapes and labels that do not fit."""
        inputs, targets = _inputs(x, self.shapes), _arrays(y)
        if any(len(target) != len(inputs[0]) for target in targets):
            raise InputError(
                f"{len(inputs[0])} support inputs need as many targets, at least one; got {len(targets[0])}"
            )
        classes = places = None
        if self.shapes.classification:
            any_ways = self.engine.learner.any_ways
            classes, numbers = _numbered(targets[0])
            places = np.arange(len(classes))
            if not any_ways and classes.dtype.kind in "iu" and classes[0] >= 0 and classes[-1] < self.shapes.outputs:
                numbers, places = classes.astype(np.int64)[numbers], classes.astype(np.int64)
            if len(classes) > self.shapes.outputs and not any_ways:
                raise InputError(
                    f"the support set has {len(classes)} different labels and the model {self.shapes.outputs} outputs: "
                    "take fewer classes, or train with more task.ways"
                )
            targets = (numbers,)
        else:
            units = self.shapes.target_units or [None] * len(targets)
            targets = tuple(_converted(*pair) for pair in zip(targets, units, strict=True))
        outputs = self.engine.adapt(self.theta, Examples(inputs, targets))
        return Adapted(outputs, self.shapes, self.transductive, classes, places)


def load(
    run: str | Path,
    checkpoint: str = "best",
    *,
    trust_code: bool = False,
    inner_steps: int | None = None,
    inner_lr: float | None = None,
) -> FewShotLearner:
    """The learner of a run directory, or of one checkpoint directory. `checkpoint`: "best" by validation (the latest
    where none was validated), "latest", or "step_...". It adapts by `inner_steps` of rate `inner_lr`, by default as the
    run evaluates. Raises InputError when there is none, it is damaged or its learner takes no such settings.

    A run may come from anywhere: its model, learner and loss are imported only where they are metadist's own, and its
    checkpoints read only in the run's directory. One of your own, or one you trust, is loaded with `trust_code=True`;
    its modules must be importable. Raises InputError that names them otherwise.
    """
    saved = read_checkpoint(run, checkpoint, saved_place(run, trust_code=trust_code))
    own = {name: value for name, value in (("inner_steps", inner_steps), ("inner_lr", inner_lr)) if value is not None}
    return learner_of(saved, run, trust_code, own)


def learner_of(
    checkpoint: Checkpoint, run: str | Path, trust_code: bool = False, evaluation: Mapping[str, Any] | None = None
) -> FewShotLearner:
    """The learner that a checkpoint of `run` holds, which adapts as its configuration says, `evaluation` changed so."""
    config = parse_config(checkpoint.config, "the checkpoint's configuration")
    code = outside_code(config)
    code.pop("data.source", None)  # is not needed
    check_trusted(run, code, trust_code)
    try:
        adapted = EvaluationConfig.model_validate({**config.evaluation.model_dump(), **(evaluation or {})})
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
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
    theta = engine.layout.vector(checkpoint.weights)
    return FewShotLearner(engine, torch.from_numpy(theta), shapes, config.evaluation.transductive)


def _arrays(x: Arrays) -> tuple[np.ndarray, ...]:
    several = x if isinstance(x, tuple) else (x,)
    return tuple(np.asarray(array) for array in several)


def _inputs(x: Arrays, shapes: Shapes) -> tuple[np.ndarray, ...]:
    """Inputs as a task holds them. Raises InputError where their number or shapes are not the model's."""
    inputs = _arrays(x)
    if len(inputs) != len(shapes.inputs):
        raise InputError(f"the model takes {len(shapes.inputs)} inputs (as a tuple), not {len(inputs)}")
    for array, shape in zip(inputs, shapes.inputs, strict=True):
        if list(array.shape[1:]) != shape or not len(array):
            wanted = ", ".join(["n", *map(str, shape)])
            raise InputError(f"inputs have shape {list(array.shape)}; the model takes [{wanted}], n at least 1")
    units = shapes.input_units or [None] * len(inputs)
    return tuple(_converted(*pair) for pair in zip(inputs, units, strict=True))


def _converted(array: np.ndarray, unit: dict[str, Any] | None) -> np.ndarray:
    """(array - offset) * scale as float32, as `Table.gather` does; whole numbers and images in floats as they are."""
    if unit is None or (array.dtype != np.uint8 and unit["dtype"] == "uint8"):
        return array.astype(np.float32) if array.dtype.kind == "f" else array
    if unit["dtype"] != "uint8" and np.dtype(unit["dtype"]).kind != "f":
        return array.astype(unit["dtype"])
    return ((array.astype(np.float64) - unit["offset"]) * unit["scale"]).astype(np.float32)


def _accepted(unit: dict[str, Any] | None, dtype: str) -> str:
    """The dtype in which an input with that unit, which a task holds as `dtype`, is given."""
    if unit is None or unit["dtype"] == "uint8":
        return dtype
    if np.dtype(unit["dtype"]).kind != "f":
        return unit["dtype"]
    scaled = np.any(np.not_equal(unit["scale"], 1)) or np.any(unit["offset"])
    return "float64" if scaled else dtype


def _named(name: str, fields: Sequence[Any]) -> dict[str, Any]:
    return {name: fields[0]} if len(fields) == 1 else {f"{name}_{i}": field for i, field in enumerate(fields)}


def _numbered(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different labels, sorted, and which of them each one is. Raises InputError where they are none."""
    whole = labels.dtype.kind in "iub" or (labels.dtype.kind == "f" and np.array_equal(labels, np.floor(labels)))
    text = labels.dtype.kind == "U" or (
        labels.dtype.kind == "O" and all(isinstance(label, str) for label in labels.flat)
    )
    if labels.ndim != 1 or not (whole or text):
        raise InputError(
            f"labels must be texts or whole numbers, shape [n]; got {labels.dtype} of shape {list(labels.shape)}"
        )
    classes, numbers = np.unique(labels, return_inverse=True)
    return classes, numbers.astype(np.int64)
