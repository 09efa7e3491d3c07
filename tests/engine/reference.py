"""Meta-gradients of MAML without any of metadist's own means: a plain module whose parameters are set in place, its
inner gradients by `torch.autograd.grad` of first order, the outer derivative by central differences in float64."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from metadist.core.task import Task


def meta_gradient(module: nn.Module, loss: Callable, task: Task, inner_lr: float, inner_steps: int) -> Tensor:
    """[P], in the order of the module's parameters, which are changed."""
    module = module.double().train()
    parameters = [each for each in dict.fromkeys(module.parameters()) if each.requires_grad]
    start = [each.detach().clone() for each in parameters]

    def outer() -> float:
        for _ in range(inner_steps):
            value = loss(module(*task.support.inputs), *task.support.targets)
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            with torch.no_grad():
                for each, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        each -= inner_lr * gradient
        with torch.no_grad():
            return float(loss(module(*task.query.inputs), *task.query.targets))

    def at(number: int, place: int, shift: float) -> float:
        with torch.no_grad():
            for each, value in zip(parameters, start, strict=True):
                each.copy_(value)
            each = parameters[number]
            each[torch.unravel_index(torch.tensor(place), each.shape)] += shift
        return outer()

    return torch.tensor(
        [
            (at(number, place, 1e-6) - at(number, place, -1e-6)) / 2e-6
            for number, value in enumerate(start)
            for place in range(value.numel())
        ],
        dtype=torch.float64,
    )
