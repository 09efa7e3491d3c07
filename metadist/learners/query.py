"""What is asked of adapted weights: the outputs for a task's query set, all at once or one by one."""

from collections.abc import Callable

import torch
from torch import Tensor

from metadist.task import Task


def predict_query(predict: Callable[[tuple[Tensor, ...]], Tensor], task: Task, transductive: bool) -> Tensor:
    """Outputs [n query, ...] in one batch, or of each example in a batch with the support set."""
    if transductive:
        return predict(task.query.inputs)

    def alone(*query: Tensor) -> Tensor:
        pairs = zip(task.support.inputs, query, strict=True)
        return predict(tuple(torch.cat([support, example.unsqueeze(0)]) for support, example in pairs))[-1]

    return torch.func.vmap(alone)(*task.query.inputs)
