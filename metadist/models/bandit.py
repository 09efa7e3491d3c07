"""Contextual bandits from logs: losses that learn a policy from them, and estimates of what a policy is worth.

A logged round has a context (the inputs), the `action` that was taken of A arms, its `propensity` (the probability with
which the logging policy took it, above 0 and at most 1) and its `reward`. A model gives outputs [n, A]. The policy that
is judged is greedy: the arm of the largest output. Losses take `*truth`, further targets such as the rewards of all
arms that a benchmark knows, and do not look at them. A job names what it takes as `metadist.models.bandit:NAME`:

    loss: metadist.models.bandit:direct_method
    evaluation:
      metrics: {snips: "metadist.models.bandit:greedy_snips"}
      better: higher

Propensities must be as they were logged: a table of logs is imported without --standardize. One that is no probability
makes a loss NaN, which a run reports with its task.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP = 10.0
"""What weights (a policy's probability over the propensity) are cut to in losses, for their variance."""
ANY = 0.01
"""How often the greedy policy is held to take any arm in `greedy_snips`."""


def direct_method(outputs: Tensor, action: Tensor, propensity: Tensor, reward: Tensor, *truth: Tensor) -> Tensor:
    """Mean squared error of the reward that the model estimates for the action taken: regression, without propensities.

    Biased where the model cannot be right for arms that were seldom taken; low variance (Dudik, Langford, Li 2011,
    section 2, https://arxiv.org/abs/1103.4601).

    Args:
        outputs: estimated rewards [n, A].
        action: int64 [n].
        propensity: [n], not used.
        reward: [n].
        truth: further targets, not used.

    Example:
        >>> direct_method(torch.tensor([[1.0, 5.0]]), torch.tensor([1]), torch.tensor([0.5]), torch.tensor([3.0]))
        tensor(4.)
    """
    del propensity, truth
    return F.mse_loss(_of(outputs, action), reward.to(outputs.dtype))


def inverse_propensity(outputs: Tensor, action: Tensor, propensity: Tensor, reward: Tensor, *truth: Tensor) -> Tensor:
    """Minus the value of the softmax policy by inverse propensities, weights cut at `CLIP`.

    Clipping is its variance control (Swaminathan and Joachims 2015, https://arxiv.org/abs/1502.02362, equation 5): a
    bias towards 0 for what the logging policy hardly ever did.

    Args:
        outputs: logits of the policy [n, A].
        action: int64 [n].
        propensity, reward: [n].
        truth: further targets, not used.

    Example:
        >>> inverse_propensity(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([0.25]), torch.tensor([3.0]))
        tensor(-6.)
    """
    del truth
    return -ips_value(outputs.softmax(dim=1), action, propensity, reward, CLIP)


def weighted_regression(outputs: Tensor, action: Tensor, propensity: Tensor, reward: Tensor, *truth: Tensor) -> Tensor:
    """Least squares weighted by inverse propensities: the squared error of the reward that the model estimates for the
    action taken, over its propensity (weights cut at `CLIP`), mean over rounds, over A.

    On average it is the error over all arms alike, so that a model which cannot be right for all of them is not bent to
    those that were often taken. A loss for reward estimates, not a policy's value: that is `doubly_robust_value`. Where
    no weight is cut, its gradient equals that of regression of all arms' estimates on doubly robust rewards, of arm a
    q(a) + [a was taken] / propensity * (reward - q(a)) (Dudik, Langford, Li 2011, equation 3, for the policy that takes
    a), if q is the model's own current estimate, held constant; with any other q it does not.

    Args:
        outputs: estimated rewards [n, A].
        action: int64 [n].
        propensity, reward: [n].
        truth: further targets, not used.

    Example:
        >>> rounds = torch.tensor([1]), torch.tensor([0.25]), torch.tensor([3.0])
        >>> weighted_regression(torch.zeros(1, 2), *rounds)  # 4 * 9 / 2
        tensor(18.)
    """
    del truth
    left = _of(outputs, action) - reward
    return (_weights(torch.ones_like(outputs), action, propensity, CLIP) * left.square()).mean() / outputs.shape[1]


def ips_value(policy: Tensor, action: Tensor, propensity: Tensor, reward: Tensor, clip: float = math.inf) -> Tensor:
    """The value of a policy by inverse propensities: mean of policy(action) / propensity * reward. Unbiased without
    `clip`, where propensities are right and above 0 for all that the policy does.

    Args:
        policy: probabilities [n, A].
        action: int64 [n].
        propensity, reward: [n].
        clip: the largest weight.

    Example:
        >>> ips_value(torch.tensor([[0.5, 0.5]]), torch.tensor([1]), torch.tensor([0.25]), torch.tensor([3.0]))
        tensor(6.)
    """
    return (_weights(policy, action, propensity, clip) * reward).mean()


def snips_value(policy: Tensor, action: Tensor, propensity: Tensor, reward: Tensor) -> Tensor:
    """The value by inverse propensities divided by the mean weight (self-normalized): a weighted mean of rewards, which
    stays between the smallest and the largest; biased, less variable (Swaminathan and Joachims 2015, "The
    self-normalized estimator for counterfactual learning", equation 9). NaN where the policy takes no logged action.

    Args:
        policy: probabilities [n, A].
        action: int64 [n].
        propensity, reward: [n].

    Example:
        >>> rounds = torch.tensor([0, 1]), torch.tensor([0.5, 0.25]), torch.tensor([1.0, 4.0])
        >>> snips_value(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), *rounds)  # weights 1 and 2
        tensor(3.)
    """
    weights = _weights(policy, action, propensity)
    return (weights * reward).sum() / weights.sum()


def doubly_robust_value(
    policy: Tensor, estimates: Tensor, action: Tensor, propensity: Tensor, reward: Tensor, clip: float = math.inf
) -> Tensor:
    """Mean over rounds of sum_a policy(a) estimates(a) + policy(action) / propensity * (reward - estimates(action)).
    Unbiased without `clip` where the propensities are right or the estimates are.

    Args:
        policy: probabilities [n, A].
        estimates: of rewards [n, A], made without these rounds' rewards.
        action: int64 [n].
        propensity, reward: [n].
        clip: the largest weight.

    Example:
        >>> estimates, half = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.5]])
        >>> doubly_robust_value(half, estimates, torch.tensor([1]), torch.tensor([0.25]), torch.tensor([3.0]))
        tensor(3.5000)
    """
    left = reward - _of(estimates, action)
    return ((policy * estimates).sum(dim=1) + _weights(policy, action, propensity, clip) * left).mean()


def greedy_snips(outputs: Tensor, action: Tensor, propensity: Tensor, reward: Tensor, *truth: Tensor) -> Tensor:
    """Metric: the value of the greedy policy by `snips_value`. The policy is held to take any arm `ANY` of the time: so
    of a task in which it took no logged action, a value that says as much is left, that of any arm.

    Example:
        >>> rounds = torch.tensor([0, 1]), torch.tensor([0.5, 0.25]), torch.tensor([1.0, 4.0])
        >>> greedy_snips(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), *rounds)  # weights 1.99 and 0.02
        tensor(1.0299)
    """
    del truth
    policy = (1 - ANY) * greedy(outputs) + ANY / outputs.shape[1]
    return snips_value(policy, action, propensity, reward)


def greedy_doubly_robust(outputs: Tensor, action: Tensor, propensity: Tensor, reward: Tensor, *truth: Tensor) -> Tensor:
    """Metric: the value of the greedy policy by `doubly_robust_value`, with the outputs as estimated rewards (those of
    `direct_method` or `weighted_regression`).

    Example:
        >>> rounds = torch.tensor([0, 1]), torch.tensor([0.5, 0.25]), torch.tensor([1.0, 4.0])
        >>> greedy_doubly_robust(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), *rounds)  # (2 + 2 * (1 - 2) + 2) / 2
        tensor(1.)
    """
    del truth
    return doubly_robust_value(greedy(outputs), outputs, action, propensity, reward)


def greedy_reward(outputs: Tensor, action: Tensor, propensity: Tensor, reward: Tensor, truth: Tensor) -> Tensor:
    """Metric where a benchmark knows it: the mean of the greedy arm's expected reward.

    Args:
        outputs: [n, A].
        action, propensity, reward: [n], not used.
        truth: expected rewards of all arms [n, A].

    Example:
        >>> unused = torch.zeros(1)
        >>> greedy_reward(torch.tensor([[2.0, 1.0]]), unused, unused, unused, torch.tensor([[0.7, 0.9]]))
        tensor(0.7000)
    """
    del action, propensity, reward
    return (greedy(outputs) * truth).sum(dim=1).mean()


def greedy(outputs: Tensor) -> Tensor:
    """Probabilities [n, A] of the policy that takes the arm of the largest output; NaN where an output is not finite.

    Example:
        >>> greedy(torch.tensor([[0.1, 0.7]]))
        tensor([[0., 1.]])
    """
    chosen = F.one_hot(outputs.argmax(dim=1), outputs.shape[1]).to(outputs.dtype)
    return torch.where(outputs.isfinite().all(), chosen, torch.nan)


def _of(values: Tensor, action: Tensor) -> Tensor:
    """The value of the action taken [n], of values [n, A]."""
    return values.gather(1, action.unsqueeze(1)).squeeze(1)


def _weights(policy: Tensor, action: Tensor, propensity: Tensor, clip: float = math.inf) -> Tensor:
    """How much more probable the action is under the policy than it was when logged [n]; NaN where the propensity is
    no probability."""
    known = (propensity > 0) & (propensity <= 1)
    return (_of(policy, action) / torch.where(known, propensity, torch.nan)).clamp(max=clip)
