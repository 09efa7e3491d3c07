"""How a run scales with workers: `python tests/benchmarks/scaling.py [--address ADDRESS] [--simulated N] [--quick]`.

Real workers on a small job first: tasks per second and worker, against one worker. Then simulated ones, which sleep, so
that one machine can have many, through the same fleet and servers: efficiency is the ideal step over the measured one,
the ideal being as many chunks in a row as the busiest worker has and nothing else. A cost model is fitted to these, and
predicts 256 to 1,000 workers. Without an address (or RAY_ADDRESS) it starts a Ray on this machine.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import ray
from ray import cloudpickle
from scipy.optimize import nnls

sys.path.insert(0, str(Path(__file__).resolve().parent))
import simulated_worker  # noqa: E402

from metadist.config import load_config  # noqa: E402
from metadist.core.messages import plan  # noqa: E402
from metadist.engine.graph_cache import AFTER  # noqa: E402
from metadist.fleet.ray.cluster import connect, disconnect  # noqa: E402
from metadist.fleet.ray.fleet import RayFleet, Resources  # noqa: E402
from metadist.fleet.server import Optimization, slices  # noqa: E402
from metadist.run.api import train  # noqa: E402

TASKS_PER_CHUNK = 4
JOB = [
    "data.family=digits", "task.ways=3", "task.shots=5", "task.queries=5", "learner.inner_steps=5",
    f"engine.chunk_size={TASKS_PER_CHUNK}", "evaluation.every=0", "evaluation.test_tasks=4", "evaluation.baselines=[]",
    "tracking.mlflow=false", "tracking.log_every=1",
]  # fmt: skip
QUICK = {"simulated": 4, "chunk_s": 0.02, "chunks": 4, "parameters": 70_000, "steps": 1, "servers": 1}
cloudpickle.register_pickle_by_value(simulated_worker)  # workers on other machines have the package, not this folder


class Load(NamedTuple):
    """One meta-step as the cost model sees it: `chunks` of `chunk_s` seconds and `chunk_bytes` each."""

    workers: int
    chunks: int
    chunk_s: float
    chunk_bytes: float
    servers: int = 1

    @property
    def objects(self) -> int:
        """What workers return in a step: of each chunk a report, and a slice of its gradient for each server."""
        return self.chunks * (1 + self.servers)

    @property
    def ideal_s(self) -> float:
        """The step's time if nothing but computing took any: as many chunks in a row as the busiest worker has."""
        return -(-self.chunks // self.workers) * self.chunk_s


class CostModel(NamedTuple):
    """Seconds of a step = step_s + workers * worker_s +
    max(ideal, chunks * ((1 + servers) * object_s + bytes * byte_s / servers)).

    step_s: latency of a step, whatever its size. worker_s: sending a worker its first chunk and collecting its last,
    which nothing overlaps. object_s and byte_s: what each object of a chunk (its report, its gradient's slice for each
    server) and each byte keep driver and servers busy, which overlaps with computing until it takes longer than that.
    """

    step_s: float
    worker_s: float
    object_s: float
    byte_s: float

    def terms(self, load: Load) -> dict[str, float]:
        """Seconds of a step by cause. Computing, or driver and servers: only the longer of the two counts."""
        busy = {
            "driver": load.objects * self.object_s,
            "server": load.chunks * load.chunk_bytes * self.byte_s / load.servers,
        }
        return {"compute": load.ideal_s, **busy, "ends": self.step_s + load.workers * self.worker_s}

    def predict(self, load: Load) -> float:
        """Seconds of a step."""
        terms = self.terms(load)
        return terms["ends"] + max(terms["compute"], terms["driver"] + terms["server"])

    def binds(self, load: Load) -> str:
        """What takes most of the step: compute, driver (objects), server (bytes) or ends."""
        terms = self.terms(load)
        if terms["driver"] + terms["server"] < terms["compute"]:
            terms |= {"driver": 0.0, "server": 0.0}
        return max(terms, key=lambda name: terms[name])


def fit(loads: Sequence[Load], seconds: Sequence[float]) -> CostModel:
    """Least squares of relative errors with coefficients >= 0.

    Which side of the maximum a measurement is on depends on the coefficients, so they are fitted in turn, at most 50
    times; at first a step without computing is taken to be on the driver's side, and no other.
    """
    measured = np.asarray(seconds, float)
    ideal = np.array([load.ideal_s for load in loads])
    ends = np.array([[1.0, load.workers] for load in loads])
    work = np.array([[load.objects, load.chunks * load.chunk_bytes / load.servers] for load in loads])
    scale = np.abs(np.column_stack([ends, work])).max(axis=0)
    busy = ideal == 0
    for _ in range(50):
        matrix = np.column_stack([ends, work * busy[:, None]]) / scale
        rest = measured - np.where(busy, 0, ideal)
        coefficients = nnls(matrix / measured[:, None], rest / measured)[0] / scale
        now = work @ coefficients[2:] > ideal
        if (now == busy).all():
            break
        busy = now
    return CostModel(*coefficients.tolist())


@dataclass(frozen=True)
class Setting:
    """One simulated measurement. `rows`: workers send per-task gradients; else their sum per chunk."""

    workers: int
    chunk_s: float
    parameters: int
    chunks_per_worker: int
    rows: bool = False
    servers: int = 1
    steps: int = 4

    @property
    def load(self) -> Load:
        size = self.parameters * (4 * TASKS_PER_CHUNK if self.rows else 8)
        servers = len(slices(self.parameters, self.servers))
        return Load(self.workers, self.workers * self.chunks_per_worker, self.chunk_s, size, servers)


class Measurement(NamedTuple):
    """step_s: median over the steps after the first; efficiency: the ideal step (`Load.ideal_s`) over it;
    driver_ms: CPU time of the driver's process per chunk; update_s: the part of a step after the last chunk."""

    setting: Setting
    step_s: float
    efficiency: float
    chunks_per_s: float
    tasks_per_s: float
    driver_ms: float
    update_s: float

    def row(self, model: CostModel) -> dict[str, Any]:
        """Plain values, and what the model says of the same step."""
        row = asdict(self.setting)
        row["sent"] = "rows" if row.pop("rows") else "sums"
        predicted = model.predict(self.setting.load)
        measured = {name: getattr(self, name) for name in self._fields[1:]}
        return row | measured | {"model_step_s": predicted, "model_error": predicted / self.step_s - 1}


def start_simulated(workers: int) -> tuple[RayFleet, float, float]:
    """A fleet of simulated workers, the seconds until all had joined, and the resident MiB of one."""
    began = time.perf_counter()
    fleet = RayFleet(simulated_worker.SimulatedWorker, workers, workers, Resources(cpus=0, threads=None), say=say)
    server = start_server(fleet, Setting(workers, 0.0, 1, 1))
    fleet.meta_gradients(server.weights(), plan("train", 0, workers, 1))
    seconds = time.perf_counter() - began
    return fleet, seconds, mean(resident_mib(pid) for pid in fleet.pids.values())


def start_server(fleet: RayFleet, setting: Setting) -> Any:
    """A parameter server whose theta has workers do as the setting says, and which leaves theta as it is."""
    fleet.servers = setting.servers
    theta = simulated_worker.instructions(setting.parameters, setting.chunk_s, setting.rows)
    return fleet.start_server(theta, Optimization("sgd", meta_lr=0.0), None)


def measure(fleet: RayFleet, setting: Setting) -> Measurement:
    """Time the setting's steps on a fleet of simulated workers, which has at least as many."""
    fleet.resize(setting.workers)
    server = start_server(fleet, setting)
    weights, chunks, steps, updates = server.weights(), setting.load.chunks, [], []
    cpu = time.process_time()
    for step in range(1 + setting.steps):
        began = time.perf_counter()
        batch = plan("train", step, chunks * TASKS_PER_CHUNK, TASKS_PER_CHUNK)
        gradients = fleet.meta_gradients(weights, batch)
        computed = time.perf_counter()
        weights, _ = server.apply(step, *gradients, num_tasks=chunks * TASKS_PER_CHUNK)
        steps.append(time.perf_counter() - began)
        updates.append(time.perf_counter() - computed)
    driver_ms = 1e3 * (time.process_time() - cpu) / (chunks * len(steps))
    step_s = median(steps[1:])
    efficiency, rate = setting.load.ideal_s / step_s, chunks / step_s
    return Measurement(setting, step_s, efficiency, rate, rate * TASKS_PER_CHUNK, driver_ms, median(updates[1:]))


def settings(largest: Setting, most_servers: int) -> list[Setting]:
    """What to measure: the setting on 1, 8, 32, 64, ... of its workers; where driver and servers saturate, with 8
    workers that take no time, by what they send and by the number of servers; and both with a small theta."""
    counts = sorted({count for count in (1, 8, 32, 64, 128) if count < largest.workers} | {largest.workers})
    scaled = [replace(largest, workers=count) for count in counts]
    idle = replace(largest, workers=min(8, largest.workers), chunk_s=0.0)
    sent = [replace(idle, rows=rows, servers=count) for rows in (True, False) for count in sorted({1, most_servers})]
    small = [replace(each, parameters=largest.parameters // 16) for each in (largest, idle)]
    return sorted([*scaled, *sent, *small], key=lambda setting: -setting.workers)


def predictions(
    model: CostModel, setting: Setting, driver_s: float, counts: Sequence[int] = (256, 512, 1000)
) -> list[dict[str, Any]]:
    """Efficiency of the setting with more workers than were measured, and what takes most of the step; `driver_alone`:
    if nothing but the driver's CPU time per chunk, `driver_s`, limited it."""
    rows = []
    for servers in (1, 4):
        for count in counts:
            load = replace(setting, workers=count, servers=servers).load
            step_s = model.predict(load)
            alone = load.ideal_s / max(load.ideal_s, load.chunks * driver_s)
            row = {"workers": count, "servers": servers, "step_s": step_s, "efficiency": load.ideal_s / step_s}
            rows.append(row | {"binds": model.binds(load), "driver_alone": alone})
    return rows


def real_scaling(job: Sequence[str], counts: Sequence[int], steps: int) -> dict[str, list[dict[str, Any]]]:
    """A small job on real workers. strong: the same 32 tasks a step; weak: 32 tasks a step for each worker."""
    points: dict[str, list[dict[str, Any]]] = {"strong": [], "weak": []}
    for count in counts:
        rates = {tasks: tasks_per_s(job, count, tasks, steps) for tasks in sorted({32, 32 * count})}
        for name, tasks in (("strong", 32), ("weak", 32 * count)):
            rate = rates[tasks]
            alone = points[name][0]["tasks_per_s"] / counts[0] if points[name] else rate / count
            point = {"workers": count, "tasks_per_step": tasks, "step_s": tasks / rate, "tasks_per_s": rate}
            points[name].append(point | {"efficiency": rate / count / alone})
    return points


def tasks_per_s(job: Sequence[str], workers: int, tasks: int, steps: int) -> float:
    """The median over the steps of a run, after those in which workers still record what they will play back."""
    warm_up = math.ceil(2 * AFTER * workers * TASKS_PER_CHUNK / tasks)
    with tempfile.TemporaryDirectory() as run_dir:
        counts = [f"num_workers={workers}", f"meta_batch_size={tasks}", f"meta_steps={warm_up + steps}"]
        train(load_config([], [*job, *counts, f"run_dir={run_dir}"]), quiet=True)
        rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return median([row["workers/tasks_per_s"] for row in rows if "workers/tasks_per_s" in row][warm_up:])


def report(job: Sequence[str], counts: Sequence[int], largest: Setting, most_servers: int) -> dict[str, Any]:
    """All of it as plain values: `counts` of real workers, simulated ones, the cost model and its predictions."""
    say(f"training a small job on {', '.join(map(str, counts))} real workers")
    real = real_scaling(job, counts, largest.steps)
    say(f"starting {largest.workers} simulated workers")
    fleet, start_s, mib = start_simulated(largest.workers)
    try:
        found = []
        for setting in settings(largest, most_servers):
            say(f"measuring {setting.load.chunks} chunks of {setting.chunk_s:g} s on {setting.workers} workers")
            found.append(measure(fleet, setting))
    finally:
        fleet.close()
    model = fit([one.setting.load for one in found], [one.step_s for one in found])
    rows = [one.row(model) for one in sorted(found, key=lambda one: one.setting.workers)]
    return {
        "real": real,
        "fleet": {"workers": largest.workers, "start_s": start_s, "resident_mib": mib},
        "ideal": "ceil(chunks / workers) * chunk_s",
        "measured": [row for row in rows if row["chunk_s"]],
        "saturation": [row for row in rows if not row["chunk_s"]],
        "model": model._asdict(),
        "predicted": predictions(model, largest, found[0].driver_ms / 1e3),
    }


def resident_mib(pid: int) -> float:
    """Memory of a process, pages it shares with others counted in full; NaN where it runs elsewhere."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def present(measured: dict[str, Any]) -> str:
    """The report as tables."""
    fleet, lines = measured["fleet"], []
    for name, points in measured["real"].items():
        lines += [f"real workers, {name} scaling", table(points), ""]
    return "\n".join([
        *lines,
        f"{fleet['workers']} simulated workers, which joined in {fleet['start_s']:.0f} s and have "
        f"{fleet['resident_mib']:.0f} MiB each: what was measured, and the cost model fitted to it",
        table(measured["measured"]),
        "",
        "saturation: workers that take no time",
        table(measured["saturation"]),
        "",
        "cost model: step = {step_s:.4f} s + workers * {worker_s:.5f} s + max(ideal, "
        "chunks * ((1 + servers) * {object_s:.3g} s + bytes * {byte_s:.3g} s / servers))".format(**measured["model"]),
        "",
        "prediction, with these coefficients: simulated workers share this machine's cores with driver and servers;",
        "driver_alone: the efficiency if only the driver's CPU time per chunk limited it, all else having other cores",
        table(measured["predicted"]),
    ])  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of equal keys as aligned columns, the keys above."""
    texts = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    cells = [list(rows[0]), *texts]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def say(text: str) -> None:
    print(text, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--address", help="of a Ray cluster to measure (default: RAY_ADDRESS, else one started on this machine)")
    add("--simulated", type=int, default=128, help="simulated workers (128)")
    add("--chunk-s", type=float, default=0.25, help="seconds a simulated chunk takes (0.25)")
    add("--chunks", type=int, default=16, help="simulated chunks per worker and meta-step (16)")
    add("--parameters", type=int, default=112_645, help="size of theta (112645, a Conv4's)")
    add("--steps", type=int, default=4, help="meta-steps timed for each figure (4)")
    add("--servers", type=int, default=2, help="servers that theta is cut over, compared with one (2)")
    add("--quick", action="store_true", help="a small version of everything, to see that it works")
    add("--json", action="store_true", help="print the measurements as JSON")
    options = parser.parse_args()
    vars(options).update(QUICK if options.quick else {})
    with redirect_stdout(sys.stderr):  # where Ray writes what it thinks of so many workers
        cores = os.cpu_count() or 1
        started = connect(options.address, cores, say)
        cores = int(ray.cluster_resources().get("CPU", 1))
        counts = [1] if options.quick else sorted({n for n in (1, 2, 4, 8, 16, 32) if n < cores} | {cores})
        job = [*JOB, "model.name=mlp"] if options.quick else JOB
        largest = Setting(options.simulated, options.chunk_s, options.parameters, options.chunks, steps=options.steps)
        try:
            measured = report(job, counts, largest, options.servers)
        finally:
            if started:
                disconnect()
    print(json.dumps(measured, indent=2) if options.json else present(measured))


if __name__ == "__main__":
    main()
