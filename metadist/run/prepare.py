"""What the driver computes itself before any worker is started: one task, so that what does not fit is found out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from metadist.checkpoint.format import Checkpoint
from metadist.core.errors import InputError
from metadist.core.messages import Weights
from metadist.core.task import Split, Task, TaskId
from metadist.engine import CHANGED_EXAMPLES, CHANGED_WEIGHT, Engine, estimate
from metadist.fleet.worker import TWO_RESULTS
from metadist.learners.learner import Learner, one_tensor
from metadist.models import LOSSES
from metadist.run.auto import chunk_size, with_backend
from metadist.run.build import Job
from metadist.run.resolved import decided, resolved

IN_ONE_PROCESS = (
    "a step of this network takes less than Ray adds to it, so everything is computed in this process "
    "(fleet.backend=auto is local): num_workers=N takes so many workers on Ray, to the same bits"
)
UNMOVED = (
    "the meta-gradient of the first training task is exactly zero, so theta would not move by it: where the loss has "
    "no derivative (counts, thresholds) take learner.name=evolution with learner.inner_directions, which needs none"
)


@dataclass(frozen=True)
class Prepared:
    """A job that has been tried before any worker exists.

    engine: on the driver's CPU. theta [P]: initial, or the checkpoint's. chunk: the first tasks. baselines: of its
    evaluation. gradient: how the meta-gradient compares with finite differences. notes: for the user, before the run.
    """

    job: Job
    engine: Engine
    theta: np.ndarray
    chunk: Sequence[Task]
    baselines: Sequence[str] = ()
    gradient: str = "not checked"
    notes: Sequence[str] = ()

    @property
    def chunk_size(self) -> int:
        """Tasks per unit of work."""
        return chunk_size(self.job.config, self.engine)

    @property
    def constants(self) -> dict[str, np.ndarray]:
        """Frozen weights and buffers, which workers take from the driver."""
        return {name: value.cpu().numpy() for name, value in self.engine.learner.model.constants.items()}

    def weights(self, version: int) -> Weights:
        """theta after that many meta-updates."""
        return Weights(version, self.theta)

    def memory(self) -> str:
        """An estimate of what a worker takes beside the program, in words."""
        try:
            need = estimate(self.engine, self.chunk)
        except Exception as error:  # whatever a user's model does that tensors without memory cannot
            return f"unknown ({type(error).__name__} where it was estimated)"
        return f"about {(need.activations + need.gradients) / 2**20:.0f} MiB"

    def resolved(self) -> dict[str, Any]:
        """Dotted setting -> the value that a run computes with, where its job says `auto` or nothing."""
        return resolved(self.job, self.engine, self.baselines)

    def chosen(self) -> str:
        """A line on what the job leaves to metadist, as it could be typed; not that evaluation is as training."""
        as_in_training = {f"evaluation.{name}" for name in ("ways", "shots", "queries", "inner_steps", "inner_lr")}
        found = decided(self.job.config, self.resolved())
        found = {key: value for key, value in found.items() if key not in as_in_training}
        shown = (f"{key}=[{','.join(v)}]" if isinstance(v, list) else f"{key}={v}" for key, v in found.items())
        return f"chosen where the job says nothing: {' '.join(shown)}"

    def about(self) -> str:
        """The run's tasks and its learner, in Markdown."""
        job, engine = self.job, self.engine
        config, task = job.config, job.config.task
        name = config.data.family or (job.dataset.path.name if job.dataset else "")
        if job.dataset is None:
            tasks = f"tasks of `{config.data.source}`"
        elif job.shapes.classification:
            tasks = f"{task.ways} ways, {task.shots} shots, {task.queries} queries a class, of `{name}`"
        else:
            tasks = f"regression on {task.shots} examples, {task.queries} queries a task, of `{name}`"
        steps = "" if "inner_steps" in engine.learner.refused else f", {engine.learner.inner_steps} inner steps"
        batch = f"{config.tasks_per_worker} tasks for each worker" if config.tasks_per_worker else config.batch_size(1)
        return (
            f"**Task**: {tasks}\n\n**Learner**: {config.learner.name}{steps}, "
            f"{self.resolved()['model.name']} of {engine.layout.size} meta-parameters, meta-batch {batch}"
        )


