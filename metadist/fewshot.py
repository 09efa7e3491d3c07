"""Using a trained run: load it, adapt to a few examples, predict."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml

from metadist.checkpoint import CheckpointStore
from metadist.checkpoint_format import Checkpoint, load_checkpoint
from metadist.config import Config
from metadist.config.build import Shapes, make_evaluation_engine
from metadist.engine import Engine
from metadist.errors import InputError
from metadist.task import Examples

Arrays = np.ndarray | torch.Tensor | Sequence[float] | tuple[np.ndarray, ...]


class Adapted:
    """A learner adapted to one support set."""

    def __init__(self, outputs: Callable[..., torch.Tensor], classification: bool, transductive: bool):
        self._outputs = outputs
        self._classification = classification
        self._transductive = transductive

    def outputs(self, x: Arrays, transductive: bool | None = None) -> np.ndarray:
        """What the model gives for inputs [n, ...] (several inputs: a tuple of arrays): logits or values [n, ...].

        `transductive`: the n examples share one batch, and its normalisation; False: each is predicted with the support
        set alone, whatever else is asked. Default: as the run evaluates, but one example alone with the support set.
        """
        inputs = _arrays(x)
        chosen = self._transductive and len(inputs[0]) > 1 if transductive is None else transductive
        return self._outputs(*inputs, transductive=chosen).cpu().numpy()

    def predict(self, x: Arrays, transductive: bool | None = None) -> np.ndarray:
        """Labels [n] of the support set's kind in classification, values [n, d] in regression; see `outputs`."""
        outputs = self.outputs(x, transductive)
        return outputs.argmax(axis=-1) if self._classification else outputs


class FewShotLearner:
    """A trained theta with its learner: `load(run).adapt(x, y).predict(x)`."""

    def __init__(self, engine: Engine, theta: torch.Tensor, shapes: Shapes, transductive: bool):
        self.engine = engine
        self.transductive = transductive
        self.theta = theta
        self.shapes = shapes

    def adapt(self, x: Arrays, y: Arrays) -> Adapted:
        """Run the inner loop on a support set: inputs [n, ...] as the model was trained on (float images in 0..1,
        shape [n, channels, height, width]), targets [n] labels 0..N-1 or values [n, d]. Raises InputError on shapes
        that do not fit."""
        inputs, targets = _arrays(x), _arrays(y)
        for array, shape in zip(inputs, self.shapes.inputs, strict=False):
            if list(array.shape[1:]) != shape:
                raise InputError(f"support inputs have shape {list(array.shape)}; the model takes [n, {_csv(shape)}]")
        if len(inputs) != len(self.shapes.inputs):
            raise InputError(f"the model takes {len(self.shapes.inputs)} inputs, not {len(inputs)}")
        if self.shapes.classification:
            targets = tuple(array.astype(np.int64) for array in targets)
            if targets[0].min() < 0 or targets[0].max() >= self.shapes.outputs:
                raise InputError(f"labels must lie in 0..{self.shapes.outputs - 1}: the model has that many outputs")
        outputs = self.engine.adapt(self.theta, Examples(inputs, targets))
        return Adapted(outputs, self.shapes.classification, self.transductive)


def load(run: str | Path, checkpoint: str = "best") -> FewShotLearner:
    """The learner of a run directory, or of one checkpoint directory. `checkpoint`: "best" by validation (the latest
    where none was validated), "latest", or "step_...". Raises InputError when there is none or it is damaged.

    A model or learner of your own (`module:callable`) must be importable; nothing in the checkpoint is executed.
    """
    return learner_of(read_checkpoint(run, checkpoint))


def read_checkpoint(run: str | Path, checkpoint: str = "best") -> Checkpoint:
    """The checkpoint that `load` takes."""
    path = Path(run)
    if (path / "meta.json").exists():
        return load_checkpoint(path)
    if not (path / "config.yaml").exists():
        raise InputError(f"{path} is not a run directory: it has no config.yaml")
    location = yaml.safe_load((path / "config.yaml").read_text()).get("checkpoint", {}).get("location")
    store = CheckpointStore(location or path / "checkpoints")
    return store.load("latest" if checkpoint == "best" and not store.has_best() else checkpoint)


def learner_of(checkpoint: Checkpoint) -> FewShotLearner:
    """The learner a checkpoint holds, adapted as its configuration says."""
    config = Config.model_validate(yaml.safe_load(checkpoint.config))
    config = config.model_copy(update={"model": config.model.model_copy(update={"weights": None})})
    shapes = Shapes(**checkpoint.run["shapes"])
    engine = make_evaluation_engine(config, shapes, device="cpu")
    engine.learner.model.load_constants(checkpoint.weights)
    theta = engine.layout.vector(checkpoint.weights)
    return FewShotLearner(engine, torch.from_numpy(theta), shapes, config.evaluation.transductive)


def _arrays(x: Arrays) -> tuple[np.ndarray, ...]:
    several = x if isinstance(x, tuple) else (x,)
    return tuple(np.asarray(array) for array in several)


def _csv(shape: list[int]) -> str:
    return ", ".join(map(str, shape))
