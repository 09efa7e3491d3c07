"""What a policy acts in: one environment for all tasks, whose parameters (a goal, a direction) the task brings."""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

Parameters = tuple[Tensor, ...]


class Step(NamedTuple):
    """What n trajectories find after an action: `state`, whatever the environment needs to go on; `observations`
    [n, *observation_shape]; `rewards` [n] of the action; `ended` bool [n], whether there is no further step."""

    state: Any
    observations: Tensor
    rewards: Tensor
    ended: Tensor


class Environment(Protocol):
    """The rules of all tasks of a family, as functions without state: so a learner may call them for many tasks at
    once, again on the way back, and in any process.

    Both methods take n trajectories side by side. Inside torch (no numpy, no branch on a value) an environment is
    computed by every engine; one that leaves torch needs `engine.kind=loop`.

    Example, a chain of which each task rewards one of two actions:
        >>> import torch
        >>> class Bandit:
        ...     discrete = True
        ...     def reset(self, parameters, key, trajectories):
        ...         return (), torch.ones(trajectories, 1)
        ...     def step(self, parameters, state, actions):
        ...         rewards = (actions == parameters[0]).to(torch.get_default_dtype())
        ...         return Step((), torch.ones(len(actions), 1), rewards, torch.ones_like(actions, dtype=torch.bool))
        >>> bandit = Bandit()
        >>> state, observations = bandit.reset((torch.tensor(1),), torch.tensor(0), trajectories=3)
        >>> bandit.step((torch.tensor(1),), state, torch.tensor([0, 1, 1])).rewards
        tensor([0., 1., 1.])
    """

    @property
    def discrete(self) -> bool:
        """Whether an action is a number (int64 [n], of a policy's logits [n, actions]) or a vector (float [n, d], of a
        policy's mean and logarithm of standard deviation, [n, 2 d])."""
        ...

    def reset(self, parameters: Parameters, key: Tensor, trajectories: int) -> tuple[Any, Tensor]:
        """The state in which n trajectories begin, and their observations [n, *observation_shape].

        parameters: the inputs of a task, without the axis of examples. key: int64 scalar, what chance there is must
        be a function of it; the noise of the policy's actions has another.
        """
        ...

    def step(self, parameters: Parameters, state: Any, actions: Tensor) -> Step:
        """What follows on actions [n, d], or int64 [n]."""
        ...
