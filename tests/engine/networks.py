"""Small networks of every kind, each with tasks for it. Deterministic: built twice, they are equal."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from metadist.core.task import Examples, Task
from metadist.models import MLP, Bag, Conv4, Model, ResNet12
from tests.learners.small import classification_task


class Tied(nn.Module):
    """One layer in two places, the second transposed: [n, 4] -> [n, 4]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 5)
        self.again = nn.Linear(4, 5)
        self.again.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.embed(torch.tanh(self.embed(x) + self.again(x))[:, :4])) @ self.embed.weight


class Frozen(nn.Module):
    """A frozen layer and a buffer before trained ones."""

    def __init__(self):
        super().__init__()
        self.fixed = nn.Linear(4, 5).requires_grad_(False)
        self.register_buffer("scale", torch.tensor([2.0]))
        self.body = nn.Linear(5, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.fixed(x) * self.scale)))


def text_task(seed: int) -> Task:
    draws = np.random.default_rng(seed)
    parts = [(draws.integers(0, 9, (6, 5)), draws.random((6, 5)) < 0.7) for _ in range(2)]
    return Task(*(Examples(inputs, (np.arange(6) % 3,)) for inputs in parts))


def rows_of(*shape: int) -> Callable[[int], Task]:
    return lambda seed: classification_task(seed, shape=shape)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Task]]] = {
    "mlp": (lambda: MLP([[4]], 3, hidden=(6,)), rows_of(4)),
    "conv4": (lambda: Conv4([[1, 8, 8]], 3, channels=4), rows_of(1, 8, 8)),
    "pooled": (lambda: Conv4([[1, 16, 16]], 3, channels=8, pool=True, norm="group"), rows_of(1, 16, 16)),
    "bag": (lambda: Bag([[5], [5]], 3, vocabulary_size=9, embedding=6, hidden=5), text_task),
    "resnet12": (lambda: ResNet12([[2, 4, 4]], 3, channels=(4, 5)), rows_of(2, 4, 4)),
    "tied": (Tied, rows_of(4)),
    "frozen": (Frozen, rows_of(4)),
}


def model_of(network: str, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model(NETWORKS[network][0]())


def tasks_of(network: str, count: int = 2, first: int = 0) -> list[Task]:
    return [NETWORKS[network][1](seed) for seed in range(first, first + count)]
