"""The torch.func recipe, after pytorch's functorch/examples/maml_omniglot: vmap over tasks, grad inside, backward."""

import torch
from harness import arguments, inputs, run
from torch.func import functional_call, grad, vmap


def main() -> None:
    args = arguments()
    network, tasks, loss = inputs(args)
    workload, theta = args.workload, dict(network.named_parameters())
    batch = [torch.stack(parts) for parts in zip(*tasks, strict=True)]

    def loss_at(weights, x, y):
        return loss(functional_call(network, weights, (x,)), y)

    def task_loss(support_x, support_y, query_x, query_y):
        fast = theta
        for _ in range(workload.inner_steps):
            step = grad(loss_at)(fast, support_x, support_y)
            if workload.first_order:
                step = {name: g.detach() for name, g in step.items()}
            fast = {name: w - workload.inner_lr * step[name] for name, w in fast.items()}
        return loss_at(fast, query_x, query_y)

    def meta_gradient() -> float:
        outer = vmap(task_loss)(*batch).mean()
        outer.backward()
        return outer.item()

    run(args, network, meta_gradient)


if __name__ == "__main__":
    main()
