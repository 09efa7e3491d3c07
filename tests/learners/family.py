"""Every learner of the package in a small case: a smooth network, and options that bring out its parts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metadist.core.task import Task
from metadist.learners import LEARNERS, Learner
from metadist.learners.cavia import CAVIA
from metadist.learners.evolution import EvolutionStrategies
from metadist.learners.heads import ClosedForm
from metadist.learners.imaml import IMAML
from metadist.learners.inner_optimizers import SGD, Adam
from metadist.learners.maml import MAML
from metadist.learners.maml_plus_plus import MAMLPlusPlus
from metadist.learners.meta_sgd import MetaSGD
from metadist.learners.platipus import PLATIPUS
from metadist.learners.prototypes import ProtoMAML
from metadist.learners.reptile import Reptile
from metadist.learners.ridge import R2D2
from metadist.learners.task_adaptive import TaskAdaptiveMAML
from metadist.models import Model
from metadist.models.layers import BatchNorm
from metadist.models.losses import cross_entropy, mean_squared_error

from .small import classification_task, regression_task


class Split(nn.Module):
    """[n, inputs] -> [n, outputs] by `features` and `head`, smooth, with a norm and, if asked, a context."""

    def __init__(self, inputs: int, outputs: int, context: int = 0, norm: Callable[[int], nn.Module] = nn.LayerNorm):
        super().__init__()
        self.context = nn.Parameter(torch.zeros(context)) if context else None
        self.body = nn.Sequential(nn.Linear(inputs + context, 5), nn.Tanh(), norm(5))
        self.head = nn.Linear(5, outputs)

    def features(self, x: Tensor) -> Tensor:
        if self.context is not None:
            x = torch.cat([x, self.context.expand(len(x), -1)], dim=1)
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Case(NamedTuple):
    """A learner's class, its options, and whether it is tried on regression."""

    kind: type[Learner]
    options: dict[str, Any] = {}
    regression: bool = False
    context: int = 0
    norm: Callable[[int], nn.Module] = nn.LayerNorm

    def learner(self, **changes: Any) -> Learner:
        torch.manual_seed(3)
        inputs, outputs = (2, 1) if self.regression else (4, 3)
        model = Model(Split(inputs, outputs, self.context, self.norm))
        loss: Callable[..., Tensor] = mean_squared_error if self.regression else cross_entropy
        steps = {} if issubclass(self.kind, ClosedForm) else {"inner_steps": 3, "inner_lr": 0.2}
        return self.kind(model=model, loss=loss, **(steps | self.options | changes))

    def task(self, seed: int = 0) -> Task:
        return regression_task(seed) if self.regression else classification_task(seed)


OPTIONS = {
    "maml, regression": Case(MAML, {}, True),
    "maml, momentum": Case(MAML, {"inner_optimizer": SGD(0.9)}),
    "maml, nesterov": Case(MAML, {"inner_optimizer": SGD(0.9, nesterov=True)}),
    "maml, adam": Case(MAML, {"inner_optimizer": Adam(), "inner_lr": 0.05}),
    "meta_sgd, positive": Case(MetaSGD, {"positive": True}, True),
    "maml++": Case(MAMLPlusPlus, {"multi_step_until": 10}),
    "maml++, regression": Case(MAMLPlusPlus, {"multi_step_until": 10, "rate_per_step": False}, True),
    "maml++, head": Case(MAMLPlusPlus, {"adapted": "head.*"}),
    "maml++, last step": Case(MAMLPlusPlus),
    "maml++, statistics": Case(MAMLPlusPlus, {"per_step_statistics": True, "multi_step_until": 1}, norm=BatchNorm),
    "maml++, first order": Case(MAMLPlusPlus, {"first_order_until": 5}),
    "task_adaptive, head": Case(TaskAdaptiveMAML, {"adapted": "head.*"}, True),
    "reptile": Case(Reptile, {"inner_batch": 2}),
    "reptile, adam": Case(Reptile, {"inner_optimizer": Adam(beta1=0.0), "inner_lr": 0.05}),
    "imaml": Case(IMAML, {"inner_steps": 60, "proximal": 3.0, "inner_lr": 0.1}),
    "imaml, neumann": Case(IMAML, {"inner_steps": 20, "proximal": 3.0, "solver": "neumann"}, True),
    "evolution, inner": Case(EvolutionStrategies, {"inner_directions": 3}, True),
    "platipus": Case(PLATIPUS, {"samples": 3, "kl_weight": 1e-3}),
    "platipus, regression": Case(PLATIPUS, {"samples": 3, "kl_weight": 1e-3, "predicts": "values"}, True),
    "cavia": Case(CAVIA, {}, True, 3),
    "r2d2": Case(R2D2, {"initial_lambda": 2.0}),
    "r2d2, regression": Case(R2D2, {"initial_lambda": 2.0}, True),
    "protomaml, head": Case(ProtoMAML, {"adapted": "head.*"}),
    "protomaml, body": Case(ProtoMAML, {"adapted": "body.*"}),
}
ON_EXAMPLES = {name: own for name, own in LEARNERS.items() if not own[0].measures}
CASES = {name: Case(kind, options) for name, (kind, options, _) in ON_EXAMPLES.items()} | OPTIONS
"""Every learner of labelled examples as its name in a job has it, unless it needs options to be tried, and others."""
OWN_ESTIMATOR = [name for name, case in CASES.items() if case.kind in (Reptile, IMAML, EvolutionStrategies)]
FIRST_ORDER = ["fomaml", "maml++, first order"]
