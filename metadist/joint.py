"""Joint training: what fine-tuning starts from without meta-learning. Runs in the driver's process."""

import numpy as np
import torch
import torch.nn.functional as F

from metadist.config import Config
from metadist.config.build import Shapes, make_engine, make_model, make_source, open_data
from metadist.draws import Draws
from metadist.engine import Engine
from metadist.errors import InputError
from metadist.learners import MAML
from metadist.messages import Chunk, ChunkReport, Weights
from metadist.models import MODELS
from metadist.models.model import HEAD
from metadist.server import Optimization, Server
from metadist.sources import ClassSource
from metadist.task import TaskId
from metadist.worker import LEARNER_STREAM

BATCH = 64


def check_joint(config: Config, shapes: Shapes) -> None:
    """Raise InputError where classes, or the model, do not allow the joint baseline."""
    if not shapes.classification:
        return
    if not isinstance(make_source(config), ClassSource):
        raise InputError("evaluation.baselines: joint needs classes that are the same in every task (scheme classes)")
    if config.model.name not in (*MODELS, "auto"):
        raise InputError("evaluation.baselines: joint, for classes, needs a built-in model, to choose its outputs")


def joint_weights(config: Config, shapes: Shapes) -> Weights:
    """The run's theta whose model was trained by Adam on all tasks as if they were one, without an inner
    loop: on values, or to tell all training classes apart, with a head of zeros in the place of that classifier's.
    """
    check_joint(config, shapes)
    trained = _classifier(config, shapes) if shapes.classification else _regressor(config, shapes)
    run = make_engine(config, shapes, device="cpu")
    return Weights(config.evaluation.joint_steps, run.layout.flatten(run.learner.with_model(trained)).numpy())


def _regressor(config: Config, shapes: Shapes) -> dict[str, torch.Tensor]:
    source, steps = make_source(config), config.evaluation.joint_steps
    run = make_engine(config, shapes, device="cpu")
    engine = Engine(MAML(model=run.learner.model, loss=run.learner.loss, inner_steps=0), "vmap")
    server = Server(engine.initial_theta().numpy(), Optimization(meta_lr=config.evaluation.joint_lr))
    weights = server.weights()
    for step in range(steps):
        chunk = Chunk("train", step, 0, config.batch_size(config.num_workers))
        draws = [Draws(config.seed, task, LEARNER_STREAM) for task in chunk.tasks]
        theta = torch.from_numpy(weights.theta)
        tasks = [source(arrived(config, task)) for task in chunk.tasks]
        losses, rows = engine.meta_gradients(theta, tasks, step, 1, draws)
        report = ChunkReport(chunk, losses.numpy(), rows.norm(dim=1).numpy(), {})
        weights, _ = server.apply(step, (report, rows.numpy()))
    return engine.layout.unflatten(torch.from_numpy(weights.theta))


def arrived(config: Config, task: TaskId) -> TaskId:
    """A task of the run's last meta-step, before which all that arrive online have arrived; else the task itself."""
    if not config.task.steps_per_round:
        return task
    return TaskId("train", config.meta_steps - 1, task.step * config.batch_size(config.num_workers) + task.index)


def _classifier(config: Config, shapes: Shapes) -> dict[str, torch.Tensor]:
    dataset, run = open_data(config), make_engine(config, shapes, device="cpu").learner.model
    assert dataset is not None
    table = dataset.splits["train"]
    model = make_model(config, shapes._replace(outputs=len(table.counts)))
    weights = {name: value.clone().requires_grad_() for name, value in model.parameters.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=config.evaluation.joint_lr, foreach=False)
    for step in range(config.evaluation.joint_steps):
        draws = Draws(config.seed, TaskId("train", step, 0), LEARNER_STREAM)
        rows = np.array([draws.below(int(table.counts.sum())) for _ in range(BATCH)])
        labels = torch.from_numpy(np.searchsorted(table.starts, rows, side="right") - 1)
        inputs = [torch.from_numpy(np.array(array)) for array in table.gather(rows).inputs]
        optimizer.zero_grad()
        F.cross_entropy(model(weights, *inputs), labels).backward()
        optimizer.step()
    return {
        name: torch.zeros_like(value) if name.startswith(HEAD) else weights[name].detach()
        for name, value in run.parameters.items()
    }
