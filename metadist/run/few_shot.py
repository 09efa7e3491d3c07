"""A trained learner that adapts to a few examples, and what it is then: it predicts, and is saved."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from metadist.checkpoint.format import Checkpoint, encode, write_synced
from metadist.config.schema import EvaluationConfig
from metadist.core.errors import Diverged, InputError
from metadist.core.files import is_uri, reason
from metadist.core.task import Examples
from metadist.engine import Engine
from metadist.run.inputs import Inputs, refuse_missing

SUPPORT = "support/"
"""What begins the names of a saved support set's arrays, beside the weights."""


class FewShotLearner:
    """A trained theta with its learner: `load(run).adapt(x, y).predict(x)`. `takes` says in words what x may be.

    `inputs` makes arrays of what is given; `saved` is the checkpoint that it comes from.
    """

    def __init__(self, name: str, engine: Engine, inputs: Inputs, saved: Checkpoint, transductive: bool):
        self.name = name
        self.engine = engine
        self.transductive = transductive
        self.inputs, self.shapes, self.takes = inputs, inputs.shapes, inputs.takes
        self.theta = torch.from_numpy(engine.layout.vector(saved.weights))
        self._saved = replace(saved, weights={}, trainer={})
        self._changed: dict[tuple[Any, ...], Engine] = {}

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
        """What of its adaptation may be changed (`adapt(x, y, inner_steps=10)`), with the values it has."""
        learner = self.engine.learner
        fixed = {*learner.refused, *(["inner_lr"] if learner.learned_rates else [])}
        return {name: getattr(learner, name) for name in ("inner_steps", "inner_lr") if name not in fixed}

    def adapt(self, x: Any, y: Any, *, inner_steps: int | None = None, inner_lr: float | None = None) -> "Adapted":
        """Run the inner loop on a support set.

        Args:
            x: n labelled examples, as the data was before import. By the kind of the run's data:
                texts: a list (or series, or array) of str;
                pictures: a list of paths or PIL images of any size and mode, or arrays [n, channels, height, width] of
                uint8 or of floats in 0..1;
                rows: a data frame, a dict of columns, or a list of dicts with the columns that were imported (others
                are not looked at);
                any: arrays [n, ...]; several inputs are a tuple of arrays or a dict of them by name.
                A single example goes without the list or the axis n.
            y: labels [n], texts or whole numbers, whichever; those that number the model's outputs stand for these.
                Where labels mean the same in all tasks of the run (`task.permute_labels=false`) they are those of its
                data, of which the support set may lack some. In a regression values [n, d] (several targets: a tuple,
                or a dict by name).
            inner_steps, inner_lr: of this adaptation; by default as the run evaluates. See `settings`.

        What is lost on the way (a picture stretched, a text cut) is said in a Python warning. Raises InputError, one
        sentence, where something does not fit.

        Example:
            >>> adapted = metadist.load("runs/intents").adapt(["what is my balance", "send 5 euros"], ["see", "pay"])
            >>> adapted.predict("how much money do i have")
            'see'
        """
        inputs, _ = self.inputs(x)
        settings = {"inner_steps": inner_steps, "inner_lr": inner_lr}
        settings = {name: value for name, value in settings.items() if value is not None}
        if not self.shapes.classification:
            return Adapted(self, Examples(inputs, self.inputs.targets(y, len(inputs[0]))), None, settings)
        if isinstance(y, tuple) and len(y) == 1 and np.ndim(y[0]) == 1:
            (y,) = y
        given = y if isinstance(y, list | tuple) else np.atleast_1d(np.asarray(y)).tolist()
        refuse_missing(given, "label", "labels [n] are texts or whole numbers; give one")
        labels = np.atleast_1d(np.asarray(y))
        classes, numbers = numbered(labels)
        if self._labels:
            classes = np.unique(self._named(classes))
            numbers = np.searchsorted(classes, labels.astype(classes.dtype)).astype(np.int64)
        if len(labels) != len(inputs[0]):
            raise InputError(f"{len(inputs[0])} support examples need as many labels, at least one; got {len(labels)}")
        if len(classes) == 1:
            self.inputs.say(f"the support set has one class ({classes[0]}), which every prediction will be")
        return Adapted(self, Examples(inputs, (numbers,)), classes, settings)

    def places(self, classes: np.ndarray) -> np.ndarray:
        """Which of the model's outputs stands for each class, [ways]. Raises InputError where there are too few."""
        if self._labels:
            return np.argsort(self._named(classes))
        any_ways, outputs = self.engine.learner.any_ways, self.shapes.outputs
        if len(classes) > outputs and not any_ways:
            raise InputError(
                f"the support set has {len(classes)} different labels and the model {outputs} outputs: "
                "take fewer classes, or train with more task.ways"
            )
        if not any_ways and classes.dtype.kind in "iu" and classes[0] >= 0 and classes[-1] < outputs:
            return classes.astype(np.int64)
        return np.arange(len(classes))

    @property
    def _labels(self) -> Sequence[str]:
        """Of each output the label that it stands for, where labels mean the same in all tasks."""
        return () if self.engine.learner.any_ways else self.shapes.labels

    def _named(self, classes: np.ndarray) -> np.ndarray:
        """What each output stands for, called as `classes` are: by its label, by its number where labels are texts, by
        a truth value where they are 0 and 1. Raises InputError where one of the classes is none of them."""
        labels, kind = list(self._labels), classes.dtype.kind
        whole = all(label.removeprefix("-").isdecimal() for label in labels)
        named = [np.array([int(label) for label in labels] if whole else range(len(labels)))]
        if kind in "UO":
            classes, named = classes.astype(str), [np.array(labels)]
        if labels == ["0", "1"]:  # as truth values are stored
            truth = [["false", "true"], ["False", "True"]] if kind in "UO" else [[False, True]] if kind == "b" else []
            named = [*map(np.array, truth), *named]
        for names in named:
            if np.isin(classes, names).all():
                return names
        unknown = ", ".join(map(repr, classes[~np.isin(classes, named[-1])][:3].tolist()))
        raise InputError(
            f"{unknown} is no label of this run, in which a label means the same in every task: give "
            f"{', '.join(labels[:12])}{', ...' * (len(labels) > 12)}"
        )

    def changed(self, settings: Mapping[str, Any]) -> Engine:
        """The engine with other inner steps or another rate. Raises InputError where the learner has no such."""
        if not settings:
            return self.engine
        learner, own = self.engine.learner, self.settings
        for name, value in settings.items():
            if name not in own:
                why = learner.refused.get(name, "it has learned its rates")
                raise InputError(f"{name}={value} says nothing to learner {self.name}: {why}; leave it out")
        checked = evaluation_settings({}, settings)
        key = tuple(sorted(settings.items()))
        if key not in self._changed:
            changes = {name: getattr(checked, name) for name in settings}
            try:
                self._changed = {key: Engine(replace(learner, **changes), self.engine.method, str(self.engine.device))}
            except ValueError as error:
                raise InputError(f"learner {self.name}: {error}") from None
        return self._changed[key]

    def checkpoint(self) -> Checkpoint:
        """All that it takes to load it again, without what only training needs."""
        arrays = {name: value.cpu().numpy() for name, value in self.engine.learner.model.constants.items()}
        weights = self.engine.layout.named_arrays(self.theta.numpy()) | arrays
        return replace(self._saved, weights=weights, run=dict(self._saved.run))


