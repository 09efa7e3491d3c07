"""What this machine makes of a job: each way to compute it, measured in turn."""

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np

from metadist.config import Config
from metadist.core.errors import InputError
from metadist.core.garbage import look_as_usual
from metadist.core.messages import PHASES, Weights, plan
from metadist.engine import Engine, Method, estimate
from metadist.engine.graph_cache import AFTER
from metadist.fleet.server import Server
from metadist.fleet.worker import Worker, set_up_process
from metadist.run.auto import aggregation, chunk_size, worker_device
from metadist.run.build import Job

MIB = 1 << 20


def methods(engine: Engine, compiled: bool) -> list[Method]:
    """The ways an engine's learner may be computed on its device, the job's own first."""
    learner, on_gpu = engine.learner, engine.device.type == "cuda"
    modes = ("unroll",) if learner.first_order or learner.inner_steps == 0 else ("unroll", "remat")
    found = [engine.method]
    for kind in ("loop", "vmap"):
        found += [Method(kind, mode) for mode in modes if kind in learner.engines]
        if kind in learner.engines and compiled:
            found.append(Method(kind, compiled=True))
        if kind in learner.engines and on_gpu:
            found += [Method(kind, captured=True), Method(kind, captured=True, autocast=True)]
    return list(dict.fromkeys(found))


def overrides(method: Method) -> str:
    """What to put in the job to get this method."""
    wanted = [f"engine.kind={method.kind}", f"engine.differentiation={method.differentiation}"]
    flags = {"compile": method.compiled, "cuda_graphs": method.captured, "autocast": method.autocast}
    return " ".join([*wanted, *(f"engine.{name}=true" for name, wanted in flags.items() if wanted)])


def measure(config: Config, seconds: float, compiled: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """{"methods": one row each, the fastest first, "phases": seconds per task, "update": of the server's step}.

    Methods take turns, three times each, for `seconds` in all, so that a machine whose speed drifts treats them alike;
    tasks per second are the median of the three.
    """
    set_up_process(config.fleet.threads_per_worker)
    look_as_usual()
    worker = Job(config).worker()
    contenders: dict[Method, tuple[Worker, list[float], float]] = {}
    for method in methods(worker.engine, compiled):
        say(f"preparing {overrides(method)}")
        began = time.perf_counter()
        contender = _with_method(config, worker, method)
        try:
            _warm_up(contender)
        except InputError as error:
            say(f"{overrides(method)}: {error}")
            continue
        contenders[method] = contender, [], time.perf_counter() - began
    for turn in range(3):
        for method, (contender, rates, _) in contenders.items():
            say(f"round {turn + 1} of 3: {overrides(method)}")
            rates.append(_rate(contender, seconds / 3))
    own = contenders.get(worker.engine.method, next(iter(contenders.values())))[0]
    rows = [
        _row(method, contender, rates, prepared, method == worker.engine.method)
        for method, (contender, rates, prepared) in contenders.items()
    ]
    return {
        "device": worker.engine.fingerprint(),
        "threads": config.fleet.threads_per_worker,
        "parameters": worker.engine.layout.size,
        "methods": sorted(rows, key=lambda row: -row["tasks_per_s"]),
        **_step(config, own),
    }


def _with_method(config: Config, worker: Worker, method: Method) -> Worker:
    engine = Engine(worker.engine.learner, method, worker_device(config))
    size = chunk_size(config, engine)
    whole = aggregation(config, engine)
    return Worker(engine, worker.source, worker.evaluator, worker.seed, worker.meta_steps, whole, size)


def _chunks(worker: Worker) -> Iterator[Any]:
    step = 0
    while True:
        yield plan("train", step, worker.chunk_size, worker.chunk_size)[0]
        step += 1


def _weights(worker: Worker) -> Weights:
    return Weights(0, worker.engine.initial_theta().cpu().numpy())


def _warm_up(worker: Worker) -> None:
    """Until what is computed often is played back (or compiled)."""
    weights, chunks = _weights(worker), _chunks(worker)
    calls = 1 if worker.engine.method.compiled else AFTER + 1
    for _ in range(-(-calls // (worker.chunk_size if worker.engine.kind == "loop" else 1))):
        worker.meta_gradients(weights, next(chunks))


def _rate(worker: Worker, seconds: float) -> float:
    weights, chunks = _weights(worker), _chunks(worker)
    began, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - began < seconds:
        worker.meta_gradients(weights, next(chunks))
        done += worker.chunk_size
    return done / (time.perf_counter() - began)


def _row(method: Method, worker: Worker, rates: Sequence[float], prepared: float, own: bool) -> dict[str, Any]:
    memory = estimate(worker.engine, [worker.source(name) for name in next(_chunks(worker)).tasks])
    return {
        "overrides": overrides(method),
        "auto": own,
        "tasks_per_s": round(median(rates), 2),
        "slowest_tasks_per_s": round(min(rates), 2),
        "fastest_tasks_per_s": round(max(rates), 2),
        "prepared_s": round(prepared, 1),
        "activations_mib": round(memory.activations / MIB, 1),
        "trajectory_mib": round(memory.trajectory / MIB, 2),
        "chunk_tasks": worker.chunk_size,
    }


def _step(config: Config, worker: Worker) -> dict[str, Any]:
    """The parts of a meta-step in this process, medians of five: a worker's phases per task, the server's work."""
    batch = config.batch_size(config.num_workers)
    server, phases, updates = Server(_weights(worker).theta, Job(config).optimization(worker.engine)), [], []
    weights = server.weights()
    for step in range(5):
        results = [worker.meta_gradients(weights, chunk) for chunk in plan("train", step, batch, worker.chunk_size)]
        phases.append([sum(report.seconds[phase] for report, _ in results) / batch for phase in PHASES])
        began = time.perf_counter()
        weights, _ = server.apply(step, *results, num_tasks=batch)
        updates.append(time.perf_counter() - began)
    return {
        "phases_ms_per_task": {
            phase: round(1e3 * float(value), 3) for phase, value in zip(PHASES, np.median(phases, axis=0), strict=True)
        },
        "update_ms": round(1e3 * median(updates), 3),
        "meta_batch_size": batch,
    }
