"""The residual network of the few-shot literature."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from metadist.models.layers import Conv3x3, normalisation


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions with normalisation beside a 1x1 shortcut, then 2x2 max-pooling.

    [n, channels_in, h, w] -> [n, channels, h // 2, w // 2].
    """

    def __init__(self, channels_in: int, channels: int, norm: str):
        super().__init__()
        depths = [channels_in, channels, channels, channels]
        self.convs = nn.ModuleList(
            Conv3x3(before, after, bias=False) for before, after in zip(depths, depths[1:], strict=False)
        )
        self.shortcut = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.norms = nn.ModuleList(normalisation(norm, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=False)):
            y = norm(conv(y))
            if number < 2:
                y = F.leaky_relu(y, 0.1)
        return F.max_pool2d(F.leaky_relu(y + self.norms[3](self.shortcut(x)), 0.1), 2)


class ResNet12(nn.Module):
    """Four residual blocks, the mean over the last map, a linear `head`. [n, c, h, w] -> [n, outputs].

    The network of Lee et al. 2019 (https://arxiv.org/abs/1904.03758) for 84x84 images, without its dropout. `norm`:
    "batch" (transductive) or "group" (each image on its own).
    """

    def __init__(
        self,
        input_shapes: Sequence[Sequence[int]],
        outputs: int,
        channels: Sequence[int] = (64, 160, 320, 640),
        norm: str = "batch",
    ):
        super().__init__()
        (shape,) = input_shapes
        if min(shape[1:]) < 2 ** len(channels):
            raise ValueError(f"{len(channels)} poolings leave nothing of {shape[1]}x{shape[2]} images: use conv4")
        depths = [shape[0], *channels]
        self.body = nn.Sequential(
            *(ResidualBlock(before, after, norm) for before, after in zip(depths, depths[1:], strict=False))
        )
        self.head = nn.Linear(channels[-1], outputs)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
