"""Joint training: what fine-tuning starts from without meta-learning. Runs in the driver's process.

A baseline of the model and the tasks alone: whatever the run's learner and meta-batch, all weights are trained by Adam
on batches of one size, then fine-tuned in every task by plain gradient descent.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from metadist.config.schema import EvaluationConfig
from metadist.core.errors import Diverged
from metadist.core.messages import Chunk, ChunkReport, Progress, plan, unseen
from metadist.core.random import LEARNER_STREAM, Draws
from metadist.core.task import TaskId
from metadist.data.sources import ClassSource, Source, sample
from metadist.engine import Engine
from metadist.evaluation.evaluator import Evaluator
from metadist.fleet.server import Optimization, Server
from metadist.learners import MAML, Learner
from metadist.learners.inner_optimizers import SGD
from metadist.models.model import HEAD, Model

EXAMPLES, TASKS = 64, 25
"""A batch: so many examples of all training classes; without classes, the query sets of so many tasks."""
CLASS_RATE, VALUE_RATE, STEPS = 0.4, 0.01, 10
"""Of the fine-tuning, where neither the job nor the learner says. Rates of Finn et al. 2017 (Omniglot, sinusoid)."""


def fine_tuning(settings: EvaluationConfig, classification: bool, learner: Learner) -> tuple[float, int]:
    """The rate and the number of steps of plain gradient descent on all weights, in every task."""
    steps = learner.inner_steps or STEPS
    rate = CLASS_RATE if classification else VALUE_RATE
    if learner.measures:
        rate = settings.inner_lr or learner.inner_lr
    plain = isinstance(learner, MAML) and learner.inner_optimizer == SGD() and not learner.learned_rates
    if plain and set(learner.adapted_names()) == set(learner.model.parameters):
        rate = settings.inner_lr or learner.inner_lr
    if settings.inner_steps is not None:
        steps = settings.inner_steps
    return settings.joint_inner_lr or rate, steps if settings.joint_inner_steps is None else settings.joint_inner_steps


@dataclass(frozen=True)
class Joint:
    """The joint baseline of one job.

    source: of training tasks. evaluator: the run's, whose tasks and metrics are used. make_model: a fresh model with
    that many outputs. make_engine: an engine of plain MAML (of a learner with measures: of itself) on the CPU, from
    outputs and options. inner_lr, inner_steps: of the fine-tuning. last_step: online, the meta-step before which all
    tasks have arrived; else None.
    """

    settings: EvaluationConfig
    seed: int
    source: Source
    evaluator: Evaluator
    classification: bool
    outputs: int
    make_model: Callable[[int], Model]
    make_engine: Callable[..., Engine]
    inner_lr: float
    inner_steps: int
    chunk_size: Callable[[Engine], int]
    last_step: int | None = None

    def results(self, progress: Progress = unseen) -> dict[str, np.ndarray]:
        """{metric: [T, inner_steps + 1]} of the tasks of evaluation; `progress` is told how many training steps are
        done."""
        engine = self.make_engine(self.outputs, inner_lr=self.inner_lr, inner_steps=self.inner_steps)
        theta = engine.layout.flatten(self.weights(progress))
        own = self.evaluator
        evaluator = Evaluator(engine, own.source, own.metrics, own.transductive, 0)
        chunks = plan(self.settings.split, 0, self.settings.test_tasks, self.chunk_size(engine))
        results = []
        for chunk in chunks:
            draws = [Draws(self.seed, task, LEARNER_STREAM) for task in chunk.tasks]
            tasks = sample(own.source, chunk.tasks)
            results.append(evaluator.evaluate(theta.clone(), tasks, draws, self.settings.joint_steps, 1))
        return {name: np.concatenate([result[name] for result in results]) for name in results[0]}

    def weights(self, progress: Progress = unseen) -> dict[str, torch.Tensor]:
        """The model's weights, trained by Adam on all tasks as if they were one, without an inner loop: on values, or
        to tell all training classes apart, with a head of zeros in the place of that classifier's."""
        return self._classifier(progress) if self.classification else self._regressor(progress)

    def arrived(self, task: TaskId) -> TaskId:
        """The task itself, or, online, one of the run's last meta-step, before which all tasks have arrived."""
        if self.last_step is None:
            return task
        return TaskId("train", self.last_step, task.step * TASKS + task.index)

    def _regressor(self, progress: Progress) -> dict[str, torch.Tensor]:
        engine = self.make_engine(self.outputs, inner_steps=0)
        server = Server(engine.initial_theta().numpy(), Optimization(meta_lr=self.settings.joint_lr))
        weights = server.weights()
        for step in range(self.settings.joint_steps):
            chunk = Chunk("train", step, 0, TASKS)
            draws = [Draws(self.seed, task, LEARNER_STREAM) for task in chunk.tasks]
            theta = torch.from_numpy(weights.theta)
            tasks = [self.source(self.arrived(task)) for task in chunk.tasks]
            losses, rows = engine.meta_gradients(theta, tasks, step, 1, draws)
            report = ChunkReport(chunk, losses.numpy(), rows.norm(dim=1).numpy(), {})
            try:
                weights, _ = server.apply(step, (report, rows.numpy()))
            except Diverged:  # which its figures, all NaN, then say: no reason to lose those of the run
                return engine.layout.unflatten(torch.full_like(theta, torch.nan))
            progress(step + 1, self.settings.joint_steps)
        return engine.layout.unflatten(torch.from_numpy(weights.theta))

    def _classifier(self, progress: Progress) -> dict[str, torch.Tensor]:
        assert isinstance(self.source, ClassSource)
        table, plain = self.source.tables["train"], self.make_model(self.outputs)
        model = self.make_model(len(table.counts))
        weights = {name: value.clone().requires_grad_() for name, value in model.parameters.items()}
        optimizer = torch.optim.Adam(weights.values(), lr=self.settings.joint_lr, foreach=False)
        for step in range(self.settings.joint_steps):
            draws = Draws(self.seed, TaskId("train", step, 0), LEARNER_STREAM)
            rows = np.array([draws.below(int(table.counts.sum())) for _ in range(EXAMPLES)])
            labels = torch.from_numpy(np.searchsorted(table.starts, rows, side="right") - 1)
            inputs = [torch.from_numpy(np.array(array)) for array in table.gather(rows).inputs]
            optimizer.zero_grad()
            with model.in_place():
                F.cross_entropy(model(weights, *inputs), labels).backward()
            optimizer.step()
            progress(step + 1, self.settings.joint_steps)
        return {
            name: torch.zeros_like(value) if name.startswith(HEAD) else weights[name].detach()
            for name, value in plain.parameters.items()
        }
