"""MAML as one writes it by hand: a loop over tasks with functional_call and torch.autograd."""

from collections.abc import Callable, Sequence

import torch
from harness import arguments, inputs, run
from torch import Tensor, nn
from torch.func import functional_call
from workloads import Workload

Tensors = dict[str, Tensor]


def summed_gradient(
    network: nn.Module, loss: Callable[..., Tensor], workload: Workload, theta: Tensors, tasks: Sequence
) -> tuple[float, Tensors]:
    """Sum over tasks of the query loss after adaptation, and of its gradient with respect to theta."""
    total, summed = 0.0, {name: torch.zeros_like(value) for name, value in theta.items()}
    for support_x, support_y, query_x, query_y in tasks:
        leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
        fast = leaves
        for _ in range(workload.inner_steps):
            inner = loss(functional_call(network, fast, (support_x,)), support_y)
            step = torch.autograd.grad(inner, list(fast.values()), create_graph=not workload.first_order)
            fast = {name: w - workload.inner_lr * g for (name, w), g in zip(fast.items(), step, strict=True)}
        outer = loss(functional_call(network, fast, (query_x,)), query_y)
        for name, gradient in zip(leaves, torch.autograd.grad(outer, list(leaves.values())), strict=True):
            summed[name] += gradient
        total += outer.item()
    return total, summed


def main() -> None:
    args = arguments()
    network, tasks, loss = inputs(args)
    theta = dict(network.named_parameters())

    def meta_gradient() -> float:
        total, summed = summed_gradient(network, loss, args.workload, theta, tasks)
        for name, parameter in theta.items():
            parameter.grad = summed[name] / len(tasks)
        return total / len(tasks)

    run(args, network, meta_gradient)


if __name__ == "__main__":
    main()
