"""learn2learn's own Omniglot pipeline, as in its example maml_omniglot: images decoded and turned as tasks are drawn.

`get_tasksets('omniglot')` is FullOmniglot under its Cython Taskset, with FusedNWaysKShots, LoadData, RemapLabels,
ConsecutiveLabels and RandomClassRotation. The network is the benchmark's; the example's is fully connected.
"""

import random

import learn2learn as l2l
import torch
from harness import arguments, inputs, measure_sampling, report, run
from torchvision.datasets import Omniglot

Omniglot._check_integrity = lambda self: True  # of the zips it would download; peers.py has unpacked those it was given


def main() -> None:
    args = arguments()
    random.seed(0)
    torch.manual_seed(0)
    workload = args.workload
    tasksets = l2l.vision.benchmarks.get_tasksets(
        "omniglot",
        train_ways=workload.ways,
        train_samples=2 * workload.shots,
        test_ways=workload.ways,
        test_samples=2 * workload.shots,
        num_tasks=20000,
        root=args.data,
    )
    if args.sample_only:
        report(args, measure_sampling(args, tasksets.train.sample), "learn2learn", "torchvision")
        return
    network, _, loss = inputs(args)
    maml = l2l.algorithms.MAML(network, lr=workload.inner_lr, first_order=workload.first_order)

    def meta_gradient() -> float:
        total = 0.0
        for _ in range(workload.meta_batch):
            learner, (x, y) = maml.clone(), tasksets.train.sample()
            for _ in range(workload.inner_steps):
                learner.adapt(loss(learner(x[::2]), y[::2]))
            outer = loss(learner(x[1::2]), y[1::2])
            outer.backward()
            total += outer.item()
        for parameter in maml.parameters():
            parameter.grad.mul_(1 / workload.meta_batch)
        return total / workload.meta_batch

    run(args, network, meta_gradient, "learn2learn", "torchvision")


if __name__ == "__main__":
    main()
