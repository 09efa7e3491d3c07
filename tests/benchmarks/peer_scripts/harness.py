"""What the script of every contender shares: its command line, the clock, the memory and the one line of JSON.

A script says how a meta-gradient is computed; here it is called, Adam steps, and what that took is measured:
`first_step_s` from the start of the process to the end of the first meta-step, imports included; `tasks_per_s` over at
least `--seconds` of whole meta-steps after two more, or as many as it takes, for warming up; `peak_mb`, how far
resident memory rose above its size before the first step, network and data being there already; and `check_loss` and
`check_norm`, the mean query loss and the norm of the mean meta-gradient at the first step.
"""

import argparse
import json
import os
import platform
import re
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from networks import build
from torch import Tensor, nn
from workloads import META_LR, Workload, read_tasks, read_weights

WARM_UP_STEPS = 2
Step = Callable[[], tuple[float, float | None]]


def arguments(*more: str) -> argparse.Namespace:
    """The command line that all scripts have; `more` are further options that may repeat."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", required=True, type=lambda text: Workload.of(json.loads(text)))
    parser.add_argument("--tasks", help="the .npz of tasks and initial weights")
    parser.add_argument("--data", help="Omniglot, in the form this script reads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument(
        "--started", type=float, default=time.time(), help="when the command began, seconds of the epoch"
    )
    parser.add_argument("--sample-only", action="store_true", help="measure tasks sampled, nothing computed")
    for name in more:
        parser.add_argument(name, action="append", default=[])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def inputs(args: argparse.Namespace) -> tuple[nn.Module, list[tuple[Tensor, ...]], Callable[..., Tensor]]:
    """The network with its initial weights, the tasks of the meta-batch, and the loss."""
    workload = args.workload
    network = build(workload.network, workload.input_shape, workload.ways).to(args.device)
    if args.tasks:
        weights = read_weights(args.tasks)
        network.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    loss = F.mse_loss if workload.regression else F.cross_entropy
    tasks = read_tasks(args.tasks) if args.tasks else []
    return network, [tuple(part.to(args.device) for part in task) for task in tasks], loss


def run(args: argparse.Namespace, network: nn.Module, meta_gradient: Callable[[], float], *packages: str) -> None:
    """Measure and print. `meta_gradient` returns the mean loss and leaves the mean meta-gradient in the .grad's."""
    optimizer = torch.optim.Adam(network.parameters(), lr=META_LR)

    def step(first: bool = False) -> tuple[float, float | None]:
        optimizer.zero_grad()
        loss = meta_gradient()
        norm = float(torch.stack([p.grad.norm() for p in network.parameters()]).norm()) if first else None
        optimizer.step()
        return loss, norm

    report(args, measure(args, lambda: step(first=True), step), *packages)


def measure(
    args: argparse.Namespace,
    first: Step,
    step: Step,
    memory: "Memory | None" = None,
    complete: Callable[[], bool] = lambda: True,
) -> dict[str, Any]:
    """Time whole meta-steps. Warming up goes on until the contender is `complete` (all of its processes are there, and
    compute as they will from then on)."""
    memory = memory or Memory()
    loss, norm = first()
    figures: dict[str, Any] = {"check_loss": loss, "check_norm": norm, "first_step_s": time.time() - args.started}
    warm = 0
    while warm < WARM_UP_STEPS or not complete():
        step()
        warm += 1
    began, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - began < args.seconds:
        step()
        steps += 1
    rate = steps * args.workload.meta_batch / (time.perf_counter() - began)
    return figures | {"tasks_per_s": rate, "steps": steps, "peak_mb": memory.rise_mb()}


def measure_sampling(args: argparse.Namespace, sample: Callable[[], Any]) -> dict[str, Any]:
    """Tasks a second that `sample`, called once a task, makes."""
    for _ in range(50):
        sample()
    began, tasks = time.perf_counter(), 0
    while time.perf_counter() - began < args.seconds:
        sample()
        tasks += 1
    return {"tasks_per_s": tasks / (time.perf_counter() - began), "tasks": tasks}


def report(args: argparse.Namespace, figures: dict[str, Any], *packages: str) -> None:
    """Print the one line of JSON that peers.py reads, with the versions it was measured on."""
    versions = {name: version(name) for name in ("torch", "numpy", *packages)} | {"python": platform.python_version()}
    print(json.dumps({**figures, "threads": torch.get_num_threads(), "versions": versions}), flush=True)


class Memory:
    """Peak resident memory of a process from here on, over what it is now (or was when its baseline was taken)."""

    def __init__(self, pid: int | None = None, baseline_mb: float | None = None):
        self._status = Path(f"/proc/{pid or os.getpid()}/status")
        self.baseline_mb = self._read("VmRSS") if baseline_mb is None else baseline_mb
        if baseline_mb is None and self._status.exists():
            self._status.with_name("clear_refs").write_text("5")  # the peak starts anew from the present size

    def rise_mb(self) -> float:
        return self._read("VmHWM") - self.baseline_mb

    def _read(self, field: str) -> float:
        if not self._status.exists():  # not Linux: the peak since the process began
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        found = re.search(rf"{field}:\s+(\d+) kB", self._status.read_text())
        assert found
        return int(found.group(1)) / 1024
