"""Environments of the package gymnasium, with attributes that vary from task to task."""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from metadist.core.errors import InputError
from metadist.core.random import Draws
from metadist.core.task import Examples, Task, TaskId
from metadist.environments.environment import Parameters, Step


@dataclass(frozen=True)
class Gymnasium:
    """`gymnasium.make(id, **options)`, made anew for each trajectory and seeded from the task's key.

    It needs `pip install 'metadist[rl]'`, and is computed task by task (`engine.kind=loop`), since it leaves torch.
    Actions of a box are clipped to it. A trajectory ends where the environment terminates or truncates it.

    Parameters of a task: the values [m] that the attributes of `vary` get before a trajectory, of `Variations`. Values
    belong to names in alphabetical order, whatever the order in `vary`.

    Args:
        id: of the environment, such as CartPole-v1; its observations are a box.
        vary: names of numbers that the environment holds, `vars(env.unwrapped)`, and reads in each step, such as
            CartPole's gravity and force_mag. What it derived from them when it was made stays: its length is none, for
            it keeps a product of mass and length besides.
        options: further arguments of `gymnasium.make`.

    Raises:
        InputError: where gymnasium is not installed, does not know the id, or the environment lacks an attribute of
            `vary` or has spaces that are neither; where a task has not one value for each name of `vary`.

    Example, as a job names it with its tasks:
        learner.environment={name: metadist.environments:Gymnasium, id: CartPole-v1, vary: [gravity]}
        data.source=metadist.environments:Variations
        data.options={ranges: {gravity: [5, 15]}, observation_shape: [4], outputs: 2}
    """

    id: str
    vary: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    engines: ClassVar[tuple[str, ...]] = ("loop",)

    @cached_property
    def discrete(self) -> bool:
        spaces, made = _gymnasium().spaces, self._make()
        absent = [name for name in self.vary if not hasattr(made.unwrapped, name)]
        if absent:
            raise InputError(f"environment {self.id} has no attribute {absent[0]!r} to vary")
        kinds = made.observation_space, made.action_space
        made.close()
        if not (isinstance(kinds[0], spaces.Box) and isinstance(kinds[1], spaces.Box | spaces.Discrete)):
            raise InputError(f"environment {self.id} has {kinds[0]} and {kinds[1]}: observations must be a box, and "
                             "actions a box or discrete; wrap it in one of your own")  # fmt: skip
        return isinstance(kinds[1], spaces.Discrete)

    def reset(self, parameters: Parameters, key: Tensor, trajectories: int) -> tuple[Any, Tensor]:
        """The n environments, which are closed when the state is no longer held, and their observations."""
        names, values = sorted(self.vary), parameters[0].tolist()
        if len(values) != len(names):
            raise InputError(f"a task brings {len(values)} values, but environment {self.id} varies {names}: give the "
                             "source and learner.environment.vary the same names")  # fmt: skip
        made, seed = _Environments(self._make() for _ in range(trajectories)), int(key) % 2**31
        weakref.finalize(made, _close, list(made))
        for environment in made:
            for name, value in zip(names, values, strict=True):
                setattr(environment.unwrapped, name, value)
        seeds = np.random.Philox(key=seed).random_raw(trajectories) >> np.uint64(33)
        observed = [each.reset(seed=int(own))[0] for each, own in zip(made, seeds, strict=True)]
        observations = torch.as_tensor(np.stack(observed)).to(parameters[0])
        return (made, observations, torch.zeros(trajectories, dtype=torch.bool)), observations

    def step(self, parameters: Parameters, state: Any, actions: Tensor) -> Step:
        """`state` is changed, and must not be used again."""
        made, observations, ended = state
        observations, ended, rewards = observations.clone(), ended.clone(), torch.zeros(len(made)).to(observations)
        for number, (environment, action) in enumerate(zip(made, actions.cpu().numpy(), strict=True)):
            if ended[number]:
                continue
            space = environment.action_space
            own = space.start + action if self.discrete else np.clip(action, space.low, space.high).astype(space.dtype)
            observed, reward, terminated, truncated, _ = environment.step(own)
            observations[number], rewards[number] = torch.as_tensor(observed), float(reward)
            ended[number] = terminated or truncated
        return Step((made, observations, ended), observations, rewards, ended.to(observations.device))

    def _make(self) -> Any:
        gymnasium = _gymnasium()
        if ":" in self.id:
            raise InputError(f"environment {self.id} names a module: import it in a module of your own, and name a "
                             "function there as learner.environment")  # fmt: skip
        try:
            return gymnasium.make(self.id, **self.options)
        except (gymnasium.error.Error, TypeError) as error:
            raise InputError(f"environment {self.id} cannot be made: {error}") from None


@dataclass(frozen=True)
class Variations:
    """Tasks of `Gymnasium`: values uniform in the range of each attribute, by name in alphabetical order.

    Args:
        seed: of the draws.
        ranges: name of an attribute -> lowest and highest value; the names are those of the environment's `vary`.
        observation_shape: of the environment's observations.
        outputs: of the policy: discrete actions, or elements of an action.

    Example:
        >>> source = Variations(seed=0, ranges={"gravity": (5.0, 15.0)}, observation_shape=[4], outputs=2)
        >>> 5 <= source(TaskId("test", 0, 0)).query.inputs[0].item() < 15
        True
    """

    seed: int
    ranges: dict[str, tuple[float, float]]
    observation_shape: list[int]
    outputs: int

    @property
    def observation_shapes(self) -> list[list[int]]:
        return [self.observation_shape]

    def __call__(self, task_id: TaskId) -> Task:
        low, high = np.array([self.ranges[name] for name in sorted(self.ranges)], np.float64).reshape(-1, 2).T
        values = low + (high - low) * Draws(self.seed, task_id).uniform(len(low))
        part = Examples((values[None].astype(np.float32),), ())
        return Task(part, part)


def _gymnasium() -> Any:
    try:
        import gymnasium
    except ImportError:
        raise InputError("environments of gymnasium need it: pip install 'metadist[rl]'") from None
    return gymnasium


class _Environments(list[Any]):
    """A list that a weak reference can point to."""


def _close(environments: list[Any]) -> None:
    for environment in environments:
        environment.close()
