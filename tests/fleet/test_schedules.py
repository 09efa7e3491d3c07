"""Random schedules of faults, through the same fleet, actors and server as on a cluster: theta is always the same.

Blocks and norms of theta are made small, so that a few parameters are cut over several shards of the server, and
results are sent ahead from the first ones on.
"""

import random
from collections import Counter
from functools import cache
from typing import get_args

import numpy as np
import pytest

from metadist.checkpoint.format import theta_sha256
from metadist.core.messages import Chunk, Weights, plan
from metadist.fleet import dispatch, recovery, server
from metadist.fleet.dispatch import Ahead
from metadist.fleet.local import Fault, Kind, LocalFleet
from metadist.fleet.server import Optimization
from metadist.fleet.worker import Worker
from tests.fleet.test_worker import make_worker

BLOCKS, SCHEDULES = 20, 120
STEPS, TASKS, CHUNK_SIZE = 7, 9, 2
KINDS = sorted(get_args(Kind))
LOSSES = ("server", "server before", "server after", "results", "weights", "node")  # of what only the server had
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


def run(fleet: LocalFleet, lag: int) -> list:
    """Hash of theta and the loss after every step, and what an evaluation in the middle says."""
    theta = WORKER.engine.initial_theta().numpy()
    server = fleet.start_server(theta, Optimization(meta_lr=0.05, clip_norm=0.5), None, lag=lag)
    results = []
    for step in range(STEPS):
        tasks, next_tasks = (plan("train", each, TASKS, CHUNK_SIZE) for each in (step, step + 1))
        ahead = Ahead(server.weights(), [next_tasks]) if lag and step + 1 < STEPS else None
        gradients = fleet.meta_gradients(server.used(), tasks, ahead)
        weights, stats = server.apply(step, *gradients, num_tasks=TASKS)
        assert stats.num_tasks == TASKS
        results.append((theta_sha256(fleet.fetch(weights).theta), stats.loss))
        if step == STEPS // 2:
            measured = fleet.evaluate(server.weights(), plan("validation", 0, 5, CHUNK_SIZE))
            results.append(b"".join(values.tobytes() for chunk in measured for values in chunk.values()))
        assert fleet.executor.now() < 1e5
    assert server.snapshot()["step"] == STEPS
    return results


@pytest.fixture(scope="module")
def worker() -> Remembering:
    return Remembering(WORKER)


@pytest.fixture(autouse=True)
def _everything_is_small(monkeypatch):
    monkeypatch.setattr(recovery, "SNAPSHOT_EVERY", 3)
    monkeypatch.setattr(dispatch, "SEND_AHEAD", 2)
    monkeypatch.setattr(server, "BLOCK", 16)


def schedule(seed: int) -> tuple[dict, int]:
    """A fleet's arguments, and the lag of the run."""
    draw = random.Random(seed)
    workers, lag = draw.randint(1, 5), draw.randint(0, 1)
    kinds = draw.sample(KINDS, draw.randint(1, len(KINDS)))
    faults = []
    for _ in range(draw.randint(0, 14)):
        kind = draw.choice(kinds)
        number = draw.randint(1, 5) if kind == "target" else draw.randrange(workers + 4)
        faults.append(Fault(draw.uniform(0, 25), kind, number))
    losses = [fault for fault in faults if fault.kind in LOSSES]
    faults = [fault for fault in faults if fault not in losses[recovery.MOST_IN_A_ROW :]]
    return {
        "target": workers, "min_workers": draw.randint(1, workers), "faults": faults, "servers": draw.randint(1, 3)
    }, lag  # fmt: skip


HAPPENED: Counter[str] = Counter()


@pytest.mark.parametrize("block", range(BLOCKS))
def test_whatever_happens_theta_is_the_same(worker, block):
    """BLOCKS * SCHEDULES = 2,400 schedules."""
    expected = {lag: run(LocalFleet(lambda: worker), lag) for lag in (0, 1)}
    assert expected[0] != expected[1]
    said: list[str] = []
    for seed in range(block * SCHEDULES, (block + 1) * SCHEDULES):
        options, lag = schedule(seed)
        fleet = LocalFleet(lambda: worker, **options, say=said.append)
        assert run(fleet, lag) == expected[lag], f"seed {seed}: {options}"
        HAPPENED.update(fleet.local.happened)
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


def test_each_kind_of_fault_has_happened():
    print(HAPPENED)
