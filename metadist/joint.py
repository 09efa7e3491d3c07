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
from metadist.models.model import HEAD
from metadist.server import Optimization, Server
from metadist.sources import ClassSource
from metadist.task import TaskId
from metadist.worker import LEARNER_STREAM

BATCH = 64


def joint_weights(config: Config, shapes: Shapes) -> Weights:
    """The run's theta whose model was trained by Adam at meta_lr on all tasks as if they were one, without an inner
    loop: on values, or to tell all training classes apart, with a head of zeros in the place of that classifier's.

    Raises InputError for tasks whose labels mean nothing beyond the task.
    """
    trained = _classifier(config, shapes) if shapes.classification else _regressor(config, shapes)
    run = make_engine(config, shapes, device="cpu")
    return Weights(config.evaluation.joint_steps, run.layout.flatten({**run.learner.layout(), **trained}).numpy())


def _regressor(config: Config, shapes: Shapes) -> dict[str, torch.Tensor]:
    source, steps = make_source(config), config.evaluation.joint_steps
    run = make_engine(config, shapes, device="cpu")
    engine = Engine(MAML(model=run.learner.model, loss=run.learner.loss, inner_steps=0), "vmap")
    server = Server(engine.initial_theta().numpy(), Optimization(meta_lr=config.meta_lr, meta_steps=steps))
    weights = server.weights()
    for step in range(steps):
        chunk = Chunk("train", step, 0, config.batch_size(config.num_workers))
        draws = [Draws(config.seed, task, LEARNER_STREAM) for task in chunk.tasks]
        theta = torch.from_numpy(weights.theta)
        losses, rows = engine.meta_gradients(theta, [source(task) for task in chunk.tasks], step, 1, draws)
        report = ChunkReport(chunk, losses.numpy(), rows.norm(dim=1).numpy(), {})
        weights, _ = server.apply(step, (report, rows.numpy()))
    return engine.layout.unflatten(torch.from_numpy(weights.theta))


def _classifier(config: Config, shapes: Shapes) -> dict[str, torch.Tensor]:
    dataset, source = open_data(config), make_source(config)
    if dataset is None or not isinstance(source, ClassSource):
        raise InputError("evaluation.baselines: joint needs classes that are the same in every task (scheme classes)")
    table = dataset.splits["train"]
    model = make_model(config, shapes._replace(outputs=len(table.counts)))
    run = make_engine(config, shapes, device="cpu").learner.model
    if not any(name.startswith(HEAD) for name in run.parameters):
        raise InputError("evaluation.baselines: joint needs a model whose last layer is named `head`")
    weights = {name: value.clone().requires_grad_() for name, value in model.parameters.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=config.meta_lr, foreach=False)
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
