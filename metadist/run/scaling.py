"""How a run scales with workers: real ones on a small job, simulated ones through the very same fleet and server."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from metadist.config import load_config
from metadist.core.messages import plan
from metadist.engine.graph_cache import AFTER
from metadist.fleet.ray.fleet import RayFleet, Resources
from metadist.fleet.server import Optimization, slices
from metadist.fleet.simulated import SimulatedWorker, instructions
from metadist.run.build import Job
from metadist.run.cost_model import CostModel, Load, fit
from metadist.run.prepare import prepare

Say = Callable[[str], None]
TASKS_PER_CHUNK = 4
JOB = [
    "data.family=digits", "task.ways=3", "task.shots=5", "task.queries=5", "learner.inner_steps=5",
    "engine.chunk_size=4", "fleet.backend=ray", "evaluation.every=0", "evaluation.baselines=[]",
]  # fmt: skip


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

    def row(self) -> dict[str, Any]:
        """Plain values, for a table or JSON."""
        told = asdict(self.setting)
        told["sent"] = "rows" if told.pop("rows") else "sums"
        return told | {name: getattr(self, name) for name in self._fields[1:]}


class Point(NamedTuple):
    """Real workers: speed-up is tasks per second against one worker's, efficiency that per worker."""

    workers: int
    tasks_per_step: int
    step_s: float
    tasks_per_s: float
    efficiency: float


def time_steps(
    fleet: Any, server: Any, tasks: int, size: int, steps: int, warm_up: int = 1
) -> tuple[list[float], list[float]]:
    """Seconds of each meta-step, and of its part after the last chunk; the first `warm_up` are not counted."""
    weights, whole, update = server.weights(), [], []
    for step in range(warm_up + steps):
        began = time.perf_counter()
        gradients = fleet.meta_gradients(weights, plan("train", step, tasks, size))
        computed = time.perf_counter()
        weights, _ = server.apply(step, *gradients, num_tasks=tasks)
        whole.append(time.perf_counter() - began)
        update.append(time.perf_counter() - computed)
    return whole[warm_up:], update[warm_up:]


def start_simulated(workers: int, say: Say) -> tuple[RayFleet, float, float]:
    """A fleet of simulated workers, the seconds until all had joined, and the resident MiB of one."""
    began = time.perf_counter()
    fleet = RayFleet(SimulatedWorker, workers, workers, Resources(cpus=0, threads=None), say=say)
    server = fleet.start_server(instructions(1, 0.0, rows=False), Optimization("sgd", meta_lr=0.0), None)
    fleet.meta_gradients(server.weights(), plan("train", 0, workers, 1))
    seconds = time.perf_counter() - began
    return fleet, seconds, mean(_resident_mib(pid) for pid in fleet.pids.values())


def measure(fleet: RayFleet, setting: Setting) -> Measurement:
    """Time the setting's steps on a fleet of simulated workers, which has at least as many."""
    fleet.resize(setting.workers)
    fleet.servers = setting.servers
    theta = instructions(setting.parameters, setting.chunk_s, setting.rows)
    server = fleet.start_server(theta, Optimization("sgd", meta_lr=0.0), None)
    chunks = setting.load.chunks
    before = time.process_time()
    whole, update = time_steps(fleet, server, chunks * TASKS_PER_CHUNK, TASKS_PER_CHUNK, setting.steps)
    driver_ms = 1e3 * (time.process_time() - before) / (chunks * (setting.steps + 1))
    step_s = median(whole)
    rate = chunks / step_s
    return Measurement(
        setting, step_s, setting.load.ideal_s / step_s, rate, rate * TASKS_PER_CHUNK, driver_ms, median(update)
    )


