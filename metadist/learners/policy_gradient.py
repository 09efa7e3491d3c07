"""MAML by policy gradients: the support and query sets are trajectories that the policy itself samples."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metadist.core.errors import InputError
from metadist.core.measure import Better
from metadist.core.random import Draws
from metadist.core.task import Examples, Task
from metadist.environments import Environment
from metadist.learners.learner import Context, Fast, Tensors
from metadist.learners.maml import MAML
from metadist.models.noise import normal, uniform

KEY, LIKELIHOOD, PARAMETER = "key of trajectories", "log-likelihood of trajectories", "parameter "
QUERY, UNADAPTED, FIRST = 0, 1, 2
"""Sets of trajectories of a task: that the adapted policy is judged on, of the unadapted one, of inner step 0, 1 ..."""
START = 1_000_003
"""Added to the key of a set's actions: the key of how its environments begin, apart from those of all other sets."""


class Trajectories(NamedTuple):
    """n trajectories of H steps: observations [H, n, ...], actions [H, n] or [H, n, d], rewards [H, n], and whether the
    trajectory still went on before that step, [H, n] of 0 or 1. Constants: nothing is differentiated through them."""

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    present: Tensor


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(MAML):
    """phi = theta - inner_lr * gradient of -mean_t,n log pi(a | s) A on trajectories of pi_theta; theta ascends the
    return of pi_phi. A task brings an environment's parameters, no examples.

    Finn, Abbeel, Levine 2017, Algorithm 3 (https://arxiv.org/abs/1703.03400), with plain policy gradients in both loops
    (the paper's outer one is TRPO). A is the discounted reward to go less its mean over the other trajectories at the
    same time step, a baseline that depends on time and leaves the gradient unbiased; in the inner loop A is divided by
    its root mean square. The outer loop ascends the mean undiscounted return of the query trajectories.

    theta also decides which support trajectories are seen. `sampling` says what of that reaches theta:

    - "low_variance": through the inner step, whose derivative estimates the Hessian of the expected return: pi divided
      by itself held constant, in place of log pi (the low variance curvature of ProMP, Rothfuss et al. 2019,
      https://arxiv.org/abs/1810.06784). What an action has to do with those before it is left out of that Hessian, and
      so is the term of "score": it is meant for inner steps along the expected gradient, from many trajectories.
    - "score": the derivative of J(theta) = sum over support sets of P(support | theta) * return(phi(theta, support)),
      exactly: E-MAML's term log P(support | theta) * return (Stadie et al. 2018, https://arxiv.org/abs/1803.01118).
      The return of other trajectories of the unadapted policy is subtracted, which leaves the expectation as it is.
      Its variance grows with trajectories * horizon.
    - "fixed": nothing: the derivative of the same sum with P held at the present theta, as in the published MAML.

    The policy is the model: called with observations, it gives logits, or mean and log standard deviation.

    Args:
        model, inner_lr, inner_steps, first_order, adapted, inner_optimizer: see `MAML`. loss: not used.
        environment: what the policy acts in; see `metadist.environments`.
        trajectories: n, sampled anew for each inner step and for the query set; 2 or more.
        horizon: H, steps of a trajectory at most.
        discount: of rewards to go in the inner loop, above 0 and up to 1.
        sampling: see above.

    Raises:
        ValueError: where an option is out of its range.

    Example:
        >>> from metadist import Engine, Model, TaskId
        >>> from metadist.environments import Goals, Navigation
        >>> from metadist.models.losses import mean_squared_error
        >>> from metadist.models.policy import GaussianPolicy
        >>> model = Model(GaussianPolicy([[2]], 2, hidden=[16]))
        >>> learner = PolicyGradient(model=model, loss=mean_squared_error, environment=Navigation(), horizon=5)
        >>> engine, goals = Engine(learner, "vmap"), Goals(seed=0)
        >>> tasks = [goals(TaskId("train", 0, index)) for index in range(3)]
        >>> engine.meta_gradients(engine.initial_theta(), tasks).losses.shape  # minus the return, after adaptation
        torch.Size([3])
    """

    environment: Environment
    trajectories: int = 20
    horizon: int = 100
    discount: float = 0.99
    sampling: Literal["low_variance", "score", "fixed"] = "low_variance"

    exact_meta_gradient: ClassVar[bool] = False  # it is an estimate from samples
    measures: ClassVar[Mapping[str, Better]] = {"return": "higher"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trajectories < 2 or self.horizon < 1 or not 0 < self.discount <= 1:
            raise ValueError(
                f"trajectories={self.trajectories} must be 2 or more, horizon={self.horizon} 1 or more, "
                f"discount={self.discount} above 0 and up to 1"
            )
        object.__setattr__(self, "engines", getattr(self.environment, "engines", self.engines))

    def draw(self, draws: Draws, support_size: int) -> dict[str, np.ndarray]:
        """The key of all the task's trajectories."""
        del support_size
        return {KEY: np.array(draws.word() >> 1)}

    def begin(self, theta: Tensors, support: Examples, context: Context) -> Fast:
        fast = super().begin(theta, support, context)
        state = {KEY: context.draws[KEY]}
        if self.sampling == "score":
            state[LIKELIHOOD] = next(iter(theta.values())).new_zeros(())
            state |= {f"{PARAMETER}{number}": value for number, value in enumerate(support.inputs)}
        return fast._replace(state=fast.state | state)

    def inner_loss(self, theta: Tensors, fast: Fast, support: Examples, k: int) -> Tensor:
        """Minus what the step ascends: the mean over trajectories and time steps."""
        sampled = self.sample(theta, fast, support.inputs, FIRST + k)
        advantages = self.advantages(sampled, self.discount)
        advantages = advantages / ((advantages.square() * sampled.present).mean().sqrt() + 1e-8)
        logs = self.log_probabilities(theta, fast, sampled)
        ratios = (logs - logs.detach()).exp() if self.sampling == "low_variance" else logs
        return -(ratios * advantages * sampled.present).mean()

    def update(self, theta: Tensors, fast: Fast, gradient: Tensors, k: int) -> Fast:
        after = super().update(theta, fast, gradient, k)
        if self.sampling != "score":
            return after
        parameters = tuple(value for name, value in fast.state.items() if name.startswith(PARAMETER))
        sampled = self.sample(theta, fast, parameters, FIRST + k)
        likelihood = (self.log_probabilities(theta, fast, sampled) * sampled.present).sum()
        return after._replace(state=after.state | {LIKELIHOOD: fast.state[LIKELIHOOD] + likelihood})

    def outer_loss(self, theta: Tensors, fast: Fast, query: Examples, context: Context) -> Tensor:
        """Minus the mean return of the query trajectories. Its derivative is the policy gradient."""
        del context
        sampled = self.sample(theta, fast, query.inputs, QUERY)
        found = mean_return(sampled)
        logs = self.log_probabilities(theta, fast, sampled)
        gain = (logs * self.advantages(sampled, 1.0) * sampled.present).sum(dim=0).mean()
        if self.sampling == "score":
            before = mean_return(self.sample(theta, Fast({}, fast.state), query.inputs, UNADAPTED))
            gain = gain + fast.state[LIKELIHOOD] * (found - before)
        return -(found + gain - gain.detach())

    def measure(self, theta: Tensors, fast: Fast, query: Examples) -> dict[str, Tensor]:
        """return: the mean undiscounted one of the query trajectories, whose noise is the same after each step."""
        return {"return": mean_return(self.sample(theta, fast, query.inputs, QUERY))}

    def check(self, theta: Tensors, task: Task) -> None:
        """Trajectories of the unadapted policy: what it gives for a task's own inputs means nothing."""
        self.sample(theta, Fast({}, {KEY: torch.zeros((), dtype=torch.int64)}), task.support.inputs, QUERY)

    def sample(self, theta: Tensors, fast: Fast, inputs: tuple[Tensor, ...], number: int) -> Trajectories:
        """Trajectories of the policy at the fast weights. `inputs`: the task's, [1, ...] each. `number`: of the task's
        sets of trajectories, each with noise of its own."""
        parameters, key = tuple(value[0] for value in inputs), fast.state[KEY] + number
        weights = {name: value.detach() for name, value in self.model_weights(theta, fast).items()}
        state, observed = self.environment.reset(parameters, key + START, self.trajectories)
        present = torch.ones(self.trajectories, dtype=observed.dtype, device=observed.device)
        noise, steps = None, []
        for t in range(self.horizon):
            outputs = self.model(weights, observed)
            noise = self.noise(key, outputs) if noise is None else noise
            actions = self._act(outputs, noise[t])
            after = self.environment.step(parameters, state, actions)
            steps.append((observed, actions, after.rewards * present, present))
            present = present * ~after.ended
            state, observed = after.state, after.observations
        return Trajectories(*(torch.stack(each).detach() for each in zip(*steps, strict=True)))

    def log_probabilities(self, theta: Tensors, fast: Fast, sampled: Trajectories) -> Tensor:
        """log pi(a | s) of every step, [H, n], at the fast weights."""
        outputs = self.model(self.model_weights(theta, fast), sampled.observations.flatten(0, 1))
        outputs = outputs.unflatten(0, sampled.rewards.shape)
        if self.environment.discrete:
            return outputs.log_softmax(dim=-1).gather(-1, sampled.actions.unsqueeze(-1)).squeeze(-1)
        mean, log_std = outputs.chunk(2, dim=-1)
        deviations = (sampled.actions - mean) * (-log_std).exp()
        return -(0.5 * deviations.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(dim=-1)

    def advantages(self, sampled: Trajectories, discount: float) -> Tensor:
        """Discounted rewards to go [H, n], less their mean over the other trajectories at that time step."""
        time = torch.arange(self.horizon, device=sampled.rewards.device, dtype=sampled.rewards.dtype)
        ahead = time - time.unsqueeze(1)
        to_go = torch.where(ahead < 0, 0.0, discount ** ahead.clamp(min=0)) @ sampled.rewards
        return (to_go - to_go.mean(dim=1, keepdim=True)) * (self.trajectories / (self.trajectories - 1))

    def noise(self, key: Tensor, outputs: Tensor) -> Tensor:
        """Of all actions, given a policy's outputs [n, ...]: standard Gumbel [H, n, actions] or normal [H, n, d]."""
        if self.environment.discrete:
            drawn = uniform(key, (self.horizon, *outputs.shape))
            return -(-torch.log1p(-drawn)).log().to(outputs.dtype)
        if outputs.shape[-1] % 2:
            raise InputError(f"the policy gives {outputs.shape[-1]} outputs; it needs a mean and a log std for each")
        return normal(key, (self.horizon, self.trajectories, outputs.shape[-1] // 2)).to(outputs.dtype)

    def _act(self, outputs: Tensor, noise: Tensor) -> Tensor:
        if self.environment.discrete:
            return (outputs + noise).argmax(dim=-1)
        mean, log_std = outputs.chunk(2, dim=-1)
        return mean + log_std.exp() * noise


def mean_return(sampled: Trajectories) -> Tensor:
    """The undiscounted sum of rewards, mean over trajectories."""
    return sampled.rewards.sum(dim=0).mean()
