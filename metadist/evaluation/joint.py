"""Joint training: what fine-tuning starts from without meta-learning. Runs in the driver's process.

A baseline of the model and the tasks alone: whatever the run's learner and meta-batch, all weights are trained by Adam
on batches of one size, then fine-tuned in every task by plain gradient descent.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from metadist.config import Config
from metadist.core.errors import Diverged, InputError
from metadist.core.messages import Chunk, ChunkReport, Weights, plan
from metadist.core.random import Draws
from metadist.core.task import TaskId
from metadist.data.sources import ClassSource
from metadist.engine import Engine
from metadist.fleet.server import Optimization, Server
from metadist.fleet.worker import LEARNER_STREAM, Protocol, Worker
from metadist.learners import MAML, Learner
from metadist.learners.inner_optimizers import SGD
from metadist.models import MODELS
from metadist.models.model import HEAD
from metadist.run.auto import chunk_size, make_method
from metadist.run.build import Shapes, make_loss, make_model, make_source, metrics, open_data

EXAMPLES, TASKS = 64, 25
"""A batch: so many examples of all training classes; without classes, the query sets of so many tasks."""
CLASS_RATE, VALUE_RATE, STEPS = 0.4, 0.01, 10
"""Of the fine-tuning, where neither the job nor the learner says. Rates of Finn et al. 2017 (Omniglot, sinusoid)."""


def check_joint(config: Config, shapes: Shapes) -> None:
    """Raise InputError where classes, or the model, do not allow the joint baseline."""
    if not shapes.classification:
        return
    if not isinstance(make_source(config), ClassSource):
        raise InputError("evaluation.baselines: joint needs classes that are the same in every task (scheme classes)")
    if config.model.name not in (*MODELS, "auto"):
        raise InputError("evaluation.baselines: joint, for classes, needs a built-in model, to choose its outputs")
    if config.model.weights:
        raise InputError("evaluation.baselines: joint, for classes, trains its own weights: leave model.weights out")


def fine_tuning(config: Config, shapes: Shapes, learner: Learner) -> tuple[float, int]:
    """The rate and the number of steps of plain gradient descent on all weights, in every task."""
    own, steps = config.evaluation, learner.inner_steps or STEPS
    rate = CLASS_RATE if shapes.classification else VALUE_RATE
    plain = isinstance(learner, MAML) and learner.inner_optimizer == SGD() and not learner.learned_rates
    if plain and set(learner.adapted_names()) == set(learner.model.parameters):
        rate = own.inner_lr or learner.inner_lr
    if own.inner_steps is not None:
        steps = own.inner_steps
    return own.joint_inner_lr or rate, steps if own.joint_inner_steps is None else own.joint_inner_steps


def joint_results(config: Config, shapes: Shapes, learner: Learner) -> dict[str, np.ndarray]:
    """{metric: [T, inner_steps + 1]} of the tasks of evaluation; `learner` is the run's."""
    check_joint(config, shapes)
    own, source = config.evaluation, make_source(config, evaluation=True)
    if shapes.classification:
        shapes = shapes._replace(outputs=source.outputs)
    rate, steps = fine_tuning(config, shapes, learner)
    engine = _engine(config, shapes, inner_lr=rate, inner_steps=steps)
    weights = Weights(own.joint_steps, engine.layout.flatten(joint_weights(config, shapes)).numpy())
    measures = metrics(config, shapes, source.outputs)
    worker = Worker(engine, source, Protocol(engine, source, measures, own.transductive, 0), config.seed, 1)
    chunks = plan(own.split, 0, own.test_tasks, chunk_size(config, engine))
    results = [worker.evaluate(weights, chunk) for chunk in chunks]
    return {name: np.concatenate([result[name] for result in results]) for name in measures}


def joint_weights(config: Config, shapes: Shapes) -> dict[str, torch.Tensor]:
    """The model's weights, trained by Adam on all tasks as if they were one, without an inner loop: on values, or to
    tell all training classes apart, with a head of zeros in the place of that classifier's."""
    return _classifier(config, shapes) if shapes.classification else _regressor(config, shapes)


def _engine(config: Config, shapes: Shapes, **options: Any) -> Engine:
    """Of plain MAML, on the driver's CPU."""
    learner = MAML(model=make_model(config, shapes), loss=make_loss(config, shapes), **options)
    return Engine(learner, make_method(config, learner, shapes.inputs).kind)


def _regressor(config: Config, shapes: Shapes) -> dict[str, torch.Tensor]:
    source, engine = make_source(config), _engine(config, shapes, inner_steps=0)
    server = Server(engine.initial_theta().numpy(), Optimization(meta_lr=config.evaluation.joint_lr))
    weights = server.weights()
    for step in range(config.evaluation.joint_steps):
        chunk = Chunk("train", step, 0, TASKS)
        draws = [Draws(config.seed, task, LEARNER_STREAM) for task in chunk.tasks]
        theta = torch.from_numpy(weights.theta)
        tasks = [source(arrived(config, task)) for task in chunk.tasks]
        losses, rows = engine.meta_gradients(theta, tasks, step, 1, draws)
        report = ChunkReport(chunk, losses.numpy(), rows.norm(dim=1).numpy(), {})
        try:
            weights, _ = server.apply(step, (report, rows.numpy()))
        except Diverged:  # which its figures, all NaN, then say: no reason to lose those of the run
            return engine.layout.unflatten(torch.full_like(theta, torch.nan))
    return engine.layout.unflatten(torch.from_numpy(weights.theta))


def arrived(config: Config, task: TaskId) -> TaskId:
    """A task of the run's last meta-step, before which all that arrive online have arrived; else the task itself."""
    if not config.task.steps_per_round:
        return task
    return TaskId("train", config.meta_steps - 1, task.step * TASKS + task.index)


def _classifier(config: Config, shapes: Shapes) -> dict[str, torch.Tensor]:
    dataset, plain = open_data(config), make_model(config, shapes)
    assert dataset is not None
    table = dataset.splits["train"]
    model = make_model(config, shapes._replace(outputs=len(table.counts)))
    weights = {name: value.clone().requires_grad_() for name, value in model.parameters.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=config.evaluation.joint_lr, foreach=False)
    for step in range(config.evaluation.joint_steps):
        draws = Draws(config.seed, TaskId("train", step, 0), LEARNER_STREAM)
        rows = np.array([draws.below(int(table.counts.sum())) for _ in range(EXAMPLES)])
        labels = torch.from_numpy(np.searchsorted(table.starts, rows, side="right") - 1)
        inputs = [torch.from_numpy(np.array(array)) for array in table.gather(rows).inputs]
        optimizer.zero_grad()
        with model.in_place():
            F.cross_entropy(model(weights, *inputs), labels).backward()
        optimizer.step()
    return {
        name: torch.zeros_like(value) if name.startswith(HEAD) else weights[name].detach()
        for name, value in plain.parameters.items()
    }