def settings(asked: Setting, most_servers: int) -> list[Setting]:
    """What to measure: the setting on 1, 8, 32, 64, ... of its workers; where driver and servers saturate, with 8
    workers that take no time, by what they send and by the number of servers; and both with a small theta."""
    counts = sorted({count for count in (1, 8, 32, 64, 128) if count < asked.workers} | {asked.workers})
    scaled = [replace(asked, workers=count) for count in counts]
    idle = replace(asked, workers=min(8, asked.workers), chunk_s=0.0)
    sent = [replace(idle, rows=rows, servers=count) for rows in (True, False) for count in sorted({1, most_servers})]
    small = [replace(each, parameters=asked.parameters // 16) for each in (asked, idle)]
    return [*scaled, *sent, *small]


def predictions(
    model: CostModel, asked: Setting, driver_s: float, counts: Sequence[int] = (256, 512, 1000)
) -> list[dict[str, Any]]:
    """Efficiency of the setting with more workers than were measured, and what takes most of the step; `driver_alone`:
    if nothing but the driver's CPU time per chunk, `driver_s`, limited it."""
    rows = []
    for servers in (1, 4):
        for count in counts:
            load = replace(asked, workers=count, servers=servers).load
            step_s = model.predict(load)
            told = {"workers": count, "servers": servers, "step_s": step_s, "efficiency": load.ideal_s / step_s}
            alone = load.ideal_s / max(load.ideal_s, load.chunks * driver_s)
            rows.append({**told, "binds": model.binds(load), "driver_alone": alone})
    return rows


def real_scaling(counts: Sequence[int], steps: int, say: Say) -> dict[str, list[Point]]:
    """A small job on real workers. strong: the same 32 tasks a step; weak: 16 tasks a step for each worker."""
    config = load_config([], [*JOB, "num_workers=1"])
    prepared = prepare(job := Job(config), [])
    points: dict[str, list[Point]] = {"strong": [], "weak": []}
    for count in counts:
        own = config.fleet
        resources = Resources(own.cpus_per_worker, threads=own.threads_per_worker)
        fleet = RayFleet(job.worker_factory(prepared.constants), count, count, resources, say=say)
        try:
            for name, tasks in (("strong", 32), ("weak", 16 * count)):
                server = fleet.start_server(prepared.theta, job.optimization(prepared.engine), None)
                size = prepared.chunk_size
                warm_up = math.ceil(2 * AFTER * count * size / tasks)  # until every worker plays its recording back
                whole, _ = time_steps(fleet, server, tasks, size, steps, warm_up)
                rate = tasks / median(whole)
                alone = points[name][0].tasks_per_s / points[name][0].workers if points[name] else rate / count
                points[name].append(Point(count, tasks, median(whole), rate, rate / count / alone))
        finally:
            fleet.close()
    return points


def report(asked: Setting, most_servers: int, counts: Sequence[int], say: Say) -> dict[str, Any]:
    """All of it as plain values: `counts` of real workers, simulated ones, the cost model and its predictions."""
    real = real_scaling(counts, asked.steps, say)
    say(f"starting {asked.workers} simulated workers")
    fleet, start_s, resident_mib = start_simulated(asked.workers, say)
    try:
        found = []
        for setting in sorted(settings(asked, most_servers), key=lambda setting: -setting.workers):
            say(f"measuring {setting.load.chunks} chunks of {setting.chunk_s:g} s on {setting.workers} workers")
            found.append(measure(fleet, setting))
    finally:
        fleet.close()
    model = fit([one.setting.load for one in found], [one.step_s for one in found])
    rows = [_beside(one, model) for one in sorted(found, key=lambda one: one.setting.workers)]
    return {
        "real": {name: [point._asdict() for point in points] for name, points in real.items()},
        "fleet": {"workers": asked.workers, "start_s": start_s, "resident_mib": resident_mib},
        "ideal": "ceil(chunks / workers) * chunk_s",
        "measured": [row for row in rows if row["chunk_s"]],
        "saturation": [row for row in rows if not row["chunk_s"]],
        "model": model._asdict(),
        "predicted": predictions(model, asked, found[0].driver_ms / 1e3),
    }


def _beside(one: Measurement, model: CostModel) -> dict[str, Any]:
    """A measurement and what the model says of it."""
    modelled = model.predict(one.setting.load)
    return {**one.row(), "model_step_s": modelled, "model_error": modelled / one.step_s - 1}


def _resident_mib(pid: int) -> float:
    """Memory of a process, pages it shares with others counted in full; NaN where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))
