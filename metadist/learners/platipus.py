"""PLATIPUS, probabilistic MAML: a distribution of initialisations, from which adaptation is sampled."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from metadist.core.errors import InputError
from metadist.core.random import Draws
from metadist.core.task import Examples, Task
from metadist.learners.learner import Context, Differentiation, Fast, Tensors
from metadist.learners.maml import MAML
from metadist.models.noise import normal

START = "start of "


@dataclass(frozen=True, kw_only=True)
class PLATIPUS(MAML):
    """theta ~ q = N(mu - gamma_q grad L_query(mu), v_q), phi from theta by MAML's inner loop; the loss is
    E L_query(phi) + kl_weight * KL(q || p); p = N(mu - gamma_p grad L_support(mu), v_p) is all that a test task has.

    Finn, Xu, Levine 2018, Algorithms 1 and 2 (https://arxiv.org/abs/1806.02817). Learned: mu, log variances v_p and v_q
    of every parameter, gamma_p and gamma_q. The meta-gradient is exact for the noise drawn, which comes from the task's
    key. In the evidence bound kl_weight would be 1 / number of query examples; a smaller one is usual, because the sum
    over a network's parameters drowns the loss. Evaluation adapts `samples` draws from p and averages what they
    predict: probabilities (`predicts="classes"`; outputs are then their logarithms) or outputs ("values").
    """

    samples: int = 10
    kl_weight: float = 1e-6
    initial_std: float = 0.02
    initial_rate: float = 0.01
    predicts: Literal["classes", "values"] = "classes"

    needs_ways: ClassVar[bool] = True
    refused: ClassVar[Mapping[str, str]] = {"adapted": "it adapts all parameters"}
    before: ClassVar[str] = "drawn from the prior"
    exact_meta_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1 or self.kl_weight < 0 or self.initial_std <= 0:
            raise ValueError("samples must be 1 or more, kl_weight 0 or more, initial_std above 0")

    def layout(self) -> Tensors:
        mean, spread = self.model.parameters, 2 * float(np.log(self.initial_std))
        variances = {
            f"log_variance_{which}/{name}": torch.full_like(value, spread)
            for which in ("p", "q")
            for name, value in mean.items()
        }
        like = next(iter(mean.values()))
        return mean | variances | {f"rate_{which}": torch.tensor([self.initial_rate]).to(like) for which in ("p", "q")}

    def draw(self, draws: Draws, support_size: int) -> dict[str, np.ndarray]:
        """noise: the key of the task's normal numbers."""
        del support_size
        return {"noise": np.array(draws.word() >> 1)}

    def begin(self, theta: Tensors, support: Examples, context: Context) -> Fast:
        """Fast weights [samples, ...]: the draw from q that training was given, or `samples` draws from p."""
        if bool(context.ways) != (self.predicts == "classes"):
            raise InputError("learner.predicts must be `classes` for classification and `values` for regression")
        if START + next(iter(self.model.parameters)) in context.draws:
            return self.start({name: context.draws[START + name] for name in self.model.parameters})
        mean, log_variance = self._prior(theta, support)
        return self.start(sample(mean, log_variance, context.draws["noise"], self.samples))

    def inner_loss(self, theta: Tensors, fast: Fast, support: Examples, k: int) -> Tensor:
        """The sum over samples, so that each descends its own loss."""
        del k
        outputs = self._outputs(theta, fast, support.inputs)
        return torch.stack([self.loss(own, *support.targets) for own in outputs.unbind()]).sum()

    def predict(self, theta: Tensors, fast: Fast, inputs: tuple[Tensor, ...]) -> Tensor:
        outputs = self._outputs(theta, fast, inputs)
        if self.predicts == "values":
            return outputs.mean(dim=0)
        return outputs.log_softmax(dim=-1).logsumexp(dim=0) - float(np.log(len(outputs)))

    def meta_gradient(
        self, ops: Differentiation, theta: Tensors, task: Task, context: Context
    ) -> tuple[Tensor, Tensors]:
        def objective(theta: Tensors) -> Tensor:
            mean = self._shifted(theta, task.query, "q")
            log_variance = self._log_variance(theta, "q")
            drawn = sample(mean, log_variance, context.draws["noise"], 1)
            start = {START + name: value for name, value in drawn.items()}
            fast = ops.adapt(self, theta, task.support, context._replace(draws=context.draws | start))
            loss = self.outer_loss(theta, fast, task.query, context)
            return loss + self.kl_weight * kl_divergence(mean, log_variance, *self._prior(theta, task.support))

        return ops.value_and_gradient(objective, theta)

    def _prior(self, theta: Tensors, support: Examples) -> tuple[Tensors, Tensors]:
        return self._shifted(theta, support, "p"), self._log_variance(theta, "p")

    def _log_variance(self, theta: Tensors, which: str) -> Tensors:
        return {name: theta[f"log_variance_{which}/{name}"] for name in self.model.parameters}

    def _shifted(self, theta: Tensors, examples: Examples, which: str) -> Tensors:
        """mu moved along the gradient of its loss on the examples."""

        def loss(mean: Tensors) -> Tensor:
            return self.loss(self.model(mean, *examples.inputs), *examples.targets)

        mean = {name: theta[name] for name in self.model.parameters}
        gradient = torch.func.grad(loss)(mean)
        if self.first_order:
            gradient = {name: g.detach() for name, g in gradient.items()}
        return {name: value - theta[f"rate_{which}"] * gradient[name] for name, value in mean.items()}

    def _outputs(self, theta: Tensors, fast: Fast, inputs: tuple[Tensor, ...]) -> Tensor:
        """[samples, n, ...], one after another: batched over weights, convolutions are slower."""
        samples = range(len(next(iter(fast.weights.values()))))
        weights = [theta | {name: w[number] for name, w in fast.weights.items()} for number in samples]
        return torch.stack([self.model(each, *inputs) for each in weights])


def sample(mean: Tensors, log_variance: Tensors, key: Tensor, count: int) -> Tensors:
    """`count` draws from independent normal distributions, [count, ...] each."""
    drawn = {}
    for number, (name, value) in enumerate(mean.items()):
        noise = normal(key + number, (count, *value.shape)).to(value.dtype)
        drawn[name] = value + (log_variance[name] / 2).exp() * noise
    return drawn


def kl_divergence(mean_q: Tensors, log_q: Tensors, mean_p: Tensors, log_p: Tensors) -> Tensor:
    """KL(q || p) of independent normal distributions, summed over all elements."""
    parts = [
        (
            log_p[name] - log_q[name] + (log_q[name].exp() + (mean_q[name] - mean_p[name]) ** 2) / log_p[name].exp() - 1
        ).sum()
        for name in mean_q
    ]
    return torch.stack(parts).sum() / 2
