import pytest
import torch

from metadist.core.task import TaskId
from metadist.environments import Directions, PointMass, Velocities

KEY = torch.tensor(0)


def pushed(environment: PointMass, parameter: list[float], force: list[float], steps: int) -> tuple[list[float], list]:
    """Rewards and the last velocity."""
    parameters, rewards = (torch.tensor(parameter),), []
    state, _ = environment.reset(parameters, KEY, 1)
    for _ in range(steps):
        found = environment.step(parameters, state, torch.tensor([force]))
        state = found.state
        rewards.append(float(found.rewards))
        assert not found.ended.any()
    return rewards, found.observations[0].tolist()


def test_under_a_constant_force_the_velocity_nears_its_limit():
    """v after t steps is force / drag * (1 - (1 - dt * drag)^t)."""
    rewards, velocity = pushed(PointMass(dt=0.1, drag=2.0), [1.0, 0.0], [0.6, 0.8], 5)
    grown = 0.5 * (1 - 0.8**5)
    assert velocity == pytest.approx([0.6 * grown, 0.8 * grown])
    assert rewards[-1] == pytest.approx(0.6 * grown) and rewards[0] == pytest.approx(0.1 * 0.6)


def test_a_force_above_one_is_shortened():
    long, short = (pushed(PointMass(), [0.0, 1.0], force, 3) for force in ([30.0, 40.0], [0.6, 0.8]))
    assert long[1] == pytest.approx(short[1])


def test_a_velocity_is_rewarded_by_its_distance():
    rewards, velocity = pushed(PointMass("velocity", drag=0.0), [0.3, -0.4], [1.0, 0.0], 2)
    assert velocity == pytest.approx([0.2, 0.0])
    assert rewards == pytest.approx([-((0.2**2 + 0.4**2) ** 0.5), -((0.1**2 + 0.4**2) ** 0.5)])


def test_tasks_are_directions_on_the_circle_or_two_of_them_and_velocities_in_a_square():
    def drawn(source) -> torch.Tensor:
        return torch.stack([torch.from_numpy(source(TaskId("train", 3, i)).query.inputs[0][0]) for i in range(200)])

    angles = drawn(Directions(seed=0))
    assert torch.allclose(angles.norm(dim=1), torch.ones(200)) and angles.mean(dim=0).norm() < 0.2
    two = drawn(Directions(seed=0, opposite=True))
    assert set(two[:, 0].round(decimals=5).tolist()) == {-1.0, 1.0} and two[:, 1].abs().max() < 1e-6
    assert 0.9 < drawn(Velocities(seed=0, fastest=1.0)).abs().max() <= 1
