"""Losses and metrics of a task. Each is a mean over examples; `inner_lr` is stated for that scale.

A loss is any callable `loss(outputs, *targets) -> scalar`, so a job may name its own as `module:callable`.
"""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.core.errors import InputError

Loss = Callable[..., Tensor]
NO_LABEL = -(2**63)
"""Examples of one label are left out by torch, those of -100 unless it is told another: of this one there are none."""


def _by_hand(outputs: Tensor) -> bool:
    """Whether losses are computed from simpler operations: under vmap torch's own are Python, which imports sympy (a
    third of a second). On GPUs the derivatives of these here are slower."""
    level = torch._C._functorch.maybe_current_level()  # pyright: ignore[reportAttributeAccessIssue]
    return level is not None and outputs.device.type == "cpu"


def never(logits: Tensor, present: Tensor) -> Tensor:
    """Logits [n, N] with those of classes that are not `present` [N] so low that their probability is 0, and that of
    the others as if they were not there; still finite, so that all derivatives are."""
    return torch.where(present, logits, torch.finfo(logits.dtype).min / 2)


def cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over examples, in nats.

    The original MAML code sums over the N*K support examples and divides by K: its inner rate is N times ours.

    Args:
        outputs: logits [n, N].
        target: labels [n], int64 in [0, N); all of them count.

    Raises:
        InputError: for a label that is no output.

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))  # log 4
        tensor(1.3863)
    """
    try:
        labels = target.dtype == torch.int64 and target.shape == outputs.shape[:1] + outputs.shape[2:]
        if labels and _by_hand(outputs):
            return -F.log_softmax(outputs, dim=1).gather(1, target.unsqueeze(1)).mean()
        return F.cross_entropy(outputs, target, ignore_index=NO_LABEL)
    except (IndexError, RuntimeError) as error:
        label = re.search(r"(-?\d+) is out of bounds", str(error))
        if label is None:
            raise
        ask = " (to leave out examples labelled -100 takes a loss of your own)" if label[1] == "-100" else ""
        raise InputError(
            f"label {label[1]} is none of the model's {outputs.shape[1]} outputs: labels are whole numbers from 0 to "
            f"{outputs.shape[1] - 1}; number the classes of a task from 0, or give the model more outputs{ask}"
        ) from None


def mean_squared_error(outputs: Tensor, *targets: Tensor) -> Tensor:
    """Mean squared error over examples and target values.

    Args:
        outputs: [n, d].
        targets: one or more of shape [n] or [n, ...], d values in all; they are joined in order.

    Raises:
        InputError: where outputs and targets have different numbers of examples or values.

    Example:
        >>> mean_squared_error(torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 0.0]))
        tensor(5.)
    """
    expected = torch.cat([target.reshape(len(target), -1) for target in targets], dim=1).to(outputs.dtype)
    found = outputs.reshape(len(outputs), -1)
    if len(found) != len(expected):
        raise InputError(f"the model gives values for {len(found)} examples, and there are targets of {len(expected)}")
    if found.shape != expected.shape:  # which would be broadcast
        raise InputError(f"the model gives {found.shape[1]} values for an example, its targets are {expected.shape[1]}")
    return (found - expected).square().mean() if _by_hand(found) else F.mse_loss(found, expected)


def accuracy(outputs: Tensor, target: Tensor) -> Tensor:
    """Fraction of examples whose largest logit is the target's; NaN where one of all logits is not finite (argmax would
    take the first class).

    Args:
        outputs: logits [n, N].
        target: labels [n], int64.

    Example:
        >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        tensor(0.5000)
    """
    return _if_finite(outputs, (outputs.argmax(dim=-1) == target).to(outputs.dtype).mean())


def confidence(outputs: Tensor, target: Tensor) -> Tensor:
    """The mean probability of the predicted class; a calibrated learner's is its accuracy. NaN where a logit is not
    finite.

    Args:
        outputs: logits [n, N].
        target: not used.

    Example:
        >>> confidence(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
        tensor(0.5000)
    """
    del target
    return _if_finite(outputs, outputs.softmax(dim=-1).amax(dim=-1).mean())


def _if_finite(outputs: Tensor, value: Tensor) -> Tensor:
    return torch.where(outputs.isfinite().all(), value, torch.nan)


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": mean_squared_error}
