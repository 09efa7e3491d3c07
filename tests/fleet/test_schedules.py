"""Random schedules of faults, through the same fleet, actors and server as on a cluster: theta is always the same.

Blocks and norms of theta are made small, so that a few parameters are cut over several shards of the server, and
results are sent ahead from the first ones on.
"""

import random
from collections import Counter
from functools import cache, partial
from typing import get_args

import numpy as np
import pytest

from metadist.checkpoint.format import theta_sha256
from metadist.core.messages import Chunk, Weights, plan
from metadist.fleet import dispatch, local, recovery, server
from metadist.fleet.dispatch import Ahead
from metadist.fleet.local import Fault, Kind, LocalFleet
from metadist.fleet.server import Optimization
from metadist.fleet.worker import Worker
from tests.fleet.test_worker import make_worker

BLOCKS, SCHEDULES = 20, 120
STEPS, TASKS, CHUNK_SIZE = 6, 9, 2
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


def run(fleet: LocalFleet, lag: int, goes_on: bool = False) -> list:
    """Hash of theta and the loss after every step, and what an evaluation in the middle says. `goes_on`: workers begin
    the next step as soon as the server moves."""
    theta = WORKER.engine.initial_theta().numpy()
    server = fleet.start_server(theta, Optimization(meta_lr=0.05, clip_norm=0.5), None, lag=lag)
    results = []
    for step in range(STEPS):
        tasks, next_tasks = (plan("train", each, TASKS, CHUNK_SIZE) for each in (step, step + 1))
        ahead = Ahead(server.weights(), [next_tasks]) if lag and step + 1 < STEPS else None
        gradients = fleet.meta_gradients(server.used(), tasks, ahead)
        begin_next = goes_on and not lag and step + 1 < STEPS
        then = partial(fleet.begin_next, next_tasks) if begin_next else None
        weights, stats = server.apply(step, *gradients, num_tasks=TASKS, then=then)
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
    server.server_proof()  # which the process remembers: it must not be that of small blocks
    monkeypatch.setattr(recovery, "SNAPSHOT_EVERY", 3)
    monkeypatch.setattr(dispatch, "SEND_AHEAD", 2)
    monkeypatch.setattr(server, "BLOCK", 22)


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
    faults = [fault for fault in faults if fault not in losses[recovery.MOST_IN_A_ROW - 1 :]]
    fewest, servers = draw.randint(1, workers), draw.choice((1, 1, 2))
    return {"target": workers, "min_workers": fewest, "faults": faults, "servers": servers}, lag


CONSEQUENCES = [
    "server with results", "results sent ahead", "cancelled", "tasks begun ahead", "lost argument of meta_gradients",
    "lost argument of evaluate", "lost argument of take", "lost argument of fold", "lost argument of apply",
]  # fmt: skip
SENTENCES = [
    "was lost (scripted)", "cannot be reached", "no result in", "which answers and computes",
    "which does not answer and is not counted", "no sign of life for 30 s", "answers again", "taken away",
    "server was lost", "were lost",
]  # fmt: skip


@pytest.fixture(scope="module")
def happened() -> Counter[str]:
    """How often each kind of fault did something, and what came of it was said."""
    return Counter()


@pytest.mark.parametrize("block", range(BLOCKS))
def test_whatever_happens_theta_is_the_same(worker, happened, block):
    """BLOCKS * SCHEDULES = 2,400 schedules."""
    expected = {lag: run(LocalFleet(lambda: worker), lag) for lag in (0, 1)}
    assert expected[0] != expected[1]
    said: list[str] = []
    for seed in range(block * SCHEDULES, (block + 1) * SCHEDULES):
        options, lag = schedule(seed)
        fleet = LocalFleet(lambda: worker, **options, say=said.append)
        assert run(fleet, lag, seed % 2 == 1) == expected[lag], f"seed {seed}: {options}"
        happened.update(fleet.local.happened)
        happened["schedules"] += 1
        happened["tasks begun ahead"] += fleet.staleness[1]
    happened.update(text for line in said for text in SENTENCES if text in line)
    assert not any("differently" in line for line in said)


def test_all_that_can_be_scripted_has_happened(happened):
    """So that the simulation cannot silently drop a kind of fault."""
    if happened["schedules"] < BLOCKS * SCHEDULES:
        pytest.skip("only some of the schedules have been run")
    assert not [kind for kind in [*KINDS, *CONSEQUENCES, *SENTENCES] if not happened[kind]]


def test_a_worker_that_computes_something_else_is_found_out(worker, monkeypatch):
    """Where two compute the same bundle, because the one is slow."""
    monkeypatch.setattr(local, "SLOW", 5.0)

    class Odd(Remembering):
        def meta_gradients(self, weights: Weights, chunk: Chunk):
            report, rows = super().meta_gradients(weights, chunk)
            return report._replace(losses=report.losses + 1e-9 * self.computed), rows

    for kind, found in ((Odd, True), (Remembering, False)):
        said: list[str] = []
        fleet = LocalFleet(lambda kind=kind: kind(WORKER), 2, faults=[Fault(0.5, "slow", 0)], say=said.append)
        weights = Weights(0, WORKER.engine.initial_theta().numpy())
        for step in range(3):
            fleet.meta_gradients(weights, plan("train", step, 40, 2))
        assert any("differently" in line for line in said) == found


def test_a_bundle_counted_twice_would_be_seen(worker, monkeypatch):
    monkeypatch.setattr(dispatch, "SEND_AHEAD", TASKS)
    fleet = LocalFleet(lambda: worker)
    server = fleet.start_server(WORKER.engine.initial_theta().numpy(), Optimization(), None)
    results = fleet.meta_gradients(server.used(), plan("train", 0, TASKS, CHUNK_SIZE))
    for wrong in (results[:2] + results[1:], results[:-1], results[::-1]):
        with pytest.raises(ValueError, match="needs"):
            server.apply(0, *wrong, num_tasks=TASKS)
