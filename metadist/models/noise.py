"""Random tensors that are a pure function of a key, which is itself a tensor: so the same in a loop over tasks, under
vmap, in a recording that is played back, and when a step is computed a second time.

The numbers are SplitMix64's (Steele, Lea, Flood 2014, https://doi.org/10.1145/2660193.2660195) for counters 0, 1, ...
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


def words(key: Tensor, count: int) -> Tensor:
    """int64 [count] of uniform bits; `key` is an int64 scalar. Arithmetic wraps around."""
    x = (torch.arange(1, count + 1, device=key.device) + _scramble(key)) * GOLDEN
    return _scramble(x)


def uniform(key: Tensor, shape: Sequence[int]) -> Tensor:
    """float64 in [0, 1), 53 bits each."""
    return _shifted(words(key, math.prod(shape)), 11).to(torch.float64).reshape(shape) * 2.0**-53


def normal(key: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal float64 (Box-Muller)."""
    size = math.prod(shape)
    first, second = uniform(key, (2, size))
    return ((-2 * torch.log1p(-first)).sqrt() * torch.cos(2 * math.pi * second)).reshape(shape)


def _scramble(x: Tensor) -> Tensor:
    for shift, factor in MIX:
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, places: int) -> Tensor:
    """To the right, filled with zeros: int64's own shift repeats the sign."""
    return (x >> places) & ((1 << (64 - places)) - 1)
