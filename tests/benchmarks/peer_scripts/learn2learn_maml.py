"""learn2learn: its MAML wrapper, used as in its examples (clone, adapt, backward)."""

import learn2learn as l2l
from harness import arguments, inputs, run


def main() -> None:
    args = arguments()
    network, tasks, loss = inputs(args)
    workload = args.workload
    maml = l2l.algorithms.MAML(network, lr=workload.inner_lr, first_order=workload.first_order)

    def meta_gradient() -> float:
        total = 0.0
        for support_x, support_y, query_x, query_y in tasks:
            learner = maml.clone()
            for _ in range(workload.inner_steps):
                learner.adapt(loss(learner(support_x), support_y))
            outer = loss(learner(query_x), query_y)
            outer.backward()
            total += outer.item()
        for parameter in maml.parameters():
            parameter.grad.mul_(1 / len(tasks))
        return total / len(tasks)

    run(args, network, meta_gradient, "learn2learn")


if __name__ == "__main__":
    main()
