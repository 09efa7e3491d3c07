import pytest
import torch

from metadist.models import MLP, GaussianPolicy


def test_it_gives_a_mean_that_depends_on_the_observation_and_a_deviation_that_does_not():
    torch.manual_seed(0)
    policy = GaussianPolicy([[3]], 2, hidden=(4,), initial_std=0.5)
    observed = torch.randn(5, 3)
    mean, log_std = policy(observed).chunk(2, dim=1)
    assert isinstance(policy.mean, MLP) and torch.equal(mean, policy.mean(observed))
    assert mean.abs().max() < 0.02
    assert torch.allclose(log_std.exp(), torch.full((5, 2), 0.5)) and policy.log_std.requires_grad


def test_a_deviation_must_be_above_zero():
    with pytest.raises(ValueError, match="initial_std=0"):
        GaussianPolicy([[3]], 2, initial_std=0)
