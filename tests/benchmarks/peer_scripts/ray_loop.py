"""A parameter server as one writes it in an afternoon: Ray actors run the hand-written loop on a slice of the batch.

Weights go out and summed gradients come back as dicts of arrays; the driver averages and steps. Two actors, one thread
each.
"""

import os

import ray
import torch
from harness import Memory, arguments, inputs, measure, report
from loop_maml import summed_gradient
from workloads import META_LR

ACTORS = 2


@ray.remote(num_cpus=1)
class Actor:
    def __init__(self, args, number: int):
        torch.set_num_threads(args.threads)
        self.workload = args.workload
        self.network, tasks, self.loss = inputs(args)
        self.tasks = tasks[number::ACTORS]
        self.memory = Memory()

    def gradient(self, weights):
        theta = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
        total, summed = summed_gradient(self.network, self.loss, self.workload, theta, self.tasks)
        return total, {name: value.numpy() for name, value in summed.items()}

    def rise_mb(self) -> float:
        return self.memory.rise_mb()


class ActorsMemory:
    """The actors' memory together."""

    def __init__(self, actors):
        self.actors = actors

    def rise_mb(self) -> float:
        return sum(ray.get([actor.rise_mb.remote() for actor in self.actors]))


def main() -> None:
    args = arguments()
    here = os.path.dirname(os.path.abspath(__file__))
    runtime = {"env_vars": {"PYTHONPATH": here, "OMP_NUM_THREADS": str(args.threads)}}
    ray.init("local", num_cpus=ACTORS, include_dashboard=False, log_to_driver=False, runtime_env=runtime)
    network, tasks, _ = inputs(args)
    actors = [Actor.remote(args, number) for number in range(ACTORS)]
    optimizer = torch.optim.Adam(network.parameters(), lr=META_LR)

    def step(first: bool = False) -> tuple[float, float | None]:
        weights = ray.put({name: value.detach().numpy() for name, value in network.named_parameters()})
        results = ray.get([actor.gradient.remote(weights) for actor in actors])
        for name, parameter in network.named_parameters():
            parameter.grad = sum(torch.from_numpy(summed[name].copy()) for _, summed in results) / len(tasks)
        norm = float(torch.stack([p.grad.norm() for p in network.parameters()]).norm()) if first else None
        optimizer.step()
        return sum(total for total, _ in results) / len(tasks), norm

    figures = measure(args, lambda: step(first=True), step, ActorsMemory(actors))
    report(args, {**figures, "processes": ACTORS}, "ray")


if __name__ == "__main__":
    main()
