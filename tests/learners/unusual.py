"""Learners as a user might write them: each leans on a part of the seam that MAML and Reptile leave alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metadist.core.task import Examples
from metadist.learners import MAML, Context, Fast, Learner
from metadist.learners.learner import Tensors


@dataclass(frozen=True, kw_only=True)
class LearnedRates(MAML):
    """Meta-SGD with a rate for every parameter and step: theta holds more than the model's parameters."""

    def layout(self) -> Tensors:
        draws = torch.Generator().manual_seed(7)
        rates = {
            f"rate of {name}": self.inner_lr * torch.rand(self.inner_steps, *value.shape, generator=draws)
            for name, value in self.model.parameters.items()
        }
        return self.model.parameters | rates

    def update(self, theta: Tensors, fast: Fast, gradient: Tensors, k: int) -> Fast:
        rates = {name: theta[f"rate of {name}"][k] for name in fast.weights}
        return fast._replace(weights={name: w - rates[name] * gradient[name] for name, w in fast.weights.items()})


@dataclass(frozen=True, kw_only=True)
class Nesterov(MAML):
    """Inner momentum from a learned start, which the derivative passes through; the loss is taken ahead of it."""

    def layout(self) -> Tensors:
        start = {f"start of {name}": torch.full_like(value, 0.1) for name, value in self.model.parameters.items()}
        return self.model.parameters | start

    def begin(self, theta: Tensors, support: Examples, context: Context) -> Fast:
        fast = super().begin(theta, support, context)
        return fast._replace(state={name: theta[f"start of {name}"] for name in fast.weights})

    def inner_loss(self, theta: Tensors, fast: Fast, support: Examples, k: int) -> Tensor:
        ahead = {name: w - 0.5 * self.inner_lr * fast.state[name] for name, w in fast.weights.items()}
        return super().inner_loss(theta, fast._replace(weights=ahead), support, k)

    def update(self, theta: Tensors, fast: Fast, gradient: Tensors, k: int) -> Fast:
        velocity = {name: 0.5 * v + gradient[name] for name, v in fast.state.items()}
        return Fast({name: w - self.inner_lr * velocity[name] for name, w in fast.weights.items()}, velocity)


@dataclass(frozen=True, kw_only=True)
class Counting(MAML):
    """The rate falls with the number of steps taken, which an integer in the state counts."""

    def begin(self, theta: Tensors, support: Examples, context: Context) -> Fast:
        return super().begin(theta, support, context)._replace(state={"steps": torch.tensor(0)})

    def inner_loss(self, theta: Tensors, fast: Fast, support: Examples, k: int) -> Tensor:
        return super().inner_loss(theta, fast, support, k) * (1 + 0.3 * fast.state["steps"])

    def update(self, theta: Tensors, fast: Fast, gradient: Tensors, k: int) -> Fast:
        rate = self.inner_lr / (1 + fast.state["steps"])
        weights = {name: w - rate * gradient[name] for name, w in fast.weights.items()}
        return Fast(weights, {"steps": fast.state["steps"] + 1})


@dataclass(frozen=True, kw_only=True)
class Anchored(MAML):
    """Adapts near where it began, which the state holds unchanged (a proximal term, as in iMAML)."""

    def begin(self, theta: Tensors, support: Examples, context: Context) -> Fast:
        fast = super().begin(theta, support, context)
        return fast._replace(state=dict(fast.weights))

    def inner_loss(self, theta: Tensors, fast: Fast, support: Examples, k: int) -> Tensor:
        away = sum((w - fast.state[name]).square().sum() for name, w in fast.weights.items())
        return super().inner_loss(theta, fast, support, k) + 0.5 * away


@dataclass(frozen=True, kw_only=True)
class FromSupport(MAML):
    """Begins from weights that the support set and theta give (a head from class means, an encoder of the task)."""

    def begin(self, theta: Tensors, support: Examples, context: Context) -> Fast:
        fast = super().begin(theta, support, context)
        shift = self.model(theta, *support.inputs).square().mean()
        return fast._replace(weights={name: w * (1 + 0.1 * shift) for name, w in fast.weights.items()})


@dataclass(frozen=True, kw_only=True)
class OwnHead(Learner):
    """Not MAML: adapts the model's head by gradient descent, by its own rule for names."""

    def adapted_names(self) -> list[str]:
        return ["head.weight", "head.bias"]

    def begin(self, theta: Tensors, support: Examples, context: Context) -> Fast:
        return Fast({name: 0.9 * theta[name] for name in self.adapted_names()}, {})

    def update(self, theta: Tensors, fast: Fast, gradient: Tensors, k: int) -> Fast:
        return fast._replace(weights={name: w - self.inner_lr * gradient[name] for name, w in fast.weights.items()})


class Annealed(MAML):
    """Its outer loss grows over the run, by the meta-step that the context tells."""

    def outer_loss(self, theta: Tensors, fast: Fast, query: Examples, context: Context) -> Tensor:
        return super().outer_loss(theta, fast, query, context) * (1 + context.step)


class AnnealedByUnpacking(MAML):
    def outer_loss(self, theta: Tensors, fast: Fast, query: Examples, context: Context) -> Tensor:
        step, meta_steps, *_ = context
        return super().outer_loss(theta, fast, query, context) * (1 + step / meta_steps)


class AnnealedByIndex(MAML):
    def outer_loss(self, theta: Tensors, fast: Fast, query: Examples, context: Context) -> Tensor:
        return super().outer_loss(theta, fast, query, context) * (1 + context[0])