def prepare(job: Job, splits: Sequence[Split], checkpoint: Checkpoint | None = None) -> Prepared:
    """Make the job's parts, draw a task of each split needed and compute one task; theta is initial, or the
    checkpoint's. From then on the job says where it is computed.

    Raises InputError for whatever would go wrong later.
    """
    job.make_parts()
    config, source, own = job.config, job.source, job.evaluation_source
    shapes = job.shapes
    for split in splits:
        own(TaskId(split, 0, 0))
    any_ways = job.evaluation_engine("cpu").learner.any_ways
    if shapes.classification and own.outputs > shapes.outputs and not any_ways:
        raise InputError(
            f"evaluation.ways={own.outputs} is more than the {shapes.outputs} outputs of the model: train with that "
            "task.ways, or with a learner that makes its head from the support set (protonet, r2d2, protomaml)"
        )
    engine = job.engine("cpu")
    engine.settle(source(TaskId("train", 0, 0)))
    baselines = job.baselines()
    theta = engine.initial_theta().numpy()
    _check_finite(engine, theta)
    if checkpoint is None:
        _check_base(job, engine)
    else:
        engine.learner.model.load_constants(checkpoint.weights)
        initial, theta = theta, engine.layout.vector(checkpoint.weights)
        if theta.dtype != initial.dtype:
            raise InputError(
                f"the checkpoint's weights are {theta.dtype} and the run's {initial.dtype}: take another one"
            )
    tasks = min(chunk_size(config, engine), config.batch_size(1))
    chunk = [source(TaskId("train", 0, index)) for index in range(tasks)]
    ways = 0
    if shapes.classification and ("from_scratch" in baselines or not any_ways):
        ways = own.outputs if any_ways else shapes.outputs
    judged = job.evaluation_engine("cpu", job.evaluation_outputs(engine)).learner
    moved = _try_one_task(engine, theta, chunk[0], judged, ways)
    few = [job.few_tasks(split, _tasks_of(job, split)) for split in splits]
    settled = with_backend(config, engine)
    alone = IN_ONE_PROCESS if config.fleet.backend != settled.fleet.backend == "local" else ""
    notes = [note for note in (engine.learner.model.note, "" if moved else UNMOVED, alone, *few) if note]
    job.config = settled
    return Prepared(job, engine, theta, chunk, baselines, notes=notes)


def _tasks_of(job: Job, split: Split) -> int:
    """How many tasks of a split a run measures."""
    own = job.config.evaluation
    return max(own.test_tasks if split == own.split else 0, own.tasks if split == "validation" else 0)


def _check_finite(engine: Engine, theta: np.ndarray) -> None:
    for name, value in engine.layout.unflatten(torch.from_numpy(theta)).items():
        if not value.isfinite().all():
            raise InputError(f"{name} is not finite before training: check the model's initial weights, model.weights")


def _check_base(job: Job, engine: Engine) -> None:
    """Raise InputError where an encoder's frozen base would stay as it was drawn."""
    own = job.config.model
    if own.name == "encoder" and engine.learner.model.constants and not own.weights:
        raise InputError(
            "model.frozen_base=true leaves the base of the encoder as random as it is drawn: give a trained one by "
            "model.weights=FILE, such as RUN/checkpoints/step_.../weights.safetensors, or leave frozen_base out"
        )


def _outputs(learner: Learner, task: Task, ways: int) -> object:
    """What the learner's check of its model gives. Raises InputError where outputs are fewer than `ways`, or where
    forward changes large weights behind autograd's back (clipping, a maximal norm), or the examples."""
    model = learner.model
    before = _bytes(task)
    large = {name: 10 * value for name, value in model.parameters.items()}
    with torch.no_grad():
        outputs = learner.check({**learner.layout(), **model.parameters}, task)
        learner.check({**learner.layout(), **large}, task)
    if _bytes(task) != before:
        raise InputError(CHANGED_EXAMPLES)
    for name, value in model.parameters.items():
        if not torch.equal(large[name], 10 * value):
            raise InputError(CHANGED_WEIGHT.format(name))
    if isinstance(outputs, torch.Tensor) and outputs.ndim == 2 and outputs.shape[1] < ways:
        raise InputError(
            f"the model gives {outputs.shape[1]} outputs, {ways} ways need {ways}: set its number of outputs, which is "
            "one of the keys of `model`, or lower the ways"
        )
    return outputs


def _bytes(task: Task) -> list[bytes]:
    """The numbers of a task's tensors, NaN included."""
    return [tensor.numpy().tobytes() for part in task for tensors in part for tensor in tensors]


def _try_one_task(engine: Engine, theta: np.ndarray, task: Task, judged: Learner, ways: int) -> bool:
    """Compute one task, so that pieces that do not fit are refused before any worker is started; whether its gradient
    is anything but zero. `judged` is the learner of evaluation, whose model must have an output for each of `ways`."""
    try:
        outputs = _outputs(judged, engine.tensors(task), ways)
        if outputs is not None and engine.learner.loss in LOSSES.values():
            one_tensor(outputs)
        (losses, rows), (_, again) = (engine.meta_gradients(torch.from_numpy(theta), [task]) for _ in range(2))
        assert losses.shape == (1,)
        if rows.numpy().tobytes() != again.numpy().tobytes():
            raise InputError(TWO_RESULTS)
        return bool(rows.any())
    except InputError:
        raise
    except Exception as error:
        shapes = [list(array.shape) for part in task for arrays in part for array in arrays]
        loop = "; if the model is not made for vmap, set engine.kind=loop" if engine.kind == "vmap" else ""
        parts = "learner.environment, model.name" if engine.learner.measures else "model.name, loss, task.scheme"
        raise InputError(
            f"model, loss and learner could not compute one task of arrays {shapes} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}): "
            f"check {parts} and your own code{loop} (-v shows the traceback)"
        ) from error
