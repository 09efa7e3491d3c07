"""What a user adds to jobs of reinforcement learning: policies that know the task, and a figure of trajectories.

The figure is named in jobs/domains, the policies in evaluations: they are what no learner can reach, no baselines.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from metadist import Task
from metadist.environments import Environment, Navigation, PointMass
from metadist.learners import Fast, PolicyGradient


def knowing_goal(task: Task) -> dict[str, float]:
    """Straight to the goal, whatever the horizon: the point is there after a few steps, which ends the trajectory."""
    return {"return": returned(Navigation(), task, lambda position, goal: goal - position, 20)}


def knowing_direction(task: Task) -> dict[str, float]:
    """The largest force in the direction, for 20 steps."""
    return {"return": returned(PointMass(), task, lambda velocity, direction: direction.expand_as(velocity), 20)}


def knowing_velocity(task: Task) -> dict[str, float]:
    """The force that brings the velocity there at once, as far as it goes, for 20 steps."""
    point = PointMass("velocity")

    def force(velocity: Tensor, wanted: Tensor) -> Tensor:
        return (wanted - velocity) / point.dt + point.drag * velocity

    return {"return": returned(point, task, force, 20)}


def returned(environment: Environment, task: Task, policy: Callable[[Tensor, Tensor], Tensor], horizon: int) -> float:
    """The return of one trajectory of `policy(observation, parameter)`, without chance."""
    parameters = tuple(torch.as_tensor(value[0]) for value in task.query.inputs)
    state, observed = environment.reset(parameters, torch.tensor(0), trajectories=1)
    total, present = 0.0, True
    for _ in range(horizon):
        step = environment.step(parameters, state, policy(observed, parameters[0]))
        total += float(step.rewards[0]) if present else 0.0
        present, state, observed = present and not bool(step.ended[0]), step.state, step.observations
    return total


def trajectories(learner: PolicyGradient, theta: Mapping[str, Tensor], fasts: Sequence[Fast], task: Task) -> Figure:
    """What is observed on the way (a place, a velocity) before adaptation and after each inner step; the star is the
    goal, direction or velocity of the task, the dot where all trajectories begin."""
    figure = Figure(figsize=(3.2 * len(fasts), 3.4), layout="constrained")
    goal = [float(value) for value in task.query.inputs[0][0]]
    panels: Any = figure.subplots(1, len(fasts), sharex=True, sharey=True, squeeze=False)[0]
    for k, (axes, fast) in enumerate(zip(panels, fasts, strict=True)):
        sampled = learner.sample(dict(theta), fast, task.query.inputs, number=0)
        for n in range(learner.trajectories):
            way = sampled.observations[sampled.present[:, n] > 0, n]
            axes.plot(way[:, 0], way[:, 1], color="tab:blue", alpha=0.4, linewidth=1)
        axes.plot(0, 0, "o", color="black", markersize=4)
        axes.plot(*goal, "*", color="tab:red", markersize=12)
        mean = float(sampled.rewards.sum(dim=0).mean())
        axes.set_title(f"{f'after step {k}' if k else 'before'}: return {mean:.2f}", fontsize=10)
        axes.set_aspect("equal")
    return figure
