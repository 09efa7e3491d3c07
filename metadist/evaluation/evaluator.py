"""Tasks adapted and measured at fixed weights, with baselines on the same tasks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from metadist.core.random import Draws
from metadist.core.task import Task, TaskId
from metadist.data.sources import Source
from metadist.engine import Engine
from metadist.evaluation.baselines import Baseline, fitted, from_scratch
from metadist.models.losses import Loss


@dataclass(frozen=True)
class Evaluator:
    """Measures tasks of `source` with an engine, whose learner has the inner steps of evaluation.

    metrics: by name, (outputs, targets) -> scalar. transductive: query examples share one batch. scratch_steps,
    scratch_lr: Adam steps and rate of the from-scratch baseline. training_step: the meta-step whose training tasks some
    baselines look at.
    """

    engine: Engine
    source: Source
    metrics: dict[str, Loss]
    transductive: bool
    scratch_steps: int
    scratch_lr: float = 0.01
    training_step: int = 0
    _fitted: dict[str, Baseline] = field(default_factory=dict, repr=False, compare=False)

    def evaluate(
        self,
        theta: torch.Tensor,
        tasks: Sequence[Task],
        draws: Sequence[Draws],
        step: int,
        meta_steps: int,
        baselines: Sequence[str] = (),
    ) -> dict[str, np.ndarray]:
        """{metric: float64 [n, inner_steps + 1]} of n tasks at theta [P], before adaptation and after every inner step,
        and {"baseline/metric": [n]} of each baseline named. `draws` are the tasks' own random streams."""
        measured = self.engine.evaluate(theta, tasks, self.metrics, self.transductive, draws, step, meta_steps)
        results = {name: values.cpu().numpy().astype(np.float64) for name, values in measured.items()}
        return results | self.evaluate_baselines(baselines, tasks)

    def evaluate_baselines(self, baselines: Sequence[str], tasks: Sequence[Task]) -> dict[str, np.ndarray]:
        """{"baseline/metric": [n]} of each baseline named."""
        results = {}
        for baseline in baselines:
            rows = [self._baseline(baseline, task) for task in tasks]
            for metric in self.metrics:
                results[f"{baseline}/{metric}"] = np.array([row[metric] for row in rows])
        return results

    def _baseline(self, name: str, task: Task) -> dict[str, float]:
        tensors = self.engine.tensors(task)
        if name == "from_scratch":
            weights = from_scratch(self.engine.learner, tensors, self.scratch_steps, self.scratch_lr)
            with torch.no_grad():
                outputs = self.engine.outputs(weights, tensors, self.transductive)
        else:
            if name not in self._fitted:
                self._fitted[name] = fitted(name, lambda i: self.source(TaskId("train", self.training_step, i)))
            outputs = torch.from_numpy(self._fitted[name](task)).to(tensors.query.inputs[0].device)
        targets = tensors.query.targets
        return {metric: float(measure(outputs, *targets)) for metric, measure in self.metrics.items()}
