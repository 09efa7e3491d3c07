"""higher: innerloop_ctx as in its few-shot example; FOMAML by its `track_higher_grads=False`."""

import higher
import torch
from harness import arguments, inputs, run


def main() -> None:
    args = arguments()
    network, tasks, loss = inputs(args)
    workload = args.workload
    inner = torch.optim.SGD(network.parameters(), lr=workload.inner_lr)

    def meta_gradient() -> float:
        total = 0.0
        for support_x, support_y, query_x, query_y in tasks:
            options = {"copy_initial_weights": False, "track_higher_grads": not workload.first_order}
            with higher.innerloop_ctx(network, inner, **options) as (fast, optimizer):
                for _ in range(workload.inner_steps):
                    optimizer.step(loss(fast(support_x), support_y))
                outer = loss(fast(query_x), query_y)
                if workload.first_order:
                    add(network, torch.autograd.grad(outer, list(fast.parameters())))
                else:
                    outer.backward()
            total += outer.item()
        for parameter in network.parameters():
            parameter.grad.mul_(1 / len(tasks))
        return total / len(tasks)

    run(args, network, meta_gradient, "higher")


def add(network: torch.nn.Module, gradient: tuple[torch.Tensor, ...]) -> None:
    """Gradients at the adapted weights, which are cut off from the initial ones, count as gradients of the latter."""
    for parameter, g in zip(network.parameters(), gradient, strict=True):
        parameter.grad = g if parameter.grad is None else parameter.grad.add_(g)


if __name__ == "__main__":
    main()
