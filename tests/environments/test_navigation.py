import torch

from metadist.core.task import TaskId
from metadist.environments import Goals, Navigation

KEY = torch.tensor(0)


def test_a_point_moves_by_its_clipped_action_and_is_rewarded_by_its_distance():
    goal = torch.tensor([0.3, -0.4])
    navigation = Navigation()
    state, observed = navigation.reset((goal,), KEY, trajectories=2)
    assert torch.equal(observed, torch.zeros(2, 2))
    step = navigation.step((goal,), state, torch.tensor([[0.05, -3.0], [0.0, 0.0]]))
    assert torch.allclose(step.observations, torch.tensor([[0.05, -0.1], [0.0, 0.0]]))
    assert torch.allclose(step.rewards, -torch.tensor([(0.25**2 + 0.3**2) ** 0.5, 0.5]))
    again = navigation.step((goal,), step.state, torch.full((2, 2), 0.1))
    assert torch.allclose(again.observations, torch.tensor([[0.15, 0.0], [0.1, 0.1]]))


def test_a_trajectory_ends_where_both_coordinates_are_within_the_radius():
    goal = torch.tensor([0.05, 0.05])
    state, _ = Navigation().reset((goal,), KEY, 3)
    step = Navigation().step((goal,), state, torch.tensor([[0.045, 0.055], [0.05, 0.07], [0.0, 0.0]]))
    assert step.ended.tolist() == [True, False, False]
    assert Navigation(radius=0.03).step((goal,), state, torch.tensor([[0.05, 0.07]])).ended.tolist() == [True] * 3


def test_goals_are_a_function_of_the_task_and_fill_the_square():
    source = Goals(seed=1, half_width=2.0)
    goals = [torch.from_numpy(source(TaskId("test", 0, index)).support.inputs[0][0]) for index in range(400)]
    assert torch.equal(goals[7], torch.from_numpy(Goals(1, 2.0)(TaskId("test", 0, 7)).query.inputs[0][0]))
    drawn = torch.stack(goals)
    assert drawn.abs().max() <= 2 and torch.allclose(drawn.std(dim=0), torch.full((2,), 4 / 12**0.5), rtol=0.1)
    assert abs(float(drawn.mean())) < 0.2
