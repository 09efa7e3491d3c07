"""The four-block convolutional network of the few-shot literature."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadist.models.layers import Conv3x3, normalisation


class Block(nn.Module):
    """3x3 convolution, normalisation, ReLU; halves the image by stride 2 or by 2x2 max-pooling."""

    def __init__(self, channels_in: int, channels: int, pool: bool, norm: str):
        super().__init__()
        self.conv = Conv3x3(channels_in, channels, stride=1 if pool else 2)
        self.norm = normalisation(norm, channels)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(F.relu(self.norm(self.conv(x))))


class Conv4(nn.Module):
    """Four blocks of 3x3 convolutions, then a linear `head`. [n, c, h, w] -> [n, outputs].

    Strided with 64 channels: the Omniglot network of Finn et al. 2017, section 5.2 (its head averages the last map);
    pooled with 32: its miniImagenet network. `norm`: "batch" (transductive) or "group" (each image on its own).
    `context`: so many parameters of that name, zero to begin with, from which a linear layer makes a scale and a shift
    for each channel of the third block (FiLM; for CAVIA).
    """

    def __init__(
        self,
        input_shapes: Sequence[Sequence[int]],
        outputs: int,
        channels: int = 64,
        pool: bool = False,
        norm: str = "batch",
        context: int = 0,
    ):
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels={channels} must be 1 or more")
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
        self.context = nn.Parameter(torch.zeros(context)) if context else None
        self.film = nn.Linear(context, 2 * channels) if context else None
        self.head = nn.Linear(size, outputs)

    def features(self, x: Tensor) -> Tensor:
        if self.film is None:
            x = self.body(x)
        else:
            scale, shift = self.film(self.context).chunk(2)
            x = self.body[3](self.body[:3](x) * (1 + scale[:, None, None]) + shift[:, None, None])
        return x.mean(dim=(2, 3)) if self.average else x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
