"""The hand-written loop over the processes of torchrun: each adapts its share of the tasks, gloo adds the gradients up.

A step has one message: gradient and loss of a process's share as one flat tensor. Every process makes the same Adam
step. Process 0 measures; the others compute until it says that there is no further step.
"""

import torch
import torch.distributed as dist
from harness import Memory, arguments, inputs, measure, report
from loop_maml import summed_gradient
from torch.distributed.elastic.multiprocessing.errors import record
from workloads import META_LR


@record
def main() -> None:
    args = arguments()
    dist.init_process_group("gloo")
    step = Step(args)
    if dist.get_rank() == 0:
        figures = measure(args, lambda: step(first=True), step, step)
        report(args, {**figures, "processes": dist.get_world_size()})
    else:
        while step():
            pass
        step.add_memory()
    dist.destroy_process_group()


class Step:
    """A meta-step of all processes, and their memory together."""

    def __init__(self, args):
        self.workload = args.workload
        self.network, tasks, self.loss = inputs(args)
        self.num_tasks, self.tasks = len(tasks), tasks[dist.get_rank() :: dist.get_world_size()]
        self.theta = dict(self.network.named_parameters())
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=META_LR)
        self.memory = Memory()

    def __call__(self, first: bool = False) -> tuple[float, float | None] | None:
        """The mean loss, and the gradient's norm at the first step; None where process 0 has ended the run."""
        total, summed = summed_gradient(self.network, self.loss, self.workload, self.theta, self.tasks)
        going_on = torch.tensor([total, float(dist.get_rank() == 0)])
        flat = torch.cat([*(gradient.flatten() for gradient in summed.values()), going_on])
        dist.all_reduce(flat)
        if not flat[-1]:
            return None
        flat /= self.num_tasks
        for parameter, part in zip(self.theta.values(), self.parts(flat), strict=True):
            parameter.grad = part.view_as(parameter)
        norm = float(flat[:-2].norm()) if first else None
        self.optimizer.step()
        return float(flat[-2]), norm

    def parts(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return flat[:-2].split([parameter.numel() for parameter in self.theta.values()])

    def rise_mb(self) -> float:
        """Process 0 ends the run: in the place of a gradient it sends zeros."""
        dist.all_reduce(torch.zeros(2 + sum(parameter.numel() for parameter in self.theta.values())))
        return self.add_memory()

    def add_memory(self) -> float:
        rises = torch.tensor(self.memory.rise_mb())
        dist.all_reduce(rises)
        return float(rises)


if __name__ == "__main__":
    main()
