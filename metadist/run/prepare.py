"""What the driver does before any worker is started: find out whatever would go wrong later."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from metadist.checkpoint.format import Checkpoint
from metadist.config import Config
from metadist.core.errors import InputError
from metadist.core.task import Split, Task, TaskId
from metadist.engine import Engine, estimate
from metadist.evaluation.protocol import default_baselines
from metadist.fleet.worker import TWO_RESULTS
from metadist.learners.learner import one_tensor
from metadist.models import Model
from metadist.models.losses import LOSSES
from metadist.run.auto import chunk_size
from metadist.run.build import (
    Shapes,
    judged_shapes,
    make_engine,
    make_evaluation_engine,
    make_model,
    make_source,
    task_shapes,
)


@dataclass(frozen=True)
class Prepared:
    """What the driver knows of a run before any worker exists: shapes, its own engine (for the layout), theta, a chunk
    of tasks, the baselines of its evaluation, and how its meta-gradient compares with finite differences."""

    shapes: Shapes
    engine: Engine
    theta: np.ndarray
    chunk: Sequence[Task]
    baselines: Sequence[str] = ()
    gradient: str = "not checked"
    notes: Sequence[str] = ()
    """What the user should hear before the run."""

    def memory(self) -> str:
        """What a worker takes beside the program, or that it cannot be told beforehand."""
        try:
            need = estimate(self.engine, self.chunk)
        except Exception as error:  # whatever a user's model does that tensors without memory cannot
            return f"unknown ({type(error).__name__} where it was estimated)"
        return f"about {(need.activations + need.gradients) / 2**20:.0f} MiB"


def prepare(config: Config, splits: Sequence[Split], checkpoint: Checkpoint | None = None) -> Prepared:
    """Open the data, draw a task of each split needed, build the model and compute one task; theta is initial, or the
    checkpoint's.

    Raises InputError for whatever would go wrong later.
    """
    source, own = make_source(config), make_source(config, evaluation=True)
    shapes = task_shapes(config, source)
    for split in splits:
        own(TaskId(split, 0, 0))
    engine = make_evaluation_engine(config, shapes, device="cpu")
    if shapes.classification and own.outputs > shapes.outputs and not engine.learner.any_ways:
        raise InputError(
            f"evaluation.ways={own.outputs} is more than the {shapes.outputs} outputs of the model: train with that "
            "task.ways, or with a learner that makes its head from the support set (protonet, r2d2, protomaml)"
        )
    engine = make_engine(config, shapes, device="cpu")
    engine.settle(source(TaskId("train", 0, 0)))
    baselines = default_baselines(config, shapes)
    theta = engine.initial_theta().numpy()
    _check_finite(engine, theta)
    if checkpoint is not None:
        engine.learner.model.load_constants(checkpoint.weights)
        begun, theta = theta, engine.layout.vector(checkpoint.weights)
        if theta.dtype != begun.dtype:
            raise InputError(
                f"the checkpoint's weights are {theta.dtype} and the run's {begun.dtype}: take another one"
            )
    chunk = [
        source(TaskId("train", 0, index)) for index in range(min(chunk_size(config, engine), config.batch_size(1)))
    ]
    ways = 0
    if shapes.classification and ("from_scratch" in baselines or not engine.learner.any_ways):
        ways = own.outputs if engine.learner.any_ways else shapes.outputs
    _try_one_task(engine, theta, chunk[0], make_model(config, judged_shapes(config, shapes, engine.learner, own)), ways)
    return Prepared(shapes, engine, theta, chunk, baselines)


def _check_finite(engine: Engine, theta: np.ndarray) -> None:
    for name, value in engine.layout.unflatten(torch.from_numpy(theta)).items():
        if not value.isfinite().all():
            raise InputError(f"{name} is not finite before training: check the model's initial weights, model.weights")


def _outputs(model: Model, task: Task, ways: int) -> object:
    """What the bare model gives. Raises InputError where there are fewer than `ways`, or where forward changes large
    weights behind autograd's back (clipping, a maximal norm)."""
    large = {name: 10 * value for name, value in model.parameters.items()}
    with torch.no_grad():
        outputs = model(model.parameters, *task.support.inputs)
        model(large, *task.support.inputs)
    for name, value in model.parameters.items():
        if not torch.equal(large[name], 10 * value):
            raise InputError(
                f"the model changed its weight {name!r} in forward, which no derivative sees: leave theta as it is "
                "there, and compute what should be used in its place anew"
            )
    if isinstance(outputs, torch.Tensor) and outputs.ndim == 2 and outputs.shape[1] < ways:
        raise InputError(
            f"the model gives {outputs.shape[1]} outputs, {ways} ways need {ways}: set its number of outputs, which is "
            "one of the keys of `model`, or lower the ways"
        )
    return outputs


def _try_one_task(engine: Engine, theta: np.ndarray, task: Task, judged: Model, ways: int) -> None:
    """Compute one task, so that what does not fit together is told before any worker is started. `judged` is the model
    of evaluation, which must have an output for each of `ways`."""
    try:
        outputs = _outputs(judged.to(engine.device, engine.dtype), engine.tensors(task), ways)
        if engine.learner.loss in LOSSES.values():
            one_tensor(outputs)
        (losses, rows), (_, again) = (engine.meta_gradients(torch.from_numpy(theta), [task]) for _ in range(2))
        assert losses.shape == (1,)
        if rows.numpy().tobytes() != again.numpy().tobytes():
            raise InputError(TWO_RESULTS)
    except InputError:
        raise
    except Exception as error:
        shapes = [list(array.shape) for part in task for arrays in part for array in arrays]
        loop = "; if the model is not made for vmap, set engine.kind=loop" if engine.kind == "vmap" else ""
        raise InputError(
            f"model, loss and learner could not compute one task of arrays {shapes} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}): "
            f"check model.name, loss, task.scheme and your own code{loop} (-v shows the traceback)"
        ) from error
