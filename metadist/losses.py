"""Losses and metrics of a task. Each is a mean over examples; `inner_lr` is stated for that scale.

A loss is any callable `loss(outputs, *targets) -> scalar`, so a job may name its own as `module:callable`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.errors import InputError

Loss = Callable[..., Tensor]


def cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy in nats. outputs [n, N] logits, target [n] int64 in [0, N).

    The original MAML code sums over the N*K support examples and divides by K: its inner rate is N times ours.
    """
    return F.cross_entropy(outputs, target)


def mean_squared_error(outputs: Tensor, *targets: Tensor) -> Tensor:
    """Mean over examples and target values. outputs [n, d]; targets of shape [n] or [n, ...], d values in all."""
    expected = torch.cat([target.reshape(len(target), -1) for target in targets], dim=1).to(outputs.dtype)
    found = outputs.reshape(len(outputs), -1)
    if found.shape != expected.shape:  # which would be broadcast
        raise InputError(f"the model gives {found.shape[1]} values for an example, its targets are {expected.shape[1]}")
    return F.mse_loss(found, expected)


def accuracy(outputs: Tensor, target: Tensor) -> Tensor:
    """Fraction of examples whose largest logit is the target's. outputs [n, N], target [n]."""
    return (outputs.argmax(dim=-1) == target).to(outputs.dtype).mean()


def confidence(outputs: Tensor, target: Tensor) -> Tensor:
    """The mean probability of the predicted class; a calibrated learner's is its accuracy. outputs [n, N] logits."""
    del target
    return outputs.softmax(dim=-1).amax(dim=-1).mean()


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": mean_squared_error}
