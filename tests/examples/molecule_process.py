"""A Gaussian process for molecules whose kernel and mean are meta-learned: a learner in closed form, by a user."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from metadist import Examples, Learner
from metadist.learners import Context, Fast

Tensors = dict[str, Tensor]
VARIANCES = {"linear": 1.0, "smooth": 1.0, "level": 1.0, "noise": 0.1}  # to begin with
SHARED = 50.0  # bits that are 1 in a fingerprint, about


class Molecules(nn.Module):
    """Fingerprints [n, bits] and descriptors [n, d] -> a prior mean [n, 1], linear in the descriptors and 0 to begin
    with; `features`: where molecules lie near one another [n, d], a linear map of the descriptors."""

    def __init__(self, descriptors: int = 9):
        super().__init__()
        self.body = nn.Linear(descriptors, descriptors, bias=False)
        self.head = nn.Linear(descriptors, 1)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(descriptors) / descriptors**0.5)
            self.head.weight.zero_()
            self.head.bias.zero_()

    def features(self, bits: Tensor, descriptors: Tensor) -> Tensor:
        return self.body(descriptors)

    def forward(self, bits: Tensor, descriptors: Tensor) -> Tensor:
        return self.head(descriptors)


def tanimoto(a: Tensor, b: Tensor) -> Tensor:
    """Fingerprints [n, d], [m, d] -> the share of the bits of either that both have [n, m]."""
    both = a @ b.T
    return both / (a.sum(1)[:, None] + b.sum(1) - both).clamp(min=1)


def smooth(a: Tensor, b: Tensor) -> Tensor:
    """exp(-|a - b|^2 / 2), [n, d], [m, d] -> [n, m]."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return (-squares.clamp(min=0) / 2).exp()


@dataclass(frozen=True, kw_only=True)
class MoleculeProcess(Learner):
    """The mean of a Gaussian process given the support set: m(x) + k(x, X) (k(X, X) + noise I)^-1 (y - m(X)).

    k is a sum of the Tanimoto kernel of fingerprints, their linear kernel, a smooth kernel of descriptors, and a
    constant for the level of the target. The variances (as logarithms; the Tanimoto kernel's is 1), the directions in
    which descriptors count, and the prior mean m are meta-learned by the error on query sets: deep kernel transfer
    (Patacchiola et al. 2020, https://arxiv.org/abs/1910.05199) takes the marginal likelihood instead.
    """

    inner_steps: int = 0
    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("inner_lr", "inner_steps", "first_order"), "it is closed form"
    )
    before: ClassVar[str] = "adapted in closed form"

    def layout(self) -> Tensors:
        like = self.model.parameters["head.bias"]
        return self.model.parameters | {f"variance/{name}": like.new_tensor(x).log() for name, x in VARIANCES.items()}

    def adapted_names(self) -> list[str]:
        return []

    def begin(self, theta: Tensors, support: Examples, context: Context) -> Fast:
        bits, descriptors = support.inputs
        near = self.model.features(theta, bits, descriptors)
        kernel = self._kernel(theta, bits, near, bits, near)
        kernel = kernel + theta["variance/noise"].exp() * torch.eye(len(bits)).to(kernel)
        left = support.targets[0].reshape(len(bits), 1) - self.model(theta, bits, descriptors)
        return Fast({}, {"bits": bits, "near": near, "shares": torch.linalg.solve(kernel, left)})

    def predict(self, theta: Tensors, fast: Fast, inputs: tuple[Tensor, ...]) -> Tensor:
        near = self.model.features(theta, *inputs)
        kernel = self._kernel(theta, inputs[0], near, fast.state["bits"], fast.state["near"])
        return self.model(theta, *inputs) + kernel @ fast.state["shares"]

    def update(self, theta: Tensors, fast: Fast, gradient: Tensors, k: int) -> Fast:
        raise AssertionError("there are no inner steps")

    def _kernel(self, theta: Tensors, bits: Tensor, near: Tensor, others: Tensor, others_near: Tensor) -> Tensor:
        size = {name: theta[f"variance/{name}"].exp() for name in VARIANCES}
        linear = bits @ others.T / SHARED
        return (
            tanimoto(bits, others)
            + size["linear"] * linear
            + size["smooth"] * smooth(near, others_near)
            + size["level"]
        )
