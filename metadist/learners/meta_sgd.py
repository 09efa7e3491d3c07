"""Meta-SGD: a learned inner rate for every parameter."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metadist.learners.learner import Fast, Tensors
from metadist.learners.maml import MAML


@dataclass(frozen=True, kw_only=True)
class MetaSGD(MAML):
    """phi = theta - alpha * grad L_support(theta), elementwise; theta and alpha are learned together.

    Li et al. 2017, equation 3 and Algorithm 1 (https://arxiv.org/abs/1707.09835). alpha starts uniformly in
    [`lowest_rate`, `highest_rate`], the paper's range, from `rate_seed`. Each rate is shared by all inner steps.
    `positive=True` learns log alpha, so that no rate changes sign.
    """

    lowest_rate: float = 0.005
    highest_rate: float = 0.1
    rate_seed: int = 0
    positive: bool = False

    learned_rates: ClassVar[bool] = True
    refused: ClassVar[Mapping[str, str]] = {"inner_lr": "it learns rates, from lowest_rate to highest_rate at first"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.lowest_rate <= self.highest_rate:
            raise ValueError(f"lowest_rate={self.lowest_rate} must be above 0 and at most {self.highest_rate}")

    def layout(self) -> Tensors:
        generator, rates = torch.Generator().manual_seed(self.rate_seed), {}
        for name in self.adapted_names():
            value = self.model.parameters[name]
            drawn = torch.rand(value.shape, generator=generator, dtype=torch.float64)
            rate = self.lowest_rate + (self.highest_rate - self.lowest_rate) * drawn
            rates[f"inner_lr/{name}"] = torch.empty_like(value).copy_(rate.log() if self.positive else rate)
        return self.model.parameters | rates

    def rate(self, theta: Tensors, fast: Fast, name: str, k: int) -> Tensor | float:
        del fast, k
        rate = theta[f"inner_lr/{name}"]
        return rate.exp() if self.positive else rate
