import os
import random
import socket
from functools import partial

import numpy as np
import pytest

from metadist.core.messages import plan
from metadist.fleet.events import Waiting
from metadist.fleet.executor import Failure
from metadist.fleet.limits import Patience, TooManyLosses
from metadist.fleet.local import Fault, LocalFleet
from metadist.fleet.server import Optimization
from tests.fleet.test_worker import make_worker, weights_of

WORKER = make_worker()
WEIGHTS = weights_of(WORKER)
PLAN = plan("train", 1, 11, 2)


def gradients(fleet: LocalFleet) -> tuple[np.ndarray, np.ndarray]:
    results = [fleet.executor.get(result) for result in fleet.meta_gradients(WEIGHTS, PLAN)]
    assert (
        [report.chunk for report in fleet.reports()]
        == PLAN
        == [each.chunk for reports, _ in results for each in reports]
    )
    losses = np.concatenate([report.losses for report in fleet.reports()])
    return np.concatenate([rows for _, gradients in results for rows in gradients]), losses


def undisturbed() -> tuple[np.ndarray, np.ndarray]:
    results = [WORKER.meta_gradients(WEIGHTS, chunk) for chunk in PLAN]
    return np.concatenate([rows for _, rows in results]), np.concatenate([report.losses for report, _ in results])


@pytest.mark.parametrize("workers", [1, 2, 5, 20])
def test_the_number_of_workers_changes_no_bit(workers):
    for result, expected in zip(gradients(LocalFleet(lambda: WORKER, workers)), undisturbed(), strict=True):
        assert np.array_equal(result, expected)


@pytest.mark.parametrize("seed", range(20))
def test_deaths_at_any_time_change_no_bit(seed):
    draw = random.Random(seed)
    faults = [Fault(draw.uniform(0, 8), "kill", draw.randrange(1, 6)) for _ in range(8)] + [
        Fault(draw.uniform(0, 4), "kill", 0)
    ]
    said: list[str] = []
    fleet = LocalFleet(lambda: WORKER, draw.randint(1, 3), min_workers=1, faults=faults, say=said.append)
    for _ in range(2):
        for result, expected in zip(gradients(fleet), undisturbed(), strict=True):
            assert np.array_equal(result, expected)
    assert any("was lost (scripted)" in text for text in said)


def test_a_rebuilt_server_has_its_steps_computed_in_chunks_of_the_same_size():
    """Though the step that it dies at has fewer tasks than a chunk."""

    class Noting:
        seen: list[tuple] = []

        def proof(self) -> str:
            return WORKER.proof()

        def meta_gradients(self, weights, chunk):
            self.seen.append(chunk[1:])
            return WORKER.meta_gradients(weights, chunk)

    fleet = LocalFleet(Noting, faults=[Fault(5.5, "server before")])  # pyright: ignore
    server = fleet.start_server(WEIGHTS.theta, Optimization(), None)
    for step, tasks in enumerate([6, 6, 2]):
        server.apply(step, *fleet.meta_gradients(server.used(), plan("train", step, tasks, 4)), num_tasks=tasks)
    usual = [(0, 0, 4), (0, 4, 6), (1, 0, 4), (1, 4, 6), (2, 0, 2)]
    assert Noting.seen == [*usual, *usual]


@pytest.mark.parametrize("goes_on", [True, False])
def test_workers_go_on_with_the_next_step_as_soon_as_the_server_has_moved(goes_on):
    """Then its results are there before the driver asks for them, by the virtual clock."""
    fleet = LocalFleet(lambda: WORKER, 2)
    server = fleet.start_server(WEIGHTS.theta, Optimization(), None)
    first, second = (plan("train", step, 8, 2) for step in (0, 1))
    then = partial(fleet.begin_next, second) if goes_on else None
    server.apply(0, *fleet.meta_gradients(server.used(), first), num_tasks=8, then=then)
    fleet.evaluate(server.weights(), plan("validation", 0, 8, 2))
    asked_at = fleet.executor.now()
    results = fleet.meta_gradients(server.used(), second)
    assert (fleet.executor.now() == asked_at) == goes_on
    server.apply(1, *results, num_tasks=8)
    assert fleet.staleness == {0: 16}


def test_a_step_begun_with_weights_that_never_come_is_begun_again_with_those_that_did():
    """As where the server's answer is lost on the way: its processes are well, and nothing is rebuilt."""
    said: list[str] = []
    fleet = LocalFleet(lambda: WORKER, 2, say=said.append)
    server = fleet.start_server(WEIGHTS.theta, Optimization(), None)
    first, second = (plan("train", step, 8, 2) for step in (0, 1))
    server.apply(0, *fleet.meta_gradients(server.used(), first), num_tasks=8)
    fleet.begin_next(second, (fleet.executor.put(Failure("unavailable", "scripted")),))
    server.apply(1, *fleet.meta_gradients(server.used(), second), num_tasks=8)
    assert not any("lost" in line for line in said)


