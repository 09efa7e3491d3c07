"""Task-adaptive MAML: an encoder of the support set sets each tensor's inner rate."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metadist.core.task import Examples
from metadist.learners.heads import features, head_of, target_columns
from metadist.learners.learner import Context, Fast, Tensors
from metadist.learners.maml import MAML


@dataclass(frozen=True, kw_only=True)
class TaskAdaptiveMAML(MAML):
    """phi_{k+1} = phi_k - inner_lr * 2 sigmoid(gate) * grad L_support(phi_k), one gate for each adapted tensor.

    The gates are an encoder's view of the task: mean over the support set of relu(A [f(x), y] + a), then a linear map;
    f are the model's features, y the target (one-hot for classes). Encoder and initialisation are learned together. Of
    the methods called task-adaptive, this is the task-dependent learning rate (gamma) of Lee et al. 2020, section 3.2
    (https://arxiv.org/abs/1905.12917), without its sampling; its encoder starts with gates of 0, where this is MAML.
    """

    encoder_width: int = 32
    encoder_seed: int = 0

    needs_ways: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_width < 1:
            raise ValueError(f"encoder_width={self.encoder_width} must be 1 or more")

    def layout(self) -> Tensors:
        head, generator = head_of(self.model), torch.Generator().manual_seed(self.encoder_seed)
        width, inputs = self.encoder_width, head.in_features + head.out_features
        number = len(self.adapted_names())
        like = next(iter(self.model.parameters.values()))
        first = (torch.rand(width, inputs, generator=generator, dtype=torch.float64) * 2 - 1) / inputs**0.5
        encoder = {
            "encoder/first.weight": first,
            "encoder/first.bias": torch.zeros(width),
            "encoder/gates.weight": torch.zeros(number, width),
            "encoder/gates.bias": torch.zeros(number),
        }
        return self.model.parameters | {name: value.to(like) for name, value in encoder.items()}

    def begin(self, theta: Tensors, support: Examples, context: Context) -> Fast:
        rows = features(self.model, theta, support.inputs)
        ways = head_of(self.model).out_features if context.ways else 0
        targets = target_columns(support, ways, rows)
        examples = torch.cat([rows, targets], dim=1) @ theta["encoder/first.weight"].T + theta["encoder/first.bias"]
        embedding = examples.relu().mean(dim=0)
        gates = theta["encoder/gates.weight"] @ embedding + theta["encoder/gates.bias"]
        fast = super().begin(theta, support, context)
        return fast._replace(state=fast.state | {"gates": 2 * gates.sigmoid()})

    def rate(self, theta: Tensors, fast: Fast, name: str, k: int) -> Tensor | float:
        del theta, k
        return self.inner_lr * fast.state["gates"][self.adapted_names().index(name)]
