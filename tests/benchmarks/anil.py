"""What computing the trunk once saves where only the head adapts: `python tests/benchmarks/anil.py`.

Pooled Conv4-64 on 28x28 images, 5-way, 5 inner steps, second order, one core: MAML and ANIL compute the same tasks in
turn. Milliseconds a task, medians over rounds.
"""

from statistics import median
from time import perf_counter

import numpy as np
import torch

from metadist.core.task import Task
from metadist.engine import Engine, Method
from metadist.fleet.worker import set_up_process
from metadist.learners import MAML
from metadist.models import Conv4, Model
from metadist.models.losses import cross_entropy

ROUNDS, WARM_UP = 6, 5


def task(seed: int, shots: int, queries: int) -> Task:
    draws, labels = np.random.default_rng(seed), np.arange(5)
    images = [draws.normal(size=(5 * count, 1, 28, 28)).astype(np.float32) for count in (shots, queries)]
    return Task.of(images[0], labels.repeat(shots), images[1], labels.repeat(queries))


def engine(adapted: str) -> Engine:
    torch.manual_seed(0)
    model = Model(Conv4([[1, 28, 28]], 5, pool=True))
    learner = MAML(model=model, loss=cross_entropy, inner_lr=0.01, inner_steps=5, adapted=adapted)
    return Engine(learner, Method("loop"))


def main() -> None:
    set_up_process(1)
    print(f"torch {torch.__version__}, one thread, {ROUNDS} rounds of 4 tasks")
    for shots, queries in ((1, 15), (5, 5)):
        tasks = [task(seed, shots, queries) for seed in range(4)]
        engines = {"MAML": engine("*"), "ANIL": engine("head.*")}
        times: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(WARM_UP + ROUNDS):
            for name, each in engines.items():
                began = perf_counter()
                each.meta_gradients(each.initial_theta(), tasks)
                if turn >= WARM_UP:
                    times[name].append(1e3 * (perf_counter() - began) / len(tasks))
        maml, anil = (median(times[name]) for name in engines)
        print(f"{shots}-shot, {queries} queries: MAML {maml:.1f}, ANIL {anil:.1f} ms a task, ratio {maml / anil:.2f}")


if __name__ == "__main__":
    main()
