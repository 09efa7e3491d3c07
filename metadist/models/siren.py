"""Sinusoidal representation network: a field, from coordinates to values."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Sine(nn.Module):
    """sin(w0 x), [n, width] -> [n, width]."""

    def __init__(self, w0: float):
        super().__init__()
        self.w0 = w0

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.w0 * x)


class SIREN(nn.Module):
    """All inputs, coordinates in about -1..1, joined -> hidden layers sin(w0 (W x + b)) -> `head`. [n, ...] each ->
    [n, outputs].

    Sitzmann et al. 2020 (https://arxiv.org/abs/2006.09661), with their initialisation (theorem 1.8 of the supplement):
    W of the first layer from U(-1/d, 1/d) for d inputs, of the others and the head from U(-s, s) with
    s = sqrt(6/d)/w0, so that what a sine is given has a deviation near 1 in every layer; biases as torch's. Larger w0:
    finer detail from the start.

    Raises:
        ValueError: where w0 is not above 0.
    """

    def __init__(
        self, input_shapes: Sequence[Sequence[int]], outputs: int, hidden: Sequence[int] = (64, 64, 64), w0: float = 30
    ):
        super().__init__()
        if w0 <= 0:
            raise ValueError(f"w0={w0} must be above 0")
        widths = [sum(math.prod(shape) for shape in input_shapes), *hidden]
        self.body = nn.Sequential()
        for width_in, width_out in zip(widths, widths[1:], strict=False):
            self.body.extend([nn.Linear(width_in, width_out), Sine(w0)])
        self.head = nn.Linear(widths[-1], outputs)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                d = layer.in_features
                bound = 1 / d if layer is self.body[0] else math.sqrt(6 / d) / w0
                nn.init.uniform_(layer.weight, -bound, bound)

    def features(self, *inputs: Tensor) -> Tensor:
        dtype = self.head.weight.dtype
        return self.body(torch.cat([x.reshape(len(x), -1).to(dtype) for x in inputs], dim=1))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(self.features(*inputs))
