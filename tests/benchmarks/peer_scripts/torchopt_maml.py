"""TorchOpt: MetaSGD as in its few-shot example, but backward task by task, which needs less memory than the example.

MetaSGD always differentiates through the inner step; first order is its functional sgd on detached gradients.
"""

import torch
import torchopt
from harness import arguments, inputs, run
from torch.func import functional_call


def main() -> None:
    args = arguments()
    network, tasks, loss = inputs(args)
    second = second_order(network, loss, args.workload)
    first = first_order(network, loss, args.workload)
    adapted_loss = first if args.workload.first_order else second

    def meta_gradient() -> float:
        total = 0.0
        for task in tasks:
            total += adapted_loss(*task)
        for parameter in network.parameters():
            parameter.grad.mul_(1 / len(tasks))
        return total / len(tasks)

    run(args, network, meta_gradient, "torchopt")


def second_order(network, loss, workload):
    inner = torchopt.MetaSGD(network, lr=workload.inner_lr)

    def adapted_loss(support_x, support_y, query_x, query_y) -> float:
        kept = torchopt.extract_state_dict(network, by="reference", detach_buffers=True)
        kept_inner = torchopt.extract_state_dict(inner, by="reference")
        for _ in range(workload.inner_steps):
            inner.step(loss(network(support_x), support_y))
        outer = loss(network(query_x), query_y)
        torchopt.recover_state_dict(network, kept)
        torchopt.recover_state_dict(inner, kept_inner)
        outer.backward()
        return outer.item()

    return adapted_loss


def first_order(network, loss, workload):
    inner = torchopt.sgd(lr=workload.inner_lr)

    def adapted_loss(support_x, support_y, query_x, query_y) -> float:
        fast = dict(network.named_parameters())
        state = inner.init(fast)
        for _ in range(workload.inner_steps):
            value = loss(functional_call(network, fast, (support_x,)), support_y)
            gradient = dict(zip(fast, torch.autograd.grad(value, list(fast.values())), strict=True))
            updates, state = inner.update(gradient, state, inplace=False)
            fast = torchopt.apply_updates(fast, updates, inplace=False)
        outer = loss(functional_call(network, fast, (query_x,)), query_y)
        outer.backward()
        return outer.item()

    return adapted_loss


if __name__ == "__main__":
    main()
