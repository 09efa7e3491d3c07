"""metadist as it runs: a fleet of two workers of one thread, a parameter server, chunks of tasks named by the driver.

`--override` takes any of its settings; with `fleet.backend=local` everything is in this process, as it is for peers.
"""

import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
from harness import Memory, arguments, measure, measure_sampling, report
from safetensors.numpy import save_file
from workloads import META_LR, read_weights

from metadist.config import Config, load_config
from metadist.core.messages import plan
from metadist.core.task import TaskId
from metadist.engine.graph_cache import AFTER, CHECKS
from metadist.fleet.local import LocalFleet
from metadist.fleet.ray.cluster import connect, disconnect
from metadist.fleet.ray.fleet import RayFleet, Resources
from metadist.fleet.worker import Worker, set_up_process
from metadist.run.auto import chunk_size
from metadist.run.build import Job
from metadist.run.prepare import prepare

BUILT_IN = {
    "conv4-64-strided": ("conv4", {"channels": 64, "pool": False}),
    "conv4-32-pooled": ("conv4", {"channels": 32, "pool": True}),
    "resnet12": ("resnet12", {"channels": [64, 128, 256, 512]}),
    "mlp-40-40": ("mlp", {"hidden": [40, 40]}),
}


def settings(args: Any, folder: Path) -> Config:
    """The workload in metadist's words; whatever `--override` says comes last."""
    w = args.workload
    name, options = BUILT_IN[w.network]
    tree: dict[str, Any] = {
        "num_workers": 2,
        "meta_steps": 1_000_000,
        "meta_batch_size": w.meta_batch,
        "meta_lr": META_LR,
        "model": {"name": name, **options},
        "learner": {
            "name": "fomaml" if w.first_order else "maml",
            "inner_lr": w.inner_lr,
            "inner_steps": w.inner_steps,
        },
        "fleet": {"threads_per_worker": args.threads},
        "evaluation": {"every": 0},
        "tracking": {"mlflow": False},
    }
    if args.data:
        tree |= {"data": {"path": args.data}, "task": {"ways": w.ways, "shots": w.shots, "queries": w.queries}}
    else:
        tree["data"] = {"source": "npz_source:Tasks", "options": {"path": args.tasks, "outputs": w.ways}}
        tree["model"]["weights"] = str(folder / "theta.safetensors")
        save_file(read_weights(args.tasks), tree["model"]["weights"])
    (folder / "job.yaml").write_text(json.dumps(tree))
    return load_config([folder / "job.yaml"], [*w.metadist, *args.override])


def measured(make_worker: Callable[[], Worker], folder: str) -> Worker:
    """Build a worker and note its process's memory before it computes anything."""
    worker = make_worker()
    from harness import Memory  # again: this function travels to the worker by value, without its module

    (Path(folder) / f"{os.getpid()}.pid").write_text(str(Memory().baseline_mb))
    return worker


class WorkersMemory:
    """The memory of all processes that hold a worker, together."""

    def __init__(self, folder: Path):
        self._folder = folder

    def rise_mb(self) -> float:
        found = self._folder.glob("*.pid")
        return sum(Memory(int(file.stem), float(file.read_text())).rise_mb() for file in found)


def open_fleet(config: Config, folder: Path) -> tuple[Any, Any, int]:
    """The fleet, the server, and the chunk size; what `metadist train` builds, in the same order."""
    make = partial(measured, Job(config).worker_factory({}), str(folder))
    own = config.fleet
    if own.backend == "local":  # no task is tried beforehand: the memory it takes must not be in the baseline
        fleet: Any = LocalFleet(make, 1)
        engine = Job(config, Job(config).shapes).engine("cpu")
        theta = engine.initial_theta().numpy()
    else:
        prepared = prepare(Job(config), [])
        engine, theta = prepared.engine, prepared.theta
        connect(own.address, config.num_workers * own.cpus_per_worker, print)
        resources = Resources(own.cpus_per_worker, own.gpus_per_worker, own.threads_per_worker, own.resources)
        fleet = RayFleet(make, config.num_workers, resources=resources)
    return fleet, fleet.start_server(theta, Job(config).optimization(engine), None), chunk_size(config, engine)


def main() -> None:
    args = arguments("--override")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = settings(args, folder)
        set_up_process(config.fleet.threads_per_worker)
        if args.sample_only:
            source, numbers = Job(config).source, iter(range(10**9))
            figures = measure_sampling(args, lambda: source(TaskId("train", 0, next(numbers))))
        else:
            figures = compute(args, config, folder)
        report(args, figures, "metadist", "ray")


def compute(args: Any, config: Config, folder: Path) -> dict[str, Any]:
    """Meta-steps as the trainer makes them: chunks dealt to workers, gradients applied by the server."""
    fleet, server, size = open_fleet(config, folder)
    batch = config.batch_size(config.num_workers)
    state = {"weights": server.weights(), "step": 0}

    def step() -> tuple[float, float | None]:
        chunks, following = (plan("train", state["step"] + later, batch, size) for later in (0, 1))
        gradients = fleet.meta_gradients(state["weights"], chunks)
        then = partial(fleet.begin_next, following)
        state["weights"], stats = server.apply(state["step"], *gradients, num_tasks=batch, then=then)
        state["step"] += 1
        return stats.loss, stats.gradient_norm

    def complete() -> bool:
        workers = 1 if config.fleet.backend == "local" else config.num_workers
        recorded = state["step"] * len(plan("train", 0, batch, size)) > 2 * (AFTER + CHECKS) * workers
        return recorded and (config.fleet.backend == "local" or fleet.num_workers == workers)

    try:
        figures = measure(args, step, step, WorkersMemory(folder), complete)
        workers = 1 if config.fleet.backend == "local" else fleet.num_workers
        return {**figures, "processes": workers, "settings": args.override}
    finally:
        if ray.is_initialized():
            fleet.close()
            disconnect()


if __name__ == "__main__":
    main()
