"""2-D navigation: a point goes to a goal that it is not shown (Finn et al. 2017, section 5.3.1)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from metadist.core.random import Draws
from metadist.core.task import Examples, Task, TaskId
from metadist.environments.environment import Parameters, Step


@dataclass(frozen=True)
class Navigation:
    """The point begins at the origin and sees where it is; an action is a velocity, clipped to [-speed, speed] in each
    direction; the reward is minus the distance to the goal after the move.

    Finn, Abbeel, Levine 2017, section 5.3.1 (https://arxiv.org/abs/1703.03400), with the reward of its published code:
    the text has the squared distance. A trajectory ends within `radius` of the goal in both coordinates, as there.

    Parameters of a task: the goal [2], of `Goals`.
    """

    speed: float = 0.1
    radius: float = 0.01

    discrete: ClassVar[bool] = False

    def reset(self, parameters: Parameters, key: Tensor, trajectories: int) -> tuple[Any, Tensor]:
        """Position [n, 2], which is also what is observed."""
        del key
        position = torch.zeros_like(parameters[0]).expand(trajectories, 2)
        return position, position

    def step(self, parameters: Parameters, state: Any, actions: Tensor) -> Step:
        position = state + actions.clamp(-self.speed, self.speed)
        away = position - parameters[0]
        return Step(position, position, -away.norm(dim=-1), (away.abs() < self.radius).all(dim=-1))


@dataclass(frozen=True)
class Goals:
    """Tasks of `Navigation`: goals uniform in a square around the origin.

    Example:
        >>> task = Goals(seed=0)(TaskId("train", 0, 0))
        >>> task.support.inputs[0].shape
        (1, 2)
    """

    seed: int
    half_width: float = 0.5

    outputs: ClassVar[int] = 2
    observation_shapes: ClassVar[list[list[int]]] = [[2]]

    def __call__(self, task_id: TaskId) -> Task:
        goal = (2 * Draws(self.seed, task_id).uniform(2) - 1) * self.half_width
        part = Examples((goal[None].astype(np.float32),), ())
        return Task(part, part)
