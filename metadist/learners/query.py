"""What is asked of adapted weights: the outputs for a task's query set, all at once or one by one."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from metadist.core.errors import InputError
from metadist.core.task import Task


def predict_query(predict: Callable[[tuple[Tensor, ...]], Tensor], task: Task, transductive: bool) -> Tensor:
    """Outputs [n query, ...] in one batch, or of each example in a batch with the support set."""
    if transductive:
        return _one_tensor(predict(task.query.inputs))

    def alone(*query: Tensor) -> Tensor:
        pairs = zip(task.support.inputs, query, strict=True)
        return _one_tensor(predict(tuple(torch.cat([support, example.unsqueeze(0)]) for support, example in pairs)))[-1]

    return torch.func.vmap(alone)(*task.query.inputs)


def _one_tensor(outputs: object) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise InputError(not_a_tensor(outputs))
    return outputs


def not_a_tensor(outputs: object) -> str:
    """What to do where a model gives something else than one tensor."""
    of = f" of {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else ""
    return (
        f"the model gives a {type(outputs).__name__}{of}, and losses, metrics and predictions need one tensor "
        "[n, outputs]: return the logits or values alone, or name a learner of your own whose `predict` picks them"
    )
