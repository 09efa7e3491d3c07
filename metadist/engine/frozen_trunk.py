"""Where only the head adapts, the rest of the network is computed once per task, not once per inner step.

Its features of support and query set become one more entry of theta, and a task's inputs the numbers of its rows in
them. So any learner whose fast weights are the head's computes the same as before without knowing; the gradient it
finds for the features is then passed back through the trunk, once.
"""

from dataclasses import replace

import torch
from torch import Tensor

from metadist.core.task import Examples, Task
from metadist.engine.differentiation import Differentiator, Tensors
from metadist.learners import Context, Learner
from metadist.models import Model
from metadist.models.model import HEAD

FEATURES = "features of the task"


class HeadModel:
    """Stands in for a model: takes row numbers [n] of the features that come among the weights."""

    def __init__(self, model: Model):
        self._model = model
        self.parameters, self.constants, self.module = model.parameters, model.constants, model.module
        self.splits, self.has_dropout, self.recurrent = True, False, model.recurrent
        self.norm_parameters = model.norm_parameters

    @property
    def recomputes(self) -> str:
        return self._model.recomputes

    def __call__(self, weights: Tensors, rows: Tensor) -> Tensor:
        return self._model.head(weights, self.features(weights, rows))

    def features(self, weights: Tensors, rows: Tensor) -> Tensor:
        return weights[FEATURES][rows]


class Trunk:
    """The part of a learner's model that its inner loop leaves alone, and the learner of the rest."""

    def __init__(self, learner: Learner):
        self._model = learner.model
        self.learner: Learner = replace(learner, model=HeadModel(learner.model))  # pyright: ignore[reportArgumentType]

    def features(self, theta: Tensors, task: Task) -> Tensor:
        """[n support + n query, ...]; each set is one batch, with its own normalisation statistics."""
        return torch.cat([self._model.features(theta, *part.inputs) for part in task])

    def rest(self, theta: Tensors, task: Task, features: Tensor) -> tuple[Tensors, Task]:
        """theta without the trunk but with its features, and the task whose inputs are row numbers."""
        rows, cut = torch.arange(len(features), device=features.device), len(task.support.inputs[0])
        kept = {name: value for name, value in theta.items() if not self._is_trunk(name)} | {FEATURES: features}
        parts = zip((rows[:cut], rows[cut:]), task, strict=True)
        return kept, Task(*(Examples((numbers,), part.targets) for numbers, part in parts))

    def meta_gradient(
        self, ops: Differentiator, theta: Tensors, task: Task, context: Context
    ) -> tuple[Tensor, Tensors]:
        """What the learner's own `meta_gradient` returns, to rounding."""
        names = [name for name in theta if self._is_trunk(name)]

        def compute(*values: Tensor) -> list[Tensor]:
            return [self.features(theta | dict(zip(names, values, strict=True)), task)]

        (features,), pull = ops.pullback(compute, *(theta[name] for name in names))
        loss, gradient = self.learner.meta_gradient(ops, *self.rest(theta, task, features), context)
        gradient |= dict(zip(names, pull([gradient[FEATURES]]), strict=True))
        return loss, {name: gradient[name] for name in theta}

    def _is_trunk(self, name: str) -> bool:
        return name in self._model.parameters and not name.startswith(HEAD)


def trunk_of(learner: Learner, theta: Tensors, task: Task) -> Trunk | None:
    """The trunk of a learner that adapts nothing but the head of a model that can be split there.

    That the module's `head(features(x))` is its `forward(x)` is checked, to the bit, on a task's support set. A learner
    with mathematics of its own may look at weights or inputs that the head's learner does not have, so it gets none.
    """
    model, adapted = learner.model, learner.adapted_names()
    kinds = [kind for kind in type(learner).__mro__ if issubclass(kind, Learner)]
    ours = all(kind.__module__.startswith("metadist.learners.") for kind in kinds)
    ours = ours and not learner.statistics()
    only_head = bool(adapted) and all(name.startswith(HEAD) for name in adapted)
    whole_body = all(name in theta for name in model.parameters if not name.startswith(HEAD))
    if not (ours and only_head and whole_body and model.splits) or model.has_dropout:
        return None
    with torch.no_grad():
        like = next(iter(theta.values()))
        theta = {name: value.to(like) for name, value in model.parameters.items()} | theta
        whole = model(theta, *task.support.inputs)
        try:
            parts = model.head(theta, model.features(theta, *task.support.inputs))
        except Exception:  # a method `features` that is something else
            return None
    same = isinstance(parts, Tensor) and whole.shape == parts.shape and torch.equal(whole, parts)
    return Trunk(learner) if same else None
