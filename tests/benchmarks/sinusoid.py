"""What the system costs beside the arithmetic: `python tests/benchmarks/sinusoid.py [--steps N]`.

The sinusoid of Finn et al. 2017 (MLP 40-40, K = Q = 10, 25 tasks, one second-order inner step), one thread. By hand: a
loop that draws its curves with numpy, computes all tasks as one batch of matrix products and steps torch's Adam. Then
metadist's worker and server on the local fleet, drawing the same sizes of tasks from a mapped file, and the same
through one Ray worker. The three take turns; milliseconds a meta-step, medians over rounds.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import Tensor

from metadist.config import load_config
from metadist.core.messages import plan
from metadist.fleet.local import LocalFleet
from metadist.fleet.ray.cluster import connect, disconnect
from metadist.fleet.ray.fleet import RayFleet
from metadist.fleet.worker import set_up_process
from metadist.run.auto import chunk_size
from metadist.run.build import Job
from metadist.run.prepare import prepare

TASKS, K, RATE = 25, 10, 0.01
JOB = ["data.family=sinusoid", "model.name=mlp", "model.hidden=[40,40]", f"task.shots={K}", f"task.queries={K}",
       f"learner.inner_lr={RATE}", f"meta_batch_size={TASKS}", "num_workers=1", "meta_steps=1000000"]  # fmt: skip


class ByHand:
    """The whole of it in one class."""

    def __init__(self) -> None:
        layers = [torch.nn.Linear(a, b) for a, b in ((1, 40), (40, 40), (40, 1))]
        self.theta = [p.detach().requires_grad_() for layer in layers for p in layer.parameters()]
        self.adam = torch.optim.Adam(self.theta, lr=1e-3, foreach=False)
        self.rng = np.random.default_rng(0)

    def step(self) -> float:
        amplitude, phase = self.rng.uniform(0.1, 5, (TASKS, 1, 1)), self.rng.uniform(0, np.pi, (TASKS, 1, 1))
        inputs = self.rng.uniform(-5, 5, (TASKS, 2 * K, 1))
        x = torch.from_numpy(inputs.astype(np.float32))
        y = torch.from_numpy((amplitude * np.sin(inputs + phase)).astype(np.float32))
        weights = [w.unsqueeze(0).expand(TASKS, *w.shape) for w in self.theta]
        inner = (predict(weights, x[:, :K]) - y[:, :K]).square().mean((1, 2)).sum()
        gradients = torch.autograd.grad(inner, weights, create_graph=True)
        fast = [w - RATE * g for w, g in zip(weights, gradients, strict=True)]
        outer = (predict(fast, x[:, K:]) - y[:, K:]).square().mean()
        self.adam.zero_grad()
        outer.backward()
        self.adam.step()
        return outer.item()


def predict(weights: list[Tensor], x: Tensor) -> Tensor:
    """weights [T, out, in] and [T, out] in turn, x [T, n, 1] -> [T, n, 1]."""
    for place in range(0, len(weights), 2):
        x = torch.baddbmm(weights[place + 1].unsqueeze(1), x, weights[place].transpose(1, 2))
        x = x.relu() if place < len(weights) - 2 else x
    return x


def through(make_fleet: Callable[..., LocalFleet | RayFleet]) -> Callable[[], None]:
    """A meta-step as the training loop does it."""
    config = load_config([], JOB)
    prepared = prepare(Job(config), ["train"])
    fleet = make_fleet(Job(config).worker_factory({}), 1)
    server = fleet.start_server(prepared.theta, Job(config).optimization(prepared.engine), None)
    size, state = chunk_size(config, prepared.engine), [server.weights(), 0]

    def step() -> None:
        weights, number = state
        gradients = fleet.meta_gradients(weights, plan("train", number, TASKS, size))
        weights, _ = server.apply(number, *gradients, num_tasks=TASKS)
        state[:] = weights, number + 1

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="a round")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    set_up_process(1)
    connect(None, 2, print)
    contenders = {"by hand": ByHand().step, "local fleet": through(LocalFleet), "Ray": through(RayFleet)}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(args.rounds + 1):
        for name, step in contenders.items():
            began = time.perf_counter()
            for _ in range(args.steps):
                step()
            if turn:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - began) / args.steps)
    disconnect()
    hand, local, through_ray = (median(times[name]) for name in contenders)
    print(f"torch {torch.__version__}, one thread, {args.rounds} rounds of {args.steps} meta-steps, ms a meta-step")
    for name, found in times.items():
        print(f"{name:12} median {median(found):.2f}, min {min(found):.2f}, max {max(found):.2f}")
    ratios = [a / b for a, b in zip(times["local fleet"], times["by hand"], strict=True)]
    print(
        f"local fleet / by hand: {median(ratios):.2f} (round by round); Ray - local fleet: {through_ray - local:.2f} ms"
    )


if __name__ == "__main__":
    main()
