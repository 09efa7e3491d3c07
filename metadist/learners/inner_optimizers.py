"""How fast weights step along the inner gradient. Differentiated through like everything else in the inner loop."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Slots = dict[str, Tensor]


class InnerOptimizer(Protocol):
    """What a user's own `module:callable` must give. It sees one tensor of fast weights at a time; its methods are pure
    functions of tensors."""

    def begin(self, weight: Tensor) -> Slots:
        """What it remembers of a tensor, by name, before the first step."""
        ...

    def step(
        self, weight: Tensor, gradient: Tensor, slots: Slots, rate: Tensor | float, k: int
    ) -> tuple[Tensor, Slots]:
        """The tensor and what is remembered after inner step k = 0, 1, ...; rate: a number, or one per element."""
        ...


@dataclass(frozen=True)
class SGD:
    """w - rate * g; with momentum m, as torch.optim.SGD: v = m v + g, then w - rate * v, or w - rate * (g + m v) with
    `nesterov`."""

    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1 or (self.nesterov and not self.momentum):
            raise ValueError(f"momentum={self.momentum} must be in [0, 1), and above 0 with nesterov")

    def begin(self, weight: Tensor) -> Slots:
        return {"velocity": torch.zeros_like(weight)} if self.momentum else {}

    def step(
        self, weight: Tensor, gradient: Tensor, slots: Slots, rate: Tensor | float, k: int
    ) -> tuple[Tensor, Slots]:
        del k
        if not self.momentum:
            return weight - rate * gradient, {}
        velocity = self.momentum * slots["velocity"] + gradient
        along = gradient + self.momentum * velocity if self.nesterov else velocity
        return weight - rate * along, {"velocity": velocity}


@dataclass(frozen=True)
class Adam:
    """As torch.optim.Adam, both moments zero in every task: a task is a function of its name alone.

    The square root of the second moment has an infinite derivative at zero, where a weight has had no gradient; it is
    taken to be 0 there, so that second-order meta-gradients stay finite.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.epsilon > 0):
            raise ValueError(
                f"beta1={self.beta1}, beta2={self.beta2} must be in [0, 1), epsilon={self.epsilon} above 0"
            )

    def begin(self, weight: Tensor) -> Slots:
        first = {"first_moment": torch.zeros_like(weight)} if self.beta1 else {}
        return {**first, "second_moment": torch.zeros_like(weight)}

    def step(
        self, weight: Tensor, gradient: Tensor, slots: Slots, rate: Tensor | float, k: int
    ) -> tuple[Tensor, Slots]:
        first = gradient
        if self.beta1:
            first = self.beta1 * slots["first_moment"] + (1 - self.beta1) * gradient
        second = self.beta2 * slots["second_moment"] + (1 - self.beta2) * gradient**2
        unbiased = second / (1 - self.beta2 ** (k + 1))
        root = torch.where(unbiased > 0, unbiased, 1.0).sqrt() * (unbiased > 0)
        weight = weight - rate * (first / (1 - self.beta1 ** (k + 1))) / (root + self.epsilon)
        return weight, {"second_moment": second} | ({"first_moment": first} if self.beta1 else {})


def momentum(momentum: float = 0.9, nesterov: bool = False) -> SGD:
    """SGD that has momentum unless told otherwise."""
    return SGD(momentum, nesterov)


INNER_OPTIMIZERS = {"sgd": SGD, "momentum": momentum, "adam": Adam}
