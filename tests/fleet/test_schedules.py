"""Thousands of scripted runs in which almost everything goes wrong: one theta, no task lost or counted twice, no end
that does not come. The workers and servers are real, the time is not."""

import random
from functools import cache

import numpy as np
import pytest

from metadist.checkpoint.format import theta_sha256
from metadist.core.messages import Chunk, Weights, plan
from metadist.fleet import recovery
from metadist.fleet.local import Fault, LocalFleet
from metadist.fleet.server import Optimization
from metadist.fleet.worker import Worker
from tests.fleet.test_worker import make_worker

BLOCKS, SCHEDULES = 20, 120
STEPS, TASKS, CHUNK_SIZE = 7, 9, 2
KINDS = [
    "kill",
    "hang",
    "unreachable",
    "cut",
    "slow",
    "lose",
    "repeat",
    "drain",
    "target",
    "server before",
    "server after",
    "results",
]
WORKER = make_worker()


class Remembering:
    """The real worker, asked once for what it would compute again to the same bits."""

    def __init__(self, worker: Worker):
        self.worker, self.computed = worker, 0
        self._chunk = cache(lambda version, theta, chunk: worker.meta_gradients(_weights(version, theta), chunk))
        self._measured = cache(lambda version, theta, chunk: worker.evaluate(_weights(version, theta), chunk))

    def proof(self) -> str:
        return "real"

    def meta_gradients(self, weights: Weights, chunk: Chunk):
        self.computed += 1
        return self._chunk(weights.version, weights.theta.tobytes(), chunk)

    def evaluate(self, weights: Weights, chunk: Chunk, baselines: tuple[str, ...] = ()):
        return self._measured(weights.version, weights.theta.tobytes(), chunk)


def _weights(version: int, theta: bytes) -> Weights:
    return Weights(version, np.frombuffer(theta, np.float32))


def run(worker: Remembering, workers: int, min_workers: int, faults: list[Fault], lag: int, said: list[str]) -> list:
    """Hash of theta and the loss after every step, and what an evaluation in the middle says."""
    fleet = LocalFleet(lambda: worker, workers, min_workers, faults, said.append)  # pyright: ignore
    theta = WORKER.engine.initial_theta().numpy()
    server = fleet.start_server(theta, Optimization(meta_lr=0.05, clip_norm=0.5), None, lag=lag)
    told = []
    for step in range(STEPS):
        gradients = fleet.meta_gradients(server.used(), plan("train", step, TASKS, CHUNK_SIZE))
        weights, stats = server.apply(step, *gradients, num_tasks=TASKS)
        assert stats.num_tasks == TASKS
        told.append((theta_sha256(weights.theta), stats.loss))
        if step == STEPS // 2:
            results = fleet.evaluate(weights, plan("validation", 0, 5, CHUNK_SIZE))
            told.append(b"".join(each.tobytes() for result in results for each in result.values()))
        assert fleet.now < 1e5
    state = server.snapshot()
    assert state["step"] == STEPS
    return told


@pytest.fixture(scope="module")
def worker() -> Remembering:
    return Remembering(WORKER)


@pytest.fixture(autouse=True)
def _copies_are_made_often(monkeypatch):
    monkeypatch.setattr(recovery, "KEEP_EVERY", 3)


def schedule(seed: int) -> tuple[int, int, list[Fault], int]:
    draw = random.Random(seed)
    workers, lag = draw.randint(1, 5), draw.randint(0, 1)
    kinds = draw.sample(KINDS, draw.randint(1, len(KINDS)))
    faults = []
    for _ in range(draw.randint(0, 14)):
        kind = draw.choice(kinds)
        number = draw.randint(1, 5) if kind == "target" else draw.randrange(workers + 4)
        faults.append(Fault(draw.uniform(0, 25), kind, number))
    of_server = [fault for fault in faults if fault.kind in ("server before", "server after", "results")]
    faults = [fault for fault in faults if fault not in of_server[recovery.MOST_IN_A_ROW :]]
    return workers, draw.randint(1, workers), faults, lag


@pytest.mark.parametrize("block", range(BLOCKS))
def test_whatever_happens_theta_is_the_same(worker, block):
    """BLOCKS * SCHEDULES = 2,400 schedules."""
    expected = {lag: run(worker, 1, 1, [], lag, []) for lag in (0, 1)}
    assert expected[0] != expected[1]
    said: list[str] = []
    for seed in range(block * SCHEDULES, (block + 1) * SCHEDULES):
        workers, min_workers, faults, lag = schedule(seed)
        assert run(worker, workers, min_workers, faults, lag, said) == expected[lag], f"seed {seed}: {faults}"
    for text in (
        "was lost (scripted)",
        "cannot be reached",
        "no result in",
        "which answers and computes",
        "which does not answer and is not counted",
        "no sign of life for 30 s",
        "answers again",
        "taken away",
        "server was lost",
        "were lost",
    ):
        assert any(text in line for line in said), text
    assert not any("differently" in line for line in said)


def test_a_worker_that_computes_something_else_is_found_out(worker):
    """Where two compute the same chunk, because the one is slow."""

    class Odd(Remembering):
        def meta_gradients(self, weights: Weights, chunk: Chunk):
            report, rows = super().meta_gradients(weights, chunk)
            return report._replace(losses=report.losses + 1e-9 * self.computed), rows

    for kind, found in ((Odd, True), (Remembering, False)):
        said: list[str] = []
        fleet = LocalFleet(lambda kind=kind: kind(WORKER), 2, faults=[Fault(1.5, "slow", 0)], say=said.append)  # pyright: ignore
        weights = Weights(0, WORKER.engine.initial_theta().numpy())
        for step in range(3):
            fleet.meta_gradients(weights, plan("train", step, 40, 2))
        assert any("differently" in line for line in said) == found


def test_a_chunk_counted_twice_would_be_seen(worker):
    fleet = LocalFleet(lambda: worker, 1)  # pyright: ignore
    server = fleet.start_server(WORKER.engine.initial_theta().numpy(), Optimization(), None)
    results = fleet.meta_gradients(server.used(), plan("train", 0, TASKS, CHUNK_SIZE))
    for wrong in (results[:2] + results[1:], results[:-1], results[::-1]):
        with pytest.raises(ValueError, match="needs"):
            server.apply(0, *wrong, num_tasks=TASKS)
