"""Reptile: towards the adapted weights, without differentiating the inner loop."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from metadist.core.random import Draws
from metadist.core.task import Examples, Task
from metadist.learners.learner import Context, Differentiation, Fast, Tensors
from metadist.learners.maml import MAML


@dataclass(frozen=True, kw_only=True)
class Reptile(MAML):
    """meta-gradient = theta - phi, with phi = theta after `inner_steps` minibatch steps on the support set.

    Nichol, Achiam, Schulman 2018, section 2 (https://arxiv.org/abs/1803.02999): theta moves by meta_lr times the mean
    of phi - theta, which is the server's SGD with that meta-gradient; the batched version is a meta-batch of several
    tasks, the serial one a meta-batch of one. Minibatches of `inner_batch` examples (0: the whole support set) run
    through random permutations of the support set, drawn from the task's key. The published code's inner optimizer is
    Adam with beta1 = 0, beta2 = 0.999 (`inner_optimizer: {name: adam, beta1: 0}`); unlike there, the second moment
    starts from zero in every task, because a task is a function of its name alone. The query set only measures.
    """

    inner_batch: int = 0
    first_order: bool = True

    refused: ClassVar[Mapping[str, str]] = {
        "first_order": "it has no second-order form", "adapted": "it adapts all parameters"
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner_batch < 0:
            raise ValueError(f"inner_batch={self.inner_batch} must be 0 (the whole support set) or more")
        if not self.first_order:
            raise ValueError("Reptile has no second-order form: leave learner.first_order at true")

    def draw(self, draws: Draws, support_size: int) -> dict[str, np.ndarray]:
        """minibatches: int64 [inner_steps, inner_batch] row numbers; those of one permutation are disjoint."""
        if not self.inner_batch:
            return {}
        wanted = self.inner_steps * self.inner_batch
        order: list[int] = []
        while len(order) < wanted:
            order += draws.choose(support_size, support_size)
        return {"minibatches": np.array(order[:wanted]).reshape(self.inner_steps, self.inner_batch)}

    def begin(self, theta: Tensors, support: Examples, context: Context) -> Fast:
        del support
        drawn = {"minibatches": context.draws["minibatches"]} if self.inner_batch else {}
        return self.start({name: theta[name] for name in self.model.parameters}, **drawn)

    def inner_loss(self, theta: Tensors, fast: Fast, support: Examples, k: int) -> Tensor:
        if self.inner_batch:
            rows = fast.state["minibatches"][k]
            support = Examples(tuple(x[rows] for x in support.inputs), tuple(y[rows] for y in support.targets))
        return self.loss(self.predict(theta, fast, support.inputs), *support.targets)

    def meta_gradient(
        self, ops: Differentiation, theta: Tensors, task: Task, context: Context
    ) -> tuple[Tensor, Tensors]:
        fast = ops.adapt(self, theta, task.support, context)
        gradient = {name: theta[name] - phi for name, phi in fast.weights.items()}
        return self.outer_loss(theta, fast, task.query, context), gradient
