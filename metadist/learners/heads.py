"""What learners need that make their own head from the support set: features, class means, one-hot labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from metadist.core.errors import InputError
from metadist.core.task import Examples
from metadist.learners.learner import Fast, Learner, Tensors
from metadist.models import Model
from metadist.models.model import HEAD

PRESENT = "classes present"
READERS = "protonet, r2d2, protomaml and task_adaptive"


def head_of(model: Model) -> nn.Linear:
    """The model's linear `head`. Raises InputError where it has none, or no `features` that come before it."""
    head = getattr(model.module, "head", None)
    if not model.splits or not isinstance(head, nn.Linear):
        raise InputError(f"{READERS} need a model with a method `features(*inputs)` and a linear layer `head`")
    if model.has_dropout:
        raise InputError(f"{READERS} take the model's features by themselves, without dropout: set its p to 0")
    return head


def without_head(model: Model) -> Tensors:
    """The parameters of all but the head."""
    head_of(model)
    return {name: value for name, value in model.parameters.items() if not name.startswith(HEAD)}


def features(model: Model, theta: Tensors, inputs: tuple[Tensor, ...]) -> Tensor:
    """What the head is given, [n, d]."""
    return model.features(theta, *inputs).flatten(1)


def one_hot(labels: Tensor, ways: int, dtype: torch.dtype) -> Tensor:
    """labels [n] -> [n, ways]."""
    return (labels.unsqueeze(1) == torch.arange(ways, device=labels.device)).to(dtype)


def classes_present(support: Examples, ways: int) -> Tensor:
    """Of which classes the support set has an example, [ways]: labels may have gaps."""
    return one_hot(support.targets[0], ways, torch.bool).any(dim=0)


def class_means(model: Model, theta: Tensors, support: Examples, ways: int) -> Tensor:
    """The mean feature of each class, [ways, d]; 0 of one without examples, which `classes_present` tells. Raises
    InputError where the task has no classes."""
    if not ways:
        raise InputError("class means need classes: this learner is for classification")
    rows = features(model, theta, support.inputs)
    members = one_hot(support.targets[0], ways, rows.dtype)
    return members.T @ rows / members.sum(0).clamp(min=1).unsqueeze(1)


def target_columns(support: Examples, ways: int, like: Tensor) -> Tensor:
    """Targets as columns [n, ways] or [n, d]: one-hot classes, or values."""
    if ways:
        return one_hot(support.targets[0], ways, like.dtype)
    return torch.cat([y.reshape(len(y), -1) for y in support.targets], dim=1).to(like.dtype)


@dataclass(frozen=True, kw_only=True)
class ClosedForm(Learner):
    """A learner whose `begin` makes a head from features of the support set: there are no inner steps, and the model's
    own head is not used and not learned."""

    inner_steps: int = 0

    needs_ways: ClassVar[bool] = True
    any_ways: ClassVar[bool] = True
    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("inner_lr", "inner_steps", "first_order"), "it adapts in closed form"
    )
    before: ClassVar[str] = "adapted in closed form"

    def __post_init__(self) -> None:
        if self.inner_steps or self.first_order:
            raise ValueError("this learner adapts in closed form: leave inner_steps and first_order out")

    def layout(self) -> Tensors:
        return without_head(self.model)

    def adapted_names(self) -> list[str]:
        return []

    def update(self, theta: Tensors, fast: Fast, gradient: Tensors, k: int) -> Fast:
        raise AssertionError("there are no inner steps")
