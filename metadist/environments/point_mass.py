"""A point with inertia that is to run in a direction, or at a velocity, which it is not shown."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from metadist.core.random import Draws
from metadist.core.task import Examples, Task, TaskId
from metadist.environments.environment import Parameters, Step


@dataclass(frozen=True)
class PointMass:
    """The point begins at rest and sees its velocity [2]; an action is a force, shortened to length 1 where it is
    longer. In a step of `dt` seconds the velocity grows by dt * (force - drag * velocity): its limit is 1 / drag.

    The tasks are those of the running robots of Finn, Abbeel, Levine 2017, section 5.3.2
    (https://arxiv.org/abs/1703.03400), without the robot. `reward="direction"`: the speed in the task's direction, a
    unit vector [2] of `Directions`. `reward="velocity"`: minus the distance of the velocity from the task's, [2], of
    `Velocities`.
    """

    reward: Literal["direction", "velocity"] = "direction"
    dt: float = 0.1
    drag: float = 1.0

    discrete: ClassVar[bool] = False

    def reset(self, parameters: Parameters, key: Tensor, trajectories: int) -> tuple[Any, Tensor]:
        """Velocity [n, 2], which is also what is observed."""
        del key
        velocity = torch.zeros_like(parameters[0]).expand(trajectories, 2)
        return velocity, velocity

    def step(self, parameters: Parameters, state: Any, actions: Tensor) -> Step:
        force = actions / actions.norm(dim=-1, keepdim=True).clamp(min=1)
        velocity = state + self.dt * (force - self.drag * state)
        wanted = parameters[0]
        rewards = velocity @ wanted if self.reward == "direction" else -(velocity - wanted).norm(dim=-1)
        return Step(velocity, velocity, rewards, torch.zeros_like(rewards, dtype=torch.bool))


@dataclass(frozen=True)
class Directions:
    """Tasks of `PointMass`: directions uniform on the circle; with `opposite=True` one of two, along the first axis.

    Example:
        >>> task = Directions(seed=0)(TaskId("train", 0, 0))
        >>> round(float((task.support.inputs[0] ** 2).sum()), 5)
        1.0
    """

    seed: int
    opposite: bool = False

    outputs: ClassVar[int] = 2
    observation_shapes: ClassVar[list[list[int]]] = [[2]]

    def __call__(self, task_id: TaskId) -> Task:
        turn = float(Draws(self.seed, task_id).uniform(1)[0])
        angle = 2 * np.pi * (np.floor(2 * turn) / 2 if self.opposite else turn)
        return _task(np.array([np.cos(angle), np.sin(angle)]))


@dataclass(frozen=True)
class Velocities:
    """Tasks of `PointMass`: velocities uniform in the square [-fastest, fastest] x [-fastest, fastest].

    Example:
        >>> Velocities(seed=0)(TaskId("train", 0, 0)).query.inputs[0].shape
        (1, 2)
    """

    seed: int
    fastest: float = 0.5

    outputs: ClassVar[int] = 2
    observation_shapes: ClassVar[list[list[int]]] = [[2]]

    def __call__(self, task_id: TaskId) -> Task:
        return _task((2 * Draws(self.seed, task_id).uniform(2) - 1) * self.fastest)


def _task(parameter: np.ndarray) -> Task:
    part = Examples((parameter[None].astype(np.float32),), ())
    return Task(part, part)
