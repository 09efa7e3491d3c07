"""Layers of the built-in networks, made for second-order gradients of small batches.

Measured on one core with Conv4's shapes: torch's batch normalisation differentiates twice through some fifty small
operations where sixteen suffice, its convolution takes a dilated one in the place of a gradient by weights, a direct
convolution of one channel takes five times the time of a matrix product, and everything after a channels-last tensor
stays in that format, in which convolutions are faster.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from metadist.models.noise import uniform

NARROW = 3  # input channels up to which a convolution is a matrix product
aten = torch.ops.aten


class BatchNorm(nn.Module):
    """Normalises each channel by the statistics of the batch at hand; none are kept. [n, c, h, w] -> same.

    Where the caller sets `running` (mean and variance, [c] each) it normalises by these; where it sets `noted`, it
    leaves those of the batch there (the variance unbiased, as torch's running statistics).
    """

    running: tuple[Tensor, Tensor] | None = None
    noted: list[tuple[Tensor, Tensor]] | None = None

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.running is not None:
            given = (*self.running, self.weight, self.bias)
            mean, variance, weight, bias = (part.view(-1, *[1] * (x.dim() - 2)) for part in given)
            return (x - mean) * (variance + self.eps).rsqrt() * weight + bias
        y, mean, rstd = _Normalise.apply(x, self.weight, self.bias, self.eps)
        if self.noted is not None:
            count = x.numel() // x.shape[1]
            self.noted.append((mean, (rstd**-2 - self.eps) * (count / max(1, count - 1))))
        return y


class GroupNorm(nn.GroupNorm):
    """Normalises the channels of each example in 8 groups. [n, c, h, w] -> same."""

    def __init__(self, channels: int):
        super().__init__(8, channels)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x.contiguous())  # vmap cannot ask a group norm's input for its memory format


def normalisation(kind: str, channels: int) -> nn.Module:
    """`kind`: "batch" (transductive) or "group" (each example on its own)."""
    if kind not in ("batch", "group"):
        raise ValueError(f"norm must be 'batch' or 'group', not {kind!r}")
    return BatchNorm(channels) if kind == "batch" else GroupNorm(channels)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding 1. [n, c, h, w] -> [n, outputs, ceil(h / stride), ceil(w / stride)].

    On the CPU few channels, of images without a gradient, are one matrix product, which leaves the result in
    channels-last memory; weights of more channels are in that format too. On GPUs, and under autocast, it is torch's.
    """

    def __init__(self, channels_in: int, channels: int, stride: int = 1, bias: bool = True):
        super().__init__(channels_in, channels, 3, stride=stride, padding=1, bias=bias)
        if channels_in > NARROW:
            self.weight = nn.Parameter(self.weight.detach().to(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if x.device.type != "cpu" or x.dim() != 4 or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        if self.in_channels > NARROW or x.requires_grad:
            return _Convolution.apply(x, self.weight, self.bias, self.stride[0])
        step = self.stride[0]
        patches = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, step).unfold(3, 3, step)
        n, _, height, width = patches.shape[:4]
        rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(n * height * width, -1)
        weight = self.weight.reshape(self.out_channels, -1)
        if self.bias is not None:  # as one more column: adding it afterwards would pass over the result again
            rows, weight = F.pad(rows, (0, 1), value=1.0), torch.cat([weight, self.bias.unsqueeze(1)], dim=1)
        weight = weight.T.contiguous()  # else its gradient is a product of transposes, at a sixth of the speed
        return (rows @ weight).view(n, height, width, -1).permute(0, 3, 1, 2)


class WeightNorm(nn.Module):
    """Stands in for torch's weight norm (Salimans and Kingma 2016): magnitude g and direction v -> g v / |v|, with a
    norm for each index of `dim` (-1: one norm)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return normed_weight(v, g, self.dim)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return _norm(weight, self.dim), weight


def normed_weight(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """g v / |v|, see `WeightNorm`."""
    return v * (g / _norm(v, dim))


def _norm(v: Tensor, dim: int) -> Tensor:
    return v.norm() if dim == -1 else v.square().sum([axis for axis in range(v.ndim) if axis != dim], True).sqrt()


class Dropout(nn.Module):
    """Stands in for torch's dropout, which draws from a global generator: the mask is a function of `key`, an int64
    scalar that the caller sets; without one nothing is dropped. `whole`: by channel, [n, c, ...], not by element."""

    key: Tensor | None = None

    def __init__(self, p: float, whole: bool = False):
        super().__init__()
        self.p, self.whole = p, whole

    def forward(self, x: Tensor) -> Tensor:
        if self.key is None:
            return x
        shape = [*x.shape[:2], *[1] * (x.dim() - 2)] if self.whole else x.shape
        return x * (uniform(self.key, shape) >= self.p) / (1 - self.p)


class _Normalise(Function):
    """y = weight * h + bias, where h = (x - mean) * rstd by channel. Returns (y, mean, rstd)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return aten.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, *output[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *_NormaliseBackward.apply(gradient, *ctx.saved_tensors, ctx.eps), None


class _NormaliseBackward(Function):
    """dx = weight * rstd * (g - E g - h E[g h]), dweight = sum g h, dbias = sum g; E is the mean over a channel."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> tuple[Tensor, ...]:
        return aten.native_batch_norm_backward(g, x, weight, None, None, mean, rstd, True, eps, [True] * 3)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        del output
        ctx.save_for_backward(*inputs[:-1])

    @staticmethod
    def backward(ctx: Any, u: Tensor, uweight: Tensor, ubias: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradients of <u, dx> + <uweight, dweight> + <ubias, dbias>. mean and rstd count as functions of x."""
        g, x, weight, mean, rstd = ctx.saved_tensors
        channels = _Channels(x, mean, rstd)
        h, mean_u, mean_g = channels.h, channels.mean(u), channels.mean(g)
        u_along, g_along = channels.mean(u * h), channels.mean(g * h)
        covariance = channels.mean(u * g) - mean_u * mean_g
        scale = weight * rstd
        to_g = channels.combine(ubias - scale * mean_u, (u, scale), (h, uweight - scale * u_along))
        of_u, of_g = -scale * rstd * g_along, uweight * rstd - scale * rstd * u_along
        of_h = scale * rstd * (3 * u_along * g_along - covariance) - uweight * rstd * g_along
        to_x = channels.combine(-of_u * mean_u - of_g * mean_g, (u, of_u), (g, of_g), (h, of_h))
        to_weight = rstd * (covariance - u_along * g_along) * (x.numel() // x.shape[1])
        return to_g, to_x, to_weight, None, None, None


class _Convolution(Function):
    """What `Conv3x3` computes where it is no matrix product."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        return F.conv2d(x, weight, bias, stride, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        x, weight, _, ctx.stride = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needed = tuple(ctx.needs_input_grad[:3])
        found = iter(_ConvolutionBackward.apply(gradient, *ctx.saved_tensors, ctx.stride, needed))
        return *(next(found) if each else None for each in needed), None


class _ConvolutionBackward(Function):
    """Those of (dx, dweight, dbias) that are `needed`. In torch's own derivative of this the gradient by weights is a
    dilated convolution, which takes half as long again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, x: Tensor, weight: Tensor, stride: int, needed: tuple[bool, ...]) -> tuple[Tensor, ...]:
        found = _convolution_backward(g, x, weight, stride, needed)
        return tuple(each for each, wanted in zip(found, needed, strict=True) if wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        del output
        *saved, ctx.stride, ctx.needed = inputs
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)  # zeros would be convolved

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradients of <u, dx> + <uweight, dweight> + <ubias, dbias>, which are linear in g, x and weight."""
        g, x, weight = ctx.saved_tensors
        _, of_x, of_weight = ctx.needs_input_grad[:3]
        given = iter(cotangents)
        u, uweight, ubias = (next(given) if each else None for each in ctx.needed)
        to_g = to_x = to_weight = None
        if uweight is not None:
            to_g = F.conv2d(x, uweight, ubias, ctx.stride, 1)
            if of_x:
                to_x = _convolution_backward(g, x, uweight, ctx.stride, (True, False, False))[0]
        elif ubias is not None:
            to_g = ubias.view(-1, 1, 1).expand_as(g)
        if u is not None:
            along = F.conv2d(u, weight, None, ctx.stride, 1)
            to_g = along if to_g is None else to_g + along
            if of_weight:
                to_weight = _convolution_backward(g, u, weight, ctx.stride, (False, True, False))[1]
        return to_g, to_x, to_weight, None, None


def _convolution_backward(g: Tensor, x: Tensor, weight: Tensor, stride: int, needed: tuple[bool, ...]) -> Any:
    """(dx, dweight, dbias), None where not needed."""
    geometry = [stride, stride], [1, 1], [1, 1], False, [0, 0], 1  # padding and dilation 1, one group
    return aten.convolution_backward(g, x, weight, [len(weight)], *geometry, needed)


class _Channels:
    """Means over, and combinations along, the channels (axis 1) of tensors shaped like x."""

    def __init__(self, x: Tensor, mean: Tensor, rstd: Tensor):
        self._over = [axis for axis in range(x.dim()) if axis != 1]
        self._shape = [1, -1] + [1] * (x.dim() - 2)
        self.h = (x - mean.view(self._shape)) * rstd.view(self._shape)

    def mean(self, tensor: Tensor) -> Tensor:
        return tensor.mean(self._over)

    def combine(self, constant: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
        total = constant.view(self._shape)
        for tensor, factor in terms:
            total = torch.addcmul(total, tensor, factor.view(self._shape))
        return total
