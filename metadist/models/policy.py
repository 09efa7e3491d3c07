"""A policy network for continuous actions."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metadist.models.mlp import MLP

FIRST_SCALE = 0.01


class GaussianPolicy(nn.Module):
    """Observations [n, ...] -> mean and logarithm of the standard deviation of an action, [n, 2 d] for d = `outputs`.

    The mean is an `MLP` of the observations, the deviation one learned number for each element of an action, whatever
    is observed. The last layer begins a hundred times smaller than usual, so that all first actions are around zero
    (Andrychowicz et al. 2021, section 3.2, https://arxiv.org/abs/2006.05990). For discrete actions take `mlp`, whose
    outputs are then logits.
    """

    def __init__(
        self,
        input_shapes: Sequence[Sequence[int]],
        outputs: int,
        hidden: Sequence[int] = (100, 100),
        initial_std: float = 1.0,
    ):
        super().__init__()
        if initial_std <= 0:
            raise ValueError(f"initial_std={initial_std} must be above 0")
        self.mean = MLP(input_shapes, outputs, hidden)
        with torch.no_grad():
            self.mean.head.weight.mul_(FIRST_SCALE)
            self.mean.head.bias.zero_()
        self.log_std = nn.Parameter(torch.full((outputs,), initial_std).log())

    def forward(self, *observations: Tensor) -> Tensor:
        mean = self.mean(*observations)
        return torch.cat([mean, self.log_std.expand_as(mean)], dim=-1)
