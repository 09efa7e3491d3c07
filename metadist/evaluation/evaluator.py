"""Tasks adapted and measured at fixed weights, with baselines on the same tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from metadist.core.errors import InputError
from metadist.core.measure import Better
from metadist.core.random import Draws
from metadist.core.task import Task, TaskId
from metadist.data.sources import Source
from metadist.engine import Engine
from metadist.evaluation.baselines import Baseline, OwnBaseline, fitted, from_scratch
from metadist.models.losses import Loss


@dataclass(frozen=True)
class Evaluator:
    """Measures tasks of `source` with an engine, whose learner has the inner steps of evaluation.

    metrics: by name, (outputs, targets) -> scalar, where the learner has no measures. transductive: query examples
    share one batch. scratch_steps, scratch_lr: Adam steps and rate of the from-scratch baseline. training_step: the
    meta-step whose training tasks some baselines look at. own_baselines: the user's, by name.
    """

    engine: Engine
    source: Source
    metrics: dict[str, Loss]
    transductive: bool
    scratch_steps: int
    scratch_lr: float = 0.01
    training_step: int = 0
    own_baselines: Mapping[str, OwnBaseline] = field(default_factory=dict)
    _fitted: dict[str, Baseline] = field(default_factory=dict, repr=False, compare=False)
    _shapes: list[tuple[int, ...]] = field(default_factory=list, repr=False, compare=False)

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
        and {"baseline/metric": [n]} (of `initial` [n, inner_steps + 1]) of each baseline named. `draws` are the tasks'
        own random streams. With `from_scratch` alone, which is slow and so of fewer tasks, nothing else is computed."""
        if tuple(baselines) == ("from_scratch",):
            return self.evaluate_baselines(baselines, tasks, draws)
        measured = self.engine.evaluate(theta, tasks, self.metrics, self.transductive, draws, step, meta_steps)
        return _arrays(measured) | self.evaluate_baselines(baselines, tasks, draws)

    def evaluate_baselines(
        self, baselines: Sequence[str], tasks: Sequence[Task], draws: Sequence[Draws] | None = None
    ) -> dict[str, np.ndarray]:
        """{"baseline/metric": [n]} (of `initial` [n, inner_steps + 1]) of each baseline named."""
        results = {}
        for baseline in baselines:
            if baseline == "initial":
                theta = self.engine.initial_theta()
                found = _arrays(self.engine.evaluate(theta, tasks, self.metrics, self.transductive, draws))
                results |= {f"initial/{metric}": values for metric, values in found.items()}
                continue
            rows = [self._baseline(baseline, task) for task in tasks]
            for metric in rows[0]:
                results[f"{baseline}/{metric}"] = np.array([row[metric] for row in rows])
        return results

    def _baseline(self, name: str, task: Task) -> Mapping[str, float]:
        """One task's metrics by a baseline."""
        tensors, measures = self.engine.tensors(task), self.engine.learner.measures
        if name in self.own_baselines:
            found = self.own_baselines[name](task)
            if measures:
                return _measured(name, found, measures)
            outputs = self._as_the_models(name, found, task).to(tensors.query.inputs[0].device)
        elif name == "from_scratch":
            weights = from_scratch(self.engine.learner, tensors, self.scratch_steps, self.scratch_lr)
            with torch.no_grad():
                outputs = self.engine.outputs(weights, tensors, self.transductive)
        else:
            if name not in self._fitted:
                self._fitted[name] = fitted(name, lambda i: self.source(TaskId("train", self.training_step, i)))
            outputs = torch.from_numpy(self._fitted[name](task)).to(tensors.query.inputs[0].device)
        targets = tensors.query.targets
        return {metric: float(measure(outputs, *targets)) for metric, measure in self.metrics.items()}

    def _as_the_models(self, name: str, found: object, task: Task) -> torch.Tensor:
        """Outputs of a user's baseline, whose shape must be that of the model's: another one could be broadcast to
        wrong figures. Raises InputError."""
        if not self._shapes:
            predict = self.engine.adapt(self.engine.initial_theta(), task.support)
            self._shapes.append(tuple(predict(*task.query.inputs, transductive=self.transductive).shape))
        shape = len(task.query.inputs[0]), *self._shapes[0][1:]
        try:
            outputs = torch.as_tensor(found)
        except (TypeError, ValueError, RuntimeError):
            raise InputError(
                f"baseline {name} gave a {type(found).__name__}: give an array, one row for each query example"
            ) from None
        narrower = outputs.ndim == len(shape) == 2 and outputs.shape[1] < shape[1] and "accuracy" in self.metrics
        if tuple(outputs.shape) != shape and not (narrower and len(outputs) == shape[0]):
            raise InputError(
                f"baseline {name} gave outputs of shape {list(outputs.shape)}, and the model's are {list(shape)}: give "
                "one row for each query example, as the model does"
            )
        return outputs.to(self.engine.dtype) if outputs.is_floating_point() else outputs


def _arrays(measured: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: values.cpu().numpy().astype(np.float64) for name, values in measured.items()}


def _measured(name: str, found: object, measures: Mapping[str, Better]) -> dict[str, float]:
    """What a user's baseline says of a task of a learner with `measures`. Raises InputError where that is not their
    values."""
    first = next(iter(measures))
    if not isinstance(found, Mapping) or first not in found or not found.keys() <= measures.keys():
        given = f"{list(found)}" if isinstance(found, Mapping) else f"a {type(found).__name__}"
        raise InputError(
            f"baseline {name} gave {given}: the learner is judged by {', '.join(measures)}, so it must give a mapping "
            f"that has {first!r}"
        )
    return {key: float(value) for key, value in found.items()}
