"""Evolution strategies: theta moves by losses at perturbed weights, so that no loss needs a derivative."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from metadist.core.errors import InputError
from metadist.core.random import Draws
from metadist.core.task import Examples, Task
from metadist.learners.learner import Context, Differentiation, Fast, Tensors, at_once, one_by_one
from metadist.learners.maml import MAML
from metadist.models.noise import normal

KEY = "key of perturbations"
OUTER, INNER = 0, 1_000_003
"""Added to the task's key for the perturbations of theta; times 1 + k for those of inner step k."""


@dataclass(frozen=True, kw_only=True)
class EvolutionStrategies(MAML):
    """meta-gradient = 1 / (2 sigma n) sum_i (L(theta + sigma e_i) - L(theta - sigma e_i)) e_i, with n directions
    e_i ~ N(0, I) and L the query loss after adaptation: the gradient of E L(theta + sigma e), in expectation.

    Salimans et al. 2017, section 2 (https://arxiv.org/abs/1703.03864), with antithetic pairs, without their shaping of
    losses by rank; Song et al. 2020, ES-MAML, Algorithm 3 (https://arxiv.org/abs/1910.01215). Directions come from the
    task's own key. The loss returned is the mean over all 2 n perturbed weights, of which the gradient is that.

    The inner loop is MAML's, no derivative passes through it. With `inner_directions` its gradients are estimated in
    the same way, of the support loss, by so many pairs in each step: then nothing is differentiated, and losses may be
    counts, ranks, or what a simulator returns. One that is not made of torch's operations is a subclass of this with
    `engines = ("loop",)`, whose `support_loss` (the loss of inner steps, with `inner_directions`) and `outer_loss` are
    called with one set of weights after another; otherwise all are computed at once.

    Args:
        model, loss, inner_lr, inner_steps, adapted, inner_optimizer: see `MAML`.
        sigma: standard deviation of perturbations, above 0.
        directions: n, of the outer loop.
        inner_directions: of each inner step; 0: inner gradients are derivatives.

    Raises:
        ValueError: where an option is out of its range.

    Example:
        >>> import torch
        >>> from metadist import Engine, Model, Task
        >>> from metadist.models.losses import accuracy
        >>> def errors(outputs, labels):  # a loss that has no derivative
        ...     return 1 - accuracy(outputs, labels)
        >>> learner = EvolutionStrategies(model=Model(torch.nn.Linear(2, 2)), loss=errors, inner_directions=4)
        >>> engine, x = Engine(learner, "vmap"), torch.randn(8, 2)
        >>> labels = (x[:, 0] > 0).long()
        >>> engine.meta_gradients(engine.initial_theta(), [Task.of(x, labels, x, labels)]).rows.shape
        torch.Size([1, 6])
    """

    sigma: float = 0.1
    directions: int = 16
    inner_directions: int = 0

    refused: ClassVar[Mapping[str, str]] = {"first_order": "no derivative passes through its inner loop"}
    exact_meta_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma <= 0 or self.directions < 1 or self.inner_directions < 0:
            raise ValueError(
                f"sigma={self.sigma} must be above 0, directions={self.directions} 1 or more, "
                f"inner_directions={self.inner_directions} 0 or more"
            )
        if self.first_order:
            raise ValueError("no derivative passes through the inner loop here: leave first_order out")

    def draw(self, draws: Draws, support_size: int) -> dict[str, np.ndarray]:
        """The key of all the task's perturbations."""
        del support_size
        return {KEY: np.array(draws.word() >> 1)}

    def begin(self, theta: Tensors, support: Examples, context: Context) -> Fast:
        fast = super().begin(theta, support, context)
        return fast._replace(state=fast.state | {KEY: context.draws[KEY]})

    def support_loss(self, theta: Tensors, fast: Fast, support: Examples) -> Tensor:
        """The scalar that the inner loop descends: by default the mean loss on the support set. With
        `inner_directions` only its values are used."""
        return self.loss(self.predict(theta, fast, support.inputs), *support.targets)

    def inner_loss(self, theta: Tensors, fast: Fast, support: Examples, k: int) -> Tensor:
        """The support loss; with `inner_directions` a linear function of the weights whose gradient is the estimate."""
        if not self.inner_directions:
            return one_number(self.support_loss(theta, fast, support))
        here = {name: weight.detach() for name, weight in fast.weights.items()}
        directions = perturbations(here, fast.state[KEY] + INNER * (1 + k), self.inner_directions)

        def loss(weights: Tensors, task: Task) -> Tensor:
            return one_number(self.support_loss(theta, fast._replace(weights=weights), task.support))

        each = at_once if "vmap" in self.engines else one_by_one
        losses = each(loss, around(here, directions, self.sigma), Task(support, Examples((), ())))
        slope = estimate(losses.detach(), directions, self.sigma)
        moved = [((weight - here[name]) * slope[name]).sum() for name, weight in fast.weights.items()]
        return losses.detach().mean() + torch.stack(moved).sum()

    def meta_gradient(
        self, ops: Differentiation, theta: Tensors, task: Task, context: Context
    ) -> tuple[Tensor, Tensors]:
        def loss(theta: Tensors, task: Task) -> Tensor:
            fast = ops.adapt(self, theta, task.support, context)
            values = Fast(*({name: value.detach() for name, value in part.items()} for part in fast))
            return one_number(self.outer_loss(theta, values, task.query, context)).detach()

        directions = perturbations(theta, context.draws[KEY] + OUTER, self.directions)
        losses = ops.each(loss, around(theta, directions, self.sigma), task)
        return losses.mean(), estimate(losses, directions, self.sigma)


def one_number(loss: object) -> Tensor:
    """The loss as it is. Raises InputError for a number of Python's or numpy's, which simulators return."""
    if not isinstance(loss, Tensor):
        raise InputError(f"the loss gave a {type(loss).__name__}: it must give a tensor, such as torch.tensor(value)")
    return loss


def perturbations(weights: Tensors, key: Tensor, count: int) -> Tensors:
    """Standard normal directions [count, ...] for each of the weights [...], a function of the key."""
    return {
        name: normal(key + number, (count, *value.shape)).to(value)
        for number, (name, value) in enumerate(weights.items())
    }


def around(weights: Tensors, directions: Tensors, sigma: float) -> Tensors:
    """Weights moved by sigma along each of n directions, then against each: [2 n, ...]."""
    return {
        name: torch.cat([value + sigma * directions[name], value - sigma * directions[name]])
        for name, value in weights.items()
    }


def estimate(losses: Tensor, directions: Tensors, sigma: float) -> Tensors:
    """The gradient of the smoothed loss, from the losses [2 n] at the weights that `around` gives."""
    along, against = losses.chunk(2)
    slopes = (along - against) / (2 * sigma * len(along))
    return {name: torch.tensordot(slopes.to(value), value, dims=1) for name, value in directions.items()}
