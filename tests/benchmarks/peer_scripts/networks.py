"""The networks of the benchmark, in plain torch: every peer and metadist compute exactly these.

Normalisation uses the statistics of the batch at hand and keeps none. Names of parameters are those of metadist's
built-in networks where there is one, so that the same file of initial weights fits both.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.Module):
    """Affine normalisation by batch statistics. [n, c, h, w] -> same."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


class Block(nn.Module):
    """3x3 convolution with bias, normalisation, ReLU; halves the image by stride 2 or by 2x2 max-pooling."""

    def __init__(self, channels_in: int, channels: int, pool: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, stride=1 if pool else 2, padding=1)
        self.norm = BatchNorm(channels)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return F.max_pool2d(x, 2) if self.pool else x


class Conv4(nn.Module):
    """Four blocks, then `head`: on the spatial mean where strided, on the flattened last map where pooled."""

    def __init__(self, input_shape: Sequence[int], outputs: int, channels: int, pool: bool):
        super().__init__()
        depths = [input_shape[0], *[channels] * 4]
        self.body = nn.Sequential(*(Block(a, b, pool) for a, b in zip(depths, depths[1:], strict=False)))
        self.pool = pool
        size = channels * (input_shape[1] // 16) * (input_shape[2] // 16) if pool else channels
        self.head = nn.Linear(size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        return self.head(features.flatten(1) if self.pool else features.mean(dim=(2, 3)))


class Residual(nn.Module):
    """Three 3x3 convolutions with normalisation beside a 1x1 one, LeakyReLU 0.1, 2x2 max-pooling; no dropout."""

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        depths = [channels_in, channels, channels, channels]
        pairs = list(zip(depths, depths[1:], strict=False))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairs)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.norms = nn.ModuleList(BatchNorm(channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        kept = self.norms[3](self.shortcut(x))
        for place, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=False)):
            x = norm(conv(x))
            x = F.leaky_relu(x, 0.1) if place < 2 else x
        return F.max_pool2d(F.leaky_relu(x + kept, 0.1), 2)


class ResNet12(nn.Module):
    """Four residual blocks, the spatial mean, a linear `head`."""

    def __init__(self, input_shape: Sequence[int], outputs: int, widths: Sequence[int]):
        super().__init__()
        depths = [input_shape[0], *widths]
        self.body = nn.Sequential(*(Residual(a, b) for a, b in zip(depths, depths[1:], strict=False)))
        self.head = nn.Linear(depths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(dim=(2, 3)))


class MLP(nn.Module):
    """Two hidden layers of 40 with ReLU: the sinusoid network of Finn et al. 2017, section 5.1."""

    def __init__(self, input_shape: Sequence[int], outputs: int):
        super().__init__()
        first = nn.Linear(math.prod(input_shape), 40)
        self.body = nn.Sequential(first, nn.ReLU(), nn.Linear(40, 40), nn.ReLU())
        self.head = nn.Linear(40, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1)))


def build(network: str, input_shape: Sequence[int], outputs: int) -> nn.Module:
    """The network that a workload names."""
    if network == "conv4-64-strided":
        return Conv4(input_shape, outputs, channels=64, pool=False)
    if network == "conv4-32-pooled":
        return Conv4(input_shape, outputs, channels=32, pool=True)
    if network == "resnet12":
        return ResNet12(input_shape, outputs, widths=(64, 128, 256, 512))
    if network == "mlp-40-40":
        return MLP(input_shape, outputs)
    raise ValueError(f"no network is called {network!r}")
