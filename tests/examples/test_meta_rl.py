from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from metadist import Draws, Engine, Examples, Model, Task, TaskId
from metadist.config import load_config
from metadist.environments import Navigation
from metadist.learners import PolicyGradient
from metadist.models import GaussianPolicy
from metadist.models.losses import mean_squared_error
from metadist.run.build import Job
from metadist.run.preflight import preflight
from tests.examples.meta_rl import knowing_direction, knowing_goal, knowing_velocity, trajectories

JOBS = Path(__file__).resolve().parents[2] / "jobs" / "domains"


def task_of(*parameter: float) -> Task:
    part = Examples((np.array([parameter], np.float32),), ())
    return Task(part, part)


def test_who_knows_the_goal_walks_straight_to_it():
    assert knowing_goal(task_of(0.25, 0.0))["return"] == pytest.approx(-0.15 - 0.05)
    assert knowing_goal(task_of(0.05, -0.1))["return"] == pytest.approx(0.0, abs=1e-6)


def test_who_knows_the_direction_pushes_along_it():
    """The speed after t steps is 1 - 0.9^t."""
    speeds = [1 - 0.9**t for t in range(1, 21)]
    assert knowing_direction(task_of(0.6, -0.8))["return"] == pytest.approx(sum(speeds))


def test_who_knows_the_velocity_is_there_as_soon_as_the_force_allows():
    """0.25 at 0.1 a step, less the drag of a tenth: 0.1, 0.19, then there."""
    assert knowing_velocity(task_of(0.25, 0.0))["return"] == pytest.approx(-0.15 - 0.06, abs=1e-5)


def test_the_figure_has_a_panel_before_and_after_each_step():
    torch.manual_seed(0)
    learner = PolicyGradient(
        model=Model(GaussianPolicy([[2]], 2, hidden=[8])), loss=mean_squared_error, environment=Navigation(),
        trajectories=5, horizon=4, inner_steps=2,
    )  # fmt: skip
    engine = Engine(learner)
    theta, fasts, task = engine.trajectory(engine.initial_theta(), task_of(0.3, 0.1), Draws(0, TaskId("test", 0, 0), 1))
    drawn = trajectories(learner, theta, fasts, task)
    assert isinstance(drawn, Figure) and len(drawn.axes) == 3
    assert [len(axes.lines) for axes in drawn.axes] == [5 + 2] * 3
    assert drawn.axes[0].get_title().startswith("before: return -")


@pytest.mark.parametrize(
    ("name", "knowing"),
    [
        ("navigation", "knowing_goal"), ("navigation_100", "knowing_goal"),
        ("point_mass_direction", "knowing_direction"), ("point_mass_velocity", "knowing_velocity"),
    ],
)  # fmt: skip
def test_each_job_can_be_computed_with_its_baselines_and_figure_and_with_who_knows(name, knowing, monkeypatch):
    monkeypatch.chdir(JOBS.parents[1])
    asked = f"evaluation.baselines=[joint,initial,tests.examples.meta_rl:{knowing}]"
    for more in ([], [asked]):
        config = load_config([JOBS / f"{name}.yaml"], ["fleet.backend=local", "meta_batch_size=2", *more])
        prepared = preflight(Job(config), ["test"])
        assert prepared.notes == [] and prepared.baselines == ["joint", "initial", *([knowing] if more else [])]