class Adapted:
    """A learner adapted to one support set. `classes` [ways]: the different labels in it, sorted; all of the run's
    where labels mean the same in all of its tasks; None in regression.

    It takes what `adapt` took: raw examples (texts, pictures, rows) or arrays, many or a single one; of a single one
    results have no axis n.

    Example:
        >>> adapted = metadist.load("runs/birds").adapt(["a1.jpg", "a2.jpg", "b1.jpg"], ["wren", "wren", "lark"])
        >>> adapted.predict(["new1.jpg", "new2.jpg"])
        array(['lark', 'wren'], dtype='<U4')
        >>> adapted.predict_proba("new1.jpg")                       # in the order of adapted.classes
        array([0.93, 0.07])
    """

    def __init__(
        self, learner: FewShotLearner, support: Examples, classes: np.ndarray | None, settings: Mapping[str, Any]
    ):
        """`support` as a task holds it, its labels as places in `classes`; `settings`: the inner_steps and inner_lr
        that are not the learner's own. Raises InputError where the learner cannot take them."""
        self.learner, self.classes, self.settings = learner, classes, dict(settings)
        self._support, self._places = support, None
        if classes is not None:
            self._places = learner.places(classes)
            support = support._replace(targets=(self._places[support.targets[0]],))
        self._outputs = learner.changed(self.settings).adapt(learner.theta, support)

    def outputs(self, x: Any, transductive: bool | None = None) -> np.ndarray:
        """What the model gives for inputs: a logit for each of `classes` [n, ways], or values [n, d] in the units of
        the data as it was before import; of a single example [ways] or [d]. Raises InputError on what it cannot take.

        `transductive`: the n examples share one batch, and its normalisation; False: each is predicted with the support
        set alone, whatever else is asked. Default: as the run evaluates, but one example alone with the support set.
        """
        inputs, single = self.learner.inputs(x)
        chosen = self.learner.transductive and len(inputs[0]) > 1 if transductive is None else transductive
        outputs = self._outputs(*inputs, transductive=chosen).cpu().numpy()
        values = self.learner.inputs.values
        outputs = values(outputs) if self._places is None else outputs[:, self._places]  # others are no class of it
        return outputs[0] if single else outputs

    def predict_proba(self, x: Any, transductive: bool | None = None) -> np.ndarray:
        """How probable each of `classes` is, the softmax of `outputs`: float64 [n, ways], of a single example [ways].
        Raises InputError in regression."""
        if self.classes is None:
            raise InputError("a regression has no probabilities: `predict` gives its values")
        outputs = self._finite(x, transductive).astype(np.float64)
        shares = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
        return shares / shares.sum(axis=-1, keepdims=True)

    def predict(self, x: Any, transductive: bool | None = None) -> Any:
        """Labels [n] out of the support set's in classification, values [n, d] in regression; of a single example its
        label, or values [d]. See `outputs`. Raises Diverged where outputs are not finite."""
        outputs = self._finite(x, transductive)
        return outputs if self.classes is None else self.classes[outputs.argmax(axis=-1)]

    def _finite(self, x: Any, transductive: bool | None) -> np.ndarray:
        outputs = self.outputs(x, transductive)
        if not np.isfinite(outputs).all():  # of NaN argmax makes class 0
            raise Diverged("adaptation diverged, the model's outputs are not finite: lower inner_lr or inner_steps")
        return outputs

    def save(self, path: str | Path) -> None:
        """Write it to a new folder: weights and support set (safetensors) and what they are (YAML, JSON), no pickle;
        `metadist.load_adapted` reads it. Whoever has the folder has the support examples, as arrays. Raises InputError
        where the folder holds something, or cannot be written."""
        if is_uri(path):
            raise InputError(f"{path} is no folder of this machine: save it to one, and copy that")
        folder, saved = Path(path), self.learner.checkpoint()
        arrays = {f"{SUPPORT}input_{i}": array for i, array in enumerate(self._support.inputs)}
        arrays |= {f"{SUPPORT}target_{i}": array for i, array in enumerate(self._support.targets)}
        settings = {**self.learner.settings, **self.settings}
        evaluation = {**settings, "transductive": self.learner.transductive}
        about: dict[str, Any] = {"learner": self.learner.name, "evaluation": evaluation, "takes": self.learner.takes}
        if self.classes is not None:
            about |= {"classes": self.classes.tolist(), "dtype": self.classes.dtype.str}
        saved.weights.update(arrays)
        saved.run["adapted"] = about
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise InputError(f"{folder} is not empty: save an adapted learner to a folder of its own")
            for name, content in encode(saved).items():
                write_synced(folder / name, content)
        except OSError as error:
            raise InputError(f"{folder} cannot be written to ({reason(error)}): choose another") from None

    def __repr__(self) -> str:
        classes = "" if self.classes is None else f" of classes {', '.join(map(str, self.classes))}"
        count = len(self._support.inputs[0])
        return f"<{self.learner.name} adapted to {count} examples{classes}; takes {self.learner.takes}>"


def evaluation_settings(known: Mapping[str, Any], changes: Mapping[str, Any]) -> EvaluationConfig:
    """The settings of evaluation with some changed. Raises InputError where one is out of its range."""
    try:
        return EvaluationConfig.model_validate({**known, **changes})
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _accepted(unit: dict[str, Any] | None, dtype: str) -> str:
    """The dtype in which an input with that unit, which a task holds as `dtype`, is given."""
    if unit is None or unit["dtype"] == "uint8":
        return dtype
    if np.dtype(unit["dtype"]).kind != "f":
        return unit["dtype"]
    scaled = np.any(np.not_equal(unit["scale"], 1)) or np.any(unit["offset"])
    return "float64" if scaled else dtype


def _named(name: str, fields: Any) -> dict[str, Any]:
    return {name: fields[0]} if len(fields) == 1 else {f"{name}_{i}": field for i, field in enumerate(fields)}


def numbered(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
