"""The four-block convolutional network of the few-shot literature."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.Module):
    """Normalises by the statistics of the batch at hand; none are kept. [n, c, h, w] -> same."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


class Block(nn.Module):
    """3x3 convolution, normalisation, ReLU; halves the image by stride 2 or by 2x2 max-pooling."""

    def __init__(self, channels_in: int, channels: int, pool: bool, norm: str):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, stride=1 if pool else 2, padding=1)
        self.norm = BatchNorm(channels) if norm == "batch" else nn.GroupNorm(8, channels)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(F.relu(self.norm(self.conv(x))))


class Conv4(nn.Module):
    """Four blocks of 3x3 convolutions, then a linear `head`. [n, c, h, w] -> [n, outputs].

    Strided with 64 channels: the Omniglot network of Finn et al. 2017, section 5.2 (its head averages the last map);
    pooled with 32: its miniImagenet network. `norm`: "batch" (transductive) or "group" (each image on its own).
    """

    def __init__(
        self,
        input_shapes: Sequence[Sequence[int]],
        outputs: int,
        channels: int = 64,
        pool: bool = False,
        norm: str = "batch",
    ):
        super().__init__()
        if norm not in ("batch", "group"):
            raise ValueError(f"norm must be 'batch' or 'group', not {norm!r}")
        (shape,) = input_shapes
        depths = [shape[0], *[channels] * 4]
        self.body = nn.Sequential(
            *(Block(before, after, pool, norm) for before, after in zip(depths, depths[1:], strict=False))
        )
        size = channels * (shape[1] // 16) * (shape[2] // 16) if pool else channels
        if size == 0:
            raise ValueError(
                f"four poolings need images of 16x16 or more, these are {shape[1]}x{shape[2]}: set pool=false"
            )
        self.average = not pool
        self.head = nn.Linear(size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        return self.head(features.mean(dim=(2, 3)) if self.average else features.flatten(1))
