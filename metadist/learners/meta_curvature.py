"""Meta-Curvature: learned matrices that transform the inner gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metadist.learners.learner import Fast, Tensors
from metadist.learners.maml import MAML


@dataclass(frozen=True, kw_only=True)
class MetaCurvature(MAML):
    """phi = theta - inner_lr * MC(G), MC(G) = G x1 M_out x2 M_in x3 M_rest: a matrix for each mode of a weight tensor.

    Park and Oliva 2019, equation 7 (https://arxiv.org/abs/1902.03356). A kernel [out, in, h, w] has three modes, h and
    w together being one; a matrix two, a vector one. All start as the identity, where this is MAML. The paper's MC2.
    """

    def layout(self) -> Tensors:
        matrices = {
            f"curvature/{name}/{mode}": torch.eye(size).to(self.model.parameters[name])
            for name in self.adapted_names()
            for mode, size in enumerate(modes(self.model.parameters[name]))
        }
        return self.model.parameters | matrices

    def update(self, theta: Tensors, fast: Fast, gradient: Tensors, k: int) -> Fast:
        transformed = {}
        for name, g in gradient.items():
            sizes = modes(g)
            along = g.reshape(sizes)
            for mode in range(len(sizes)):
                first = along.movedim(mode, 0)
                mixed = theta[f"curvature/{name}/{mode}"] @ first.reshape(len(first), -1)
                along = mixed.reshape(first.shape).movedim(0, mode)
            transformed[name] = along.reshape(g.shape)
        return super().update(theta, fast, transformed, k)


def modes(tensor: Tensor) -> list[int]:
    """Sizes of out, in and the rest together, as many as the tensor has."""
    return [*tensor.shape[:2], *([tensor[0, 0].numel()] if tensor.ndim > 2 else [])] or [1]