def test_a_death_costs_time_and_is_said():
    said: list[str] = []
    quiet, hit = (
        LocalFleet(lambda: WORKER, 2),
        LocalFleet(lambda: WORKER, 2, faults=[Fault(2.5, "kill", 0)], say=said.append),
    )
    gradients(quiet)
    gradients(hit)
    assert hit.executor.now() > quiet.executor.now() and len(said) == 1


def test_two_workers_take_half_the_virtual_time():
    times = []
    for workers in (1, 2):
        fleet = LocalFleet(lambda: WORKER, workers)
        gradients(fleet)
        times.append(fleet.executor.now())
    assert times == [1 + 6, 1 + 3]


def test_a_fleet_is_resized_between_batches():
    fleet = LocalFleet(lambda: WORKER, 2, min_workers=2)
    gradients(fleet)
    for target in (4, 1):
        fleet.resize(target)
        for result, expected in zip(gradients(fleet), undisturbed(), strict=True):
            assert np.array_equal(result, expected)
        assert fleet.target == fleet.num_workers == target


def test_evaluation_comes_back_in_the_order_of_its_chunks():
    chunks = plan("test", 0, 5, 2)
    fleet = LocalFleet(lambda: WORKER, 3, faults=[Fault(1.5, "kill", 1)])
    for result, chunk in zip(fleet.evaluate(WEIGHTS, chunks), chunks, strict=True):
        for name, values in WORKER.evaluate(WEIGHTS, chunk).items():
            assert np.array_equal(result[name], values)


def test_workers_that_only_die_end_the_run():
    faults = [Fault(1.0 + n, "kill", n) for n in range(30)]
    fleet = LocalFleet(lambda: WORKER, 1, faults=faults, patience=Patience(back_off_s=0.0))
    with pytest.raises(TooManyLosses, match="scripted"):
        gradients(fleet)


def test_a_link_that_is_cut_for_a_while_is_said_costs_no_bit_and_its_worker_is_used_again():
    """Worker 0's link is cut from 6.5 to 31.5; a chunk takes 1 s, a step 3."""
    said: list[str] = []
    fleet = LocalFleet(lambda: WORKER, 2, faults=[Fault(6.5, "cut", 0)], say=said.append)
    shown, steps = [], []
    for _ in range(12):
        began = fleet.executor.now()
        for result, expected in zip(gradients(fleet), undisturbed(), strict=True):
            assert np.array_equal(result, expected)
        shown.append(fleet.num_workers)
        steps.append(fleet.executor.now() - began)
    assert max(steps) < 10, "nobody waits for the lost host"
    assert shown[0] == 2 and 1 in shown and shown[-1] == 2
    assert [text for text in said if "no result for" in text][0].endswith(
        "waiting for worker 0 on a, which does not answer and is not counted"
    )
    assert said[-1] == "worker 0 answers again"
    assert {worker for _, _, worker, *_ in fleet.account()} == {0, 1}


def test_a_link_that_is_cut_under_the_only_worker_holds_the_run_up_for_as_long_and_it_is_said():
    said: list[str] = []
    fleet = LocalFleet(lambda: WORKER, 1, faults=[Fault(8.5, "cut", 0)], say=said.append)
    gradients(fleet)
    began = fleet.executor.now()
    gradients(fleet)
    assert 25 <= fleet.executor.now() - began < 40
    assert [text.partition(",")[0] for text in said] == [
        "no result for 11 s",
        "waiting for workers: 0 of 1 have joined; 1 not answering",
        "no result for 22 s",
        "worker 0 answers again",
    ]


def test_the_account_of_a_step_names_who_computed_it_and_where():
    fleet = LocalFleet(lambda: WORKER, 2)
    gradients(fleet)
    account = fleet.account()
    assert [(row[0], row[1], row[3]) for row in account] == [(c.start, c.stop, 1) for c in PLAN]
    assert {row[5] for row in account} == {f"{socket.gethostname()}:{os.getpid()}"}


def test_an_evaluation_tells_how_many_chunks_are_done_up_to_all():
    told: list[tuple[int, int]] = []
    faults = [Fault(1.5, "kill", 0)]
    fleet = LocalFleet(lambda: WORKER, 2, faults=faults)
    measured = fleet.evaluate(WEIGHTS, plan("test", 0, 11, 2), progress=lambda done, total: told.append((done, total)))
    assert len(measured) == 6 and told == sorted(told) and told[-1] == (6, 6)
    assert {total for _, total in told} == {6} and len({done for done, _ in told}) > 2


@pytest.mark.parametrize(("waiting", "why", "text"), [
    (Waiting(0, 2, True), "2 being started", "starting 2 workers"),
    (Waiting(0, 1, True), "1 being started", "starting 1 worker"),
    (Waiting(1, 2, False), "1 being started", "computing with fewer workers: 1 of 2 have joined; 1 being started"),
    (Waiting(0, 2, True), "1 being started, 1 for want of room",
     "waiting for workers: 0 of 2 have joined; 1 being started, 1 for want of room"),
])  # fmt: skip
def test_workers_that_are_only_being_started_are_told_as_that(waiting, why, text):
    assert waiting.sentence(why) == text
