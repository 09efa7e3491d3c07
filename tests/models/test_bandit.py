"""Estimates of a policy's value against a bandit that is small enough to enumerate, in float64."""

import itertools
import math

import pytest
import torch

from metadist.models import bandit

ARMS = 3


@pytest.fixture
def problem():
    """Two contexts, three arms: rewards of two values each with their probabilities, a logging and another policy."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.rand(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    values, chance = draw(2, ARMS, 2) * 4 - 1, draw(2, ARMS)
    return {
        "values": values,  # [context, arm, outcome]
        "chance": torch.stack([chance, 1 - chance], dim=2),
        "logging": (draw(2, ARMS) * 2).softmax(dim=1),
        "policy": (draw(2, ARMS) * 3).softmax(dim=1),
        "estimates": draw(2, ARMS) * 2,
    }


def expectation(problem, value):
    """Of an estimate from one logged round in each of the two contexts, over all actions and rewards there can be."""
    total = torch.zeros((), dtype=torch.float64)
    for actions in itertools.product(range(ARMS), repeat=2):
        for outcomes in itertools.product(range(2), repeat=2):
            probability, reward = 1.0, []
            for x, (action, outcome) in enumerate(zip(actions, outcomes, strict=True)):
                probability *= problem["logging"][x, action] * problem["chance"][x, action, outcome]
                reward.append(problem["values"][x, action, outcome])
            total += probability * value(torch.tensor(actions), torch.stack(reward))
    return total.item()


def truth(problem):
    rewards = (problem["values"] * problem["chance"]).sum(dim=2)
    return (problem["policy"] * rewards).sum(dim=1).mean().item(), rewards


def logged(problem, action, factor=1.0):
    return problem["logging"].gather(1, action[:, None])[:, 0] * factor


def test_inverse_propensities_are_unbiased(problem):
    found = expectation(
        problem, lambda action, r: bandit.ips_value(problem["policy"], action, logged(problem, action), r)
    )
    assert found == pytest.approx(truth(problem)[0], abs=1e-12)
    clipped = expectation(
        problem, lambda action, r: bandit.ips_value(problem["policy"], action, logged(problem, action), r, clip=0.5)
    )
    assert abs(clipped - truth(problem)[0]) > 0.01


@pytest.mark.parametrize(
    ("estimates_right", "propensities_right"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_doubly_robust_is_right_where_either_part_is(problem, estimates_right, propensities_right):
    expected, rewards = truth(problem)
    estimates = rewards if estimates_right else problem["estimates"]
    found = expectation(
        problem,
        lambda action, r: bandit.doubly_robust_value(
            problem["policy"], estimates, action, logged(problem, action, 1.0 if propensities_right else 0.6), r
        ),
    )
    assert (found == pytest.approx(expected, abs=1e-12)) == (estimates_right or propensities_right)


def test_snips_is_a_weighted_mean_of_rewards():
    """Weights 0.2 / 0.5, 0.6 / 0.3 and 0.2 / 0.8 of rewards 1, 2 and 4, by hand; adding 7 to each adds 7."""
    policy = torch.tensor([[0.2, 0.8], [0.4, 0.6], [0.2, 0.8]], dtype=torch.float64)
    action, propensity = torch.tensor([0, 1, 0]), torch.tensor([0.5, 0.3, 0.8], dtype=torch.float64)
    reward = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    expected = (0.4 * 1 + 2 * 2 + 0.25 * 4) / (0.4 + 2 + 0.25)
    assert bandit.snips_value(policy, action, propensity, reward).item() == pytest.approx(expected, abs=1e-12)
    assert bandit.snips_value(policy, action, propensity, reward + 7).item() == pytest.approx(expected + 7, abs=1e-12)


def test_metrics_are_of_the_arm_with_the_largest_output():
    outputs = torch.tensor([[1.0, 3.0], [2.0, 1.0], [0.0, 5.0]])
    action, propensity = torch.tensor([1, 1, 1]), torch.tensor([0.5, 0.5, 0.25])
    reward, arms = torch.tensor([1.0, 9.0, 4.0]), torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.7]])
    assert bandit.greedy_reward(outputs, action, propensity, reward, arms).item() == pytest.approx(
        (0.2 + 0.3 + 0.7) / 3
    )
    # rounds 0 and 2 took the policy's arm, with weights 2 and 4, of which half a percent is the other arm's
    weights = [0.995 * 2, 0.005 * 2, 0.995 * 4]
    expected = sum(w * r for w, r in zip(weights, reward.tolist(), strict=True)) / sum(weights)
    assert bandit.greedy_snips(outputs, action, propensity, reward, arms).item() == pytest.approx(expected)
    never, reward = torch.tensor([0, 1, 0]), torch.tensor([1.0, 1.0, 4.0])
    found = bandit.greedy_snips(outputs, never, propensity, reward)  # weights as 2, 2 and 4
    assert found.item() == pytest.approx((2 * 1 + 2 * 1 + 4 * 4) / 8)
    expected = ((3 + 2 * (1 - 3)) + 2 + (5 + 4 * (4 - 5))) / 3
    assert bandit.greedy_doubly_robust(outputs, action, propensity, reward, arms).item() == pytest.approx(expected)
    outputs[0, 0] = math.nan
    for metric in (bandit.greedy_reward, bandit.greedy_snips, bandit.greedy_doubly_robust):
        assert metric(outputs, action, propensity, reward, arms).isnan()


LOSSES = [bandit.direct_method, bandit.inverse_propensity, bandit.weighted_regression]


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_finite_differences_also_of_second_order(loss):
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(6, ARMS, generator=generator, dtype=torch.float64) / 5
    action = torch.randint(0, ARMS, (6,), generator=generator)
    propensity = 0.2 + 0.6 * torch.rand(6, generator=generator, dtype=torch.float64)
    reward = torch.randn(6, generator=generator, dtype=torch.float64)
    value = lambda x: loss(x, action, propensity, reward)  # noqa: E731
    assert torch.autograd.gradcheck(value, outputs.requires_grad_())
    assert torch.autograd.gradgradcheck(value, outputs)


def test_weighted_regression_descends_regression_on_doubly_robust_rewards():
    generator = torch.Generator().manual_seed(2)
    outputs = torch.randn(6, ARMS, generator=generator, dtype=torch.float64, requires_grad=True)
    action, propensity = torch.tensor([0, 1, 2, 2, 1, 0]), torch.tensor([0.2, 0.9, 0.4, 0.5, 0.15, 1.0])
    reward, constant = torch.randn(6, generator=generator, dtype=torch.float64), outputs.detach()
    robust = constant.clone()
    for i in range(6):
        robust[i, action[i]] += (reward[i] - constant[i, action[i]]) / propensity[i]
    (expected,) = torch.autograd.grad((outputs - robust).square().mean(), outputs)
    (found,) = torch.autograd.grad(bandit.weighted_regression(outputs, action, propensity, reward), outputs)
    torch.testing.assert_close(found, expected)


def test_weighted_regression_is_the_error_over_all_arms_alike(problem):
    """On average over what may be logged, whatever the logging policy prefers."""
    found = expectation(
        problem, lambda action, r: bandit.weighted_regression(problem["estimates"], action, logged(problem, action), r)
    )
    errors = (problem["estimates"][..., None] - problem["values"]).square() * problem["chance"]
    assert problem["logging"].min() > 1 / bandit.CLIP  # nothing is cut
    assert found == pytest.approx(errors.sum(dim=2).mean().item(), abs=1e-12)


def test_descending_the_policy_loss_finds_the_better_arm():
    """Arm 1 pays twice as much as arm 0, which is logged nine times of ten."""
    action = torch.tensor([0] * 9 + [1])
    propensity, reward = torch.where(action == 0, 0.9, 0.1), torch.where(action == 0, 1.0, 2.0)
    row = torch.zeros(1, 2, requires_grad=True)
    for _ in range(200):
        loss = bandit.inverse_propensity(row.expand(10, 2), action, propensity, reward)
        row = (row - 0.1 * torch.autograd.grad(loss, row)[0]).detach().requires_grad_()
    assert row[0, 1] > row[0, 0]


@pytest.mark.parametrize("propensity", [0.0, -0.3, 1.4, math.nan])
@pytest.mark.parametrize("loss", LOSSES[1:])
def test_what_is_no_propensity_makes_the_loss_nan(loss, propensity):
    assert loss(torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([0.5, propensity]), torch.ones(2)).isnan()


@pytest.mark.parametrize("function", [*LOSSES, bandit.greedy_snips, bandit.greedy_doubly_robust])
def test_they_are_computed_for_many_tasks_at_once(function):
    outputs, action = torch.randn(4, 6, ARMS), torch.arange(24).reshape(4, 6) % ARMS
    propensity, reward, arms = 0.2 + 0.5 * torch.rand(4, 6), torch.randn(4, 6), torch.randn(4, 6, ARMS)
    together = torch.func.vmap(function)(outputs, action, propensity, reward, arms)
    alone = [function(*each) for each in zip(outputs, action, propensity, reward, arms, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone), equal_nan=True)
