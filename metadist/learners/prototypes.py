"""Class means of features: as a classifier (ProtoNet), and as the head that MAML starts from (ProtoMAML)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from metadist.core.errors import InputError
from metadist.core.task import Examples
from metadist.learners.heads import (
    PRESENT,
    ClosedForm,
    class_means,
    classes_present,
    features,
    head_of,
    without_head,
)
from metadist.learners.learner import Context, Fast, Tensors
from metadist.learners.maml import MAML
from metadist.models.losses import never
from metadist.models.model import HEAD


@dataclass(frozen=True, kw_only=True)
class ProtoNet(ClosedForm):
    """Logit of class c: -|f(x) - mean_c|^2, mean_c over the support features f of the class.

    Snell et al. 2017, equations 1 and 2 (https://arxiv.org/abs/1703.05175). Any number of ways, also other than in
    training. A class without support examples, where labels have gaps, is never predicted.
    """

    before: ClassVar[str] = "with class means"

    def begin(self, theta: Tensors, support: Examples, context: Context) -> Fast:
        means = class_means(self.model, theta, support, context.ways)
        return Fast({}, {"means": means, PRESENT: classes_present(support, context.ways)})

    def predict(self, theta: Tensors, fast: Fast, inputs: tuple[Tensor, ...]) -> Tensor:
        away = features(self.model, theta, inputs).unsqueeze(1) - fast.state["means"]
        return never(-away.square().sum(dim=2), fast.state[PRESENT])


@dataclass(frozen=True, kw_only=True)
class ProtoMAML(MAML):
    """MAML whose linear head starts as ProtoNet's: row c is 2 mean_c, bias c is -|mean_c|^2.

    Triantafillou et al. 2020, section 3 and equation 6 (https://arxiv.org/abs/1903.03096). The meta-gradient passes
    through the means. The head takes as many classes as the task has, also other than in training; it is no part of
    theta. It cannot be equal to chance before adaptation, because it is made from the support set. A class without
    support examples, where labels have gaps, is never predicted.
    """

    needs_ways: ClassVar[bool] = True
    any_ways: ClassVar[bool] = True
    before: ClassVar[str] = "with class means"

    def layout(self) -> Tensors:
        if head_of(self.model).bias is None:
            raise InputError("ProtoMAML's head needs a bias: build the model's `head` with one")
        return without_head(self.model)

    def begin(self, theta: Tensors, support: Examples, context: Context) -> Fast:
        means = class_means(self.model, theta, support, context.ways)
        present = {PRESENT: classes_present(support, context.ways)}
        head = {f"{HEAD}weight": 2 * means, f"{HEAD}bias": -means.square().sum(dim=1)}
        names = self.adapted_names()
        body = {name: theta[name] for name in names if not name.startswith(HEAD)}
        return self.start(body | {name: head[name] for name in names if name in head}, **present, **self._fixed(head))

    def _fixed(self, head: Tensors) -> Tensors:
        """The part of the head that is not adapted."""
        return {name: value for name, value in head.items() if name not in self.adapted_names()}

    def predict(self, theta: Tensors, fast: Fast, inputs: tuple[Tensor, ...]) -> Tensor:
        fixed = {name: value for name, value in fast.state.items() if name.startswith(HEAD)}
        return never(super().predict(theta | fixed, fast, inputs), fast.state[PRESENT])
