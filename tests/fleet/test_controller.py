from dataclasses import fields

import pytest

from metadist.core.messages import Chunk, plan
from metadist.fleet.controller import Controller
from metadist.fleet.dispatch import cut_bundles
from metadist.fleet.events import (
    Abandon,
    Answered,
    Ask,
    Assign,
    Attempt,
    Cancel,
    Compare,
    Done,
    Draining,
    Joined,
    Lost,
    Probe,
    Retire,
    Say,
    Spawn,
    Target,
    Tick,
    Unreachable,
    Waiting,
)
from metadist.fleet.limits import Patience, TooManyLosses

PATIENCE = {field.name for field in fields(Patience)}


def chunks(count: int, step: int = 0) -> list[Chunk]:
    return plan("train", step, count, 1)


def starts(actions) -> list[tuple[int, int]]:
    """(worker, first task) of every chunk assigned."""
    return [(a.attempt.worker, a.attempt.chunk.start) for a in actions if isinstance(a, Assign)]


def of_kind(actions, kind: type) -> list:
    return [action for action in actions if isinstance(action, kind)]


def running(target: int, count: int, nodes: str = "", **options) -> tuple[Controller, list]:
    """A controller whose workers have all joined (worker i on the i-th of `nodes`), with a batch under way; and its
    assignments so far."""
    own = {name: options.pop(name) for name in list(options) if name in PATIENCE}
    controller = Controller(target, patience=Patience(**own), **options)
    for action in of_kind(controller.on(Tick(), 0.0), Spawn):
        controller.on(Joined(action.worker, nodes[action.worker] if nodes else ""), 0.0)
    return controller, starts(controller.begin(chunks(count), 0.0))


def done(controller: Controller, worker: int, start: int, now: float) -> list:
    """What follows when that worker returns that chunk of the current batch."""
    return controller.on(Done(Attempt(controller.batch, chunks(start + 1)[start], worker)), now)


def waiting(controller: Controller) -> list[int]:
    """First tasks of the chunks that are queued."""
    return [chunk.start for _, chunk in controller.queue]


def test_it_starts_as_many_workers_as_wanted():
    assert Controller(3).begin(chunks(1), 0.0) == [Spawn(0), Spawn(1), Spawn(2)]


def test_chunks_are_dealt_breadth_first_and_no_deeper_than_depth():
    _, dealt = running(3, 10)
    assert dealt == [(0, 0), (1, 1), (2, 2), (0, 3), (1, 4), (2, 5)]
    _, dealt = running(2, 10, depth=3)
    assert dealt == [(0, 0), (1, 1), (0, 2), (1, 3), (0, 4), (1, 5)]
    _, dealt = running(2, 10, depth=1)
    assert dealt == [(0, 0), (1, 1)]


def test_who_returns_a_chunk_gets_the_next():
    controller, _ = running(2, 6)
    assert starts(done(controller, 1, 1, 1.0)) == [(1, 4)]
    assert starts(done(controller, 1, 3, 2.0)) == [(1, 5)]
    assert starts(done(controller, 1, 4, 3.0)) == []


def test_a_batch_is_finished_when_every_chunk_is_returned():
    controller, dealt = running(2, 4)
    for worker, start in dealt:
        assert not controller.finished(controller.batch)
        done(controller, worker, start, 1.0)
    assert controller.finished(controller.batch) and controller.state == "idle"
    assert starts(controller.begin(chunks(4, step=1), 2.0)) == [(0, 0), (1, 1), (0, 2), (1, 3)]


def test_a_lost_workers_chunks_are_dealt_first_and_in_order():
    controller, _ = running(2, 8)
    actions = controller.on(Lost(0, "killed"), 1.0)
    assert Spawn(2) in actions
    assert waiting(controller) == [0, 2, 4, 5, 6, 7]
    assert starts(controller.on(Joined(2), 2.0)) == [(2, 0), (2, 2)]


def test_a_loss_is_said_with_its_reason():
    controller, _ = running(2, 8)
    (said,) = of_kind(controller.on(Lost(0, "out of memory"), 1.0), Say)
    assert "worker 0 was lost (out of memory)" in said.text and controller.num_lost == 1


def test_a_worker_lost_before_it_joined_is_replaced():
    controller = Controller(1)
    controller.begin(chunks(2), 0.0)
    assert of_kind(controller.on(Lost(0, "no memory"), 1.0), Spawn) == [Spawn(1)]
    assert starts(controller.on(Joined(0), 2.0)) == []
    assert starts(controller.on(Joined(1), 2.0)) == [(1, 0), (1, 1)]


def test_a_higher_target_spawns_the_difference():
    controller, _ = running(2, 20)
    assert controller.on(Target(4), 1.0) == [Spawn(2), Spawn(3)]
    assert starts(controller.on(Joined(2), 2.0)) == [(2, 4), (2, 5)]


def test_a_lower_target_retires_the_newest_once_they_hold_nothing():
    controller, _ = running(3, 20)
    assert controller.on(Target(1), 1.0) == []
    assert starts(done(controller, 2, 2, 2.0)) == []
    assert done(controller, 2, 5, 3.0) == [Retire(2)]
    done(controller, 1, 1, 4.0)
    assert done(controller, 1, 4, 5.0) == [Retire(1)]
    assert controller.num_workers == 1
    assert starts(done(controller, 0, 0, 6.0)) == [(0, 6)]


def test_a_raised_target_keeps_workers_that_were_about_to_retire():
    controller, _ = running(2, 20)
    controller.on(Target(1), 1.0)
    assert starts(controller.on(Target(2), 2.0)) == []
    assert starts(done(controller, 1, 1, 3.0)) == [(1, 4)]


def test_nothing_is_dealt_below_min_workers_and_it_is_said_every_notice_s():
    controller = Controller(2, min_workers=2, patience=Patience(notice_s=10))
    controller.begin(chunks(4), 0.0)
    assert controller.on(Joined(0), 1.0) == []
    assert controller.on(Tick(), 9.9) == []
    assert controller.on(Tick(), 10.0) == [Waiting(1, 2, paused=True)]
    assert controller.on(Tick(), 19.9) == []
    assert of_kind(controller.on(Tick(), 20.0), Waiting)
    assert starts(controller.on(Joined(1), 25.0)) == [(0, 0), (1, 1), (0, 2), (1, 3)]
    assert not of_kind(controller.on(Tick(), 60.0), Waiting)


def test_a_run_that_goes_on_with_fewer_workers_says_so_a_sixth_as_often():
    controller, _ = running(2, 20, notice_s=10)
    controller.on(Lost(0, "killed"), 1.0)
    assert not of_kind(controller.on(Tick(), 60.9), Waiting)
    assert of_kind(controller.on(Tick(), 61.0), Waiting) == [Waiting(1, 2, paused=False)]


def test_a_run_that_falls_below_min_workers_pauses_and_goes_on():
    controller, _ = running(2, 8, min_workers=2)
    controller.on(Lost(0, "killed"), 1.0)
    assert starts(done(controller, 1, 1, 2.0)) == []
    assert starts(controller.on(Joined(2), 3.0)) == [(2, 0), (1, 2), (2, 4)]


def test_a_target_below_min_workers_is_what_the_user_wants():
    controller, _ = running(2, 8, min_workers=2)
    controller.on(Target(1), 1.0)
    done(controller, 1, 1, 2.0)
    done(controller, 1, 3, 3.0)
    assert starts(done(controller, 0, 0, 4.0)) == [(0, 4)]
    assert not of_kind(controller.on(Tick(), 60.0), Waiting)


def test_no_one_is_told_to_wait_when_nothing_is_to_do():
    controller = Controller(1, patience=Patience(notice_s=10))
    controller.begin([], 0.0)
    assert controller.on(Tick(), 100.0) == []


@pytest.mark.parametrize(("count", "workers"), [(0, 2), (1, 3), (8, 2), (100, 7), (512, 128), (4096, 128)])
def test_deals_hold_every_chunk_once_in_order_and_get_smaller(count, workers):
    deals = cut_bundles(chunks(count), workers)
    assert [chunk for deal in deals for chunk in deal] == chunks(count)
    sizes = [len(deal) for deal in deals]
    assert sizes == sorted(sizes, reverse=True) and max(sizes, default=1) <= 8
    assert all(size == 1 for size in sizes[-2 * workers :]) or count < 2 * workers


def test_few_chunks_are_dealt_one_by_one():
    assert [len(deal) for deal in cut_bundles(chunks(8), 4)] == [1] * 8
    assert [len(deal) for deal in cut_bundles(chunks(8), 2)] == [2, 2, 1, 1, 1, 1]


def test_a_batch_may_begin_before_the_last_one_is_finished_and_comes_after_it():
    controller, dealt = running(1, 2)
    assert starts(controller.begin(chunks(2, step=1), 1.0)) == []
    first = Attempt(1 + controller.batch - 2, chunks(2)[0], 0)
    (assigned,) = of_kind(controller.on(Done(first), 2.0), Assign)
    assert assigned.attempt == Attempt(2, chunks(2, step=1)[0], 0)
    controller.on(Done(first._replace(chunk=chunks(2)[1])), 3.0)
    assert controller.finished(1) and not controller.finished(2)


def test_a_result_is_taken_only_under_its_attempt():
    """Not from a worker that was lost, of a batch gone by, of a chunk not asked for, nor a second time."""
    controller, _ = running(2, 4)
    controller.on(Lost(0, "killed"), 1.0)
    queued = waiting(controller)
    good = Attempt(controller.batch, chunks(4)[1], 1)
    for bad in (
        good._replace(worker=0),
        good._replace(batch=0),
        good._replace(chunk=chunks(4)[2]),
        good._replace(worker=9),
    ):
        assert controller.on(Done(bad), 2.0) == [] and waiting(controller) == queued
    controller.on(Done(good), 2.0)
    queued = waiting(controller)
    assert controller.on(Done(good), 2.0) == [] and waiting(controller) == queued
    assert controller.on(Lost(0, "killed"), 3.0) == []


def test_a_replacement_has_a_number_that_was_never_used():
    controller, _ = running(2, 8, back_off_s=0.0)
    numbers = [0, 1]
    for worker in (0, 1, 2):
        (spawn,) = of_kind(controller.on(Lost(worker, "killed"), 1.0), Spawn)
        numbers.append(spawn.worker)
        controller.on(Joined(spawn.worker), 1.0)
    assert numbers == [0, 1, 2, 3, 4]


def test_a_lower_target_retires_idle_workers_and_those_still_starting_at_once():
    controller, _ = running(3, 0)
    controller.on(Target(5), 1.0)
    controller.on(Joined(3), 1.0)
    assert sorted(controller.on(Target(2), 2.0)) == [Retire(2), Retire(3), Retire(4)]
    assert set(controller.working) == {0, 1} and not controller.starting
    assert controller.on(Joined(4), 3.0) == [] and controller.num_workers == 2


def lose(controller: Controller, times: list[float], kind: str = "died") -> None:
    for worker, now in enumerate(times):
        controller.on(Lost(worker, f"reason {worker}", kind), now)
        controller.on(Tick(), now + 19)


def test_too_many_losses_within_the_window_end_the_run_with_the_last_reason():
    controller, _ = running(1, 4, most_losses={"died": 3}, window_s=100, back_off_s=0.0)
    with pytest.raises(TooManyLosses, match=r"5 workers were lost within 100 s \(died\), .* because: reason 4"):
        lose(controller, [0, 20, 40, 60, 80])


def test_losses_spread_over_time_do_not_end_the_run():
    controller, _ = running(1, 4, most_losses={"died": 3}, window_s=100, back_off_s=0.0)
    lose(controller, [0, 40, 80, 120, 160, 200, 240])
    assert not controller.finished(controller.batch) and set(controller.starting) == {7}


def test_each_kind_of_loss_has_a_budget_of_its_own():
    kinds = {"died": 2, "unavailable": 2, "out of memory": 0, "error": 1}
    controller, _ = running(4, 4, most_losses=kinds)
    for worker, kind in enumerate(("died", "unavailable", "error")):
        controller.on(Lost(worker, "?", kind), 1.0)
    with pytest.raises(TooManyLosses, match=r"1 workers .* \(out of memory\)"):
        controller.on(Lost(3, "?", "out of memory"), 1.0)


def test_workers_that_die_without_a_result_are_replaced_ever_more_slowly():
    controller, _ = running(1, 4, back_off_s=2.0, longest_back_off_s=5.0)
    assert of_kind(controller.on(Lost(0, "killed"), 0.0), Spawn)
    now, pauses = 0.0, []
    for worker in range(1, 6):
        controller.on(Joined(worker), now)
        assert not of_kind(controller.on(Lost(worker, "killed"), now), Spawn)
        wakes_s = controller.wakes_in(now)
        assert wakes_s is not None and not of_kind(controller.on(Tick(), now + wakes_s - 0.01), Spawn)
        assert of_kind(controller.on(Tick(), now + wakes_s), Spawn) == [Spawn(worker + 1)]
        now += wakes_s
        pauses.append(wakes_s)
    assert pauses == [2.0, 4.0, 5.0, 5.0, 5.0]
    controller.on(Joined(6), now)
    done(controller, 6, 0, now)
    assert of_kind(controller.on(Lost(6, "killed"), now), Spawn)


def test_a_node_where_workers_keep_dying_is_avoided_for_a_while():
    controller, _ = running(4, 40, nodes="aabb", node_losses=2, quarantine_s=50.0, back_off_s=0.0)
    assert of_kind(controller.on(Lost(0, "killed"), 1.0), Spawn) == [Spawn(4)]
    actions = controller.on(Lost(1, "killed"), 2.0)
    assert of_kind(actions, Spawn) == [Spawn(5, frozenset("a"))]
    assert any("node a" in say.text for say in of_kind(actions, Say))
    assert not of_kind(controller.on(Tick(), 51.0), Spawn)
    actions = controller.on(Tick(), 52.0)
    assert of_kind(actions, Retire) == [Retire(5)] and of_kind(actions, Spawn) == [
        Spawn(6)
    ]  # it may have waited for room on that node


def test_a_result_from_a_node_ends_its_row_of_losses():
    controller, _ = running(3, 40, nodes="aaa", node_losses=2)
    controller.on(Lost(0, "killed"), 1.0)
    done(controller, 2, 2, 1.5)
    assert not any(spawn.avoid for spawn in of_kind(controller.on(Lost(1, "killed"), 2.0), Spawn))


def test_a_draining_node_gets_no_new_chunks_and_its_loss_costs_nothing():
    controller, _ = running(2, 20, nodes="ab", most_losses={"died": 0})
    actions = controller.on(Draining(frozenset("b")), 1.0)
    assert of_kind(actions, Spawn) == [Spawn(2, frozenset("b"))] and "taken away" in of_kind(actions, Say)[0].text
    assert starts(done(controller, 1, 1, 2.0)) == []
    assert Retire(1) in done(controller, 1, 3, 3.0)
    assert Retire(2) in controller.on(Joined(2, "b"), 4.0)  # it was on its way there already
    busy, _ = running(1, 4, nodes="b", most_losses={"died": 0})
    busy.on(Draining(frozenset("b")), 1.0)
    actions = busy.on(Lost(0, "killed"), 2.0)
    assert waiting(busy) == [0, 1, 2, 3] and not busy.leaving and busy.num_lost == 0


def test_a_replacement_that_avoids_a_draining_node_is_left_alone_when_that_is_gone():
    controller, _ = running(2, 8, nodes="ab")
    assert of_kind(controller.on(Draining(frozenset("a")), 1.0), Spawn) == [Spawn(2, frozenset("a"))]
    assert not controller.on(Draining(frozenset()), 2.0)
    assert 2 in controller.starting


def test_a_result_does_not_hide_that_the_chunk_before_it_hangs():
    controller, _ = running(1, 9, give_up_after=3.0, give_up_after_s=3.0)
    done(controller, 0, 0, 1.0)  # it is at 1 and 2
    done(controller, 0, 2, 2.0)
    done(controller, 0, 3, 3.0)
    assert not of_kind(controller.on(Tick(), 3.9), Abandon)
    assert of_kind(controller.on(Tick(), 4.1), Abandon) == [Abandon(0)]


def test_batches_begun_far_ahead_are_still_timed_and_compared():
    controller, _ = running(2, 2)
    for _ in range(9):
        controller.begin(chunks(2), 0.0, "train")
    assert controller._kinds.keys() == set(range(1, 11)), "none of them is finished"
    controller.on(Done(Attempt(1, chunks(2)[0], 0)), 1.0)
    controller.on(Done(Attempt(1, chunks(2)[1], 1)), 1.0)
    controller.begin(chunks(2), 1.0, "train")
    assert controller._kinds.keys() == set(range(2, 12))


def test_an_idle_worker_gets_a_copy_of_what_takes_too_long_and_the_first_result_counts():
    controller, _ = running(2, 3, depth=1, copy_after=2.0, copy_after_s=0.0)
    assert starts(done(controller, 1, 1, 1.0)) == [(1, 2)]
    assert controller.num_copies == 0
    assert starts(done(controller, 1, 2, 2.0)) == [(1, 0)]  # twice the usual second has gone by for worker 0
    assert controller.num_copies == 1
    first, second = (Attempt(controller.batch, chunks(1)[0], worker) for worker in (1, 0))
    assert controller.on(Done(first), 2.5) == [Cancel(second)]
    assert controller.finished(controller.batch)
    assert controller.on(Done(second), 9.0)[0] == Compare(first, second)


def test_what_waits_behind_something_slow_is_copied_too_but_nothing_twice():
    controller, _ = running(3, 6, depth=2, copy_after=2.0, copy_after_s=0.0)
    for worker, start, now in ((1, 1, 1.0), (1, 4, 2.0), (2, 2, 2.0)):
        actions = done(controller, worker, start, now)
    assert starts(actions) == []
    assert starts(done(controller, 2, 5, 2.1)) == [(2, 3)]
    assert starts(controller.on(Tick(), 3.0)) == []


def test_no_copies_while_chunks_are_waiting_or_nothing_is_known_of_their_time():
    controller, _ = running(2, 2, depth=1)
    assert starts(controller.on(Tick(), 100.0)) == []
    controller, _ = running(1, 20)
    done(controller, 0, 0, 1.0)
    assert starts(controller.on(Tick(), 50.0)) == []


def test_a_worker_that_does_not_answer_is_given_up_and_its_chunks_go_first():
    controller, _ = running(2, 20, first_s=100.0, give_up_after=3.0, give_up_after_s=5.0)
    assert not of_kind(controller.on(Tick(), 99.0), Abandon)
    done(controller, 1, 1, 99.0)
    actions = controller.on(Tick(), 100.0)
    assert Abandon(0) in actions and "no result in 100 s" in of_kind(actions, Say)[0].text and controller.num_lost == 1
    assert waiting(controller)[:2] == [0, 2]
    done(controller, 1, 3, 100.0)
    assert not of_kind(controller.on(Tick(), 249.0), Abandon)
    assert controller.wakes_in(249.0) == pytest.approx(1.0)
    assert Abandon(1) in controller.on(Tick(), 250.0)


def test_what_is_dropped_is_cancelled_and_later_results_of_it_are_nothing():
    controller, _ = running(1, 3)
    unwanted = [Attempt(controller.batch, chunk, 0) for chunk in chunks(2)]
    assert controller.drop(1.0) == [Cancel(attempt) for attempt in unwanted]
    assert controller.finished(controller.batch) and controller.state == "idle"
    assert starts(controller.begin(chunks(3, step=1), 2.0)) == []
    assert starts(controller.on(Done(unwanted[0]), 3.0)) == [(0, 0)]


def test_an_event_costs_no_more_with_many_workers(monkeypatch):
    """Only the worker that returned a chunk is looked at, whether or not all are there, and at the end of a batch."""
    controller, _ = running(1000, 2002)
    controller.on(Lost(999, "killed"), 0.5)
    monkeypatch.setattr(controller, "_settle", lambda now: pytest.fail("all workers are looked at"))
    monkeypatch.setattr(controller, "_members", lambda: pytest.fail("all workers are looked at"))
    for place, worker in enumerate((3, 5, 7, 9)):
        dealt = starts(done(controller, worker, worker, 1.0))
        assert [at for at, _ in dealt] == ([worker] if place < 4 else [])


def test_a_worker_that_cannot_be_reached_joins_again_under_a_new_number_if_it_answers():
    controller, _ = running(2, 8, most_losses={"died": 0, "unavailable": 0})
    actions = controller.on(Unreachable(0, "a call was lost"), 1.0)
    assert of_kind(actions, Probe) == [Probe(0, 2)] and not of_kind(actions, Spawn)
    assert waiting(controller)[:2] == [0, 2]
    assert starts(controller.on(Joined(2), 2.0)) == [(2, 0), (2, 2)]
    assert done(controller, 0, 0, 3.0) == []
    assert of_kind(controller.on(Unreachable(2, "again"), 4.0), Probe) == [Probe(2, 3)]
    assert of_kind(controller.on(Lost(3, "it was dead"), 5.0), Spawn) == [Spawn(4)]


def silent(count: int = 8, **options) -> Controller:
    """Two workers, on hosts h0 and h1, that took a second for their first chunk, and have the next since 1.0."""
    controller = Controller(2, depth=1, patience=Patience(**options))
    controller.on(Tick(), 0.0)
    for worker in (0, 1):
        controller.on(Joined(worker, f"n{worker}", f"h{worker}"), 0.0)
    controller.begin(chunks(count), 0.0)
    for worker in (0, 1):
        done(controller, worker, worker, 1.0)
    return controller


def says(actions) -> list[str]:
    return [say.text for say in of_kind(actions, Say)]


def test_who_takes_long_is_asked_for_a_sign_of_life_and_it_is_said_whether_there_was_one():
    """A chunk takes 1 s: copied after 2, so at 3.0; said 5 s after that, at 8.0, then each time it is twice as long."""
    controller = silent()  # both got a chunk at 1.0
    assert not of_kind(controller.on(Tick(), 2.9), Ask)
    assert of_kind(controller.on(Tick(), 3.0), Ask) == [Ask(0), Ask(1)]
    controller.on(Answered(1), 3.1)
    assert says(controller.on(Tick(), 7.9)) == [] and controller.num_workers == 1
    assert says(controller.on(Tick(), 8.0)) == [
        "no result for 7 s, waiting for worker 0 on h0, which does not answer and is not counted",
        "no result for 7 s, waiting for worker 1 on h1, which answers and computes",
    ]
    assert of_kind(controller.on(Tick(), 8.1), Ask) == [Ask(1)], "it may have been cut off since"
    for now in (8.2, 12.0, 14.9):
        controller.on(Answered(1), now)
        assert says(controller.on(Tick(), now)) == []
    assert "no result for 14 s, waiting for worker 0" in says(controller.on(Tick(), 15.0))[0]
    assert says(controller.on(Answered(0), 16.0)) == ["worker 0 answers again"]
    assert controller.num_workers == 2


def test_who_cannot_be_reached_gets_nothing_new_and_the_others_take_over_what_it_has():
    controller = silent(count=4)  # 0 has chunk 2, and 1 has 3
    controller.on(Tick(), 3.0)
    controller.on(Tick(), 5.0)
    controller.on(Answered(1), 5.1)
    assert controller.num_workers == 1
    assert starts(done(controller, 1, 3, 6.0)) == [(1, 2)], "a copy of what the lost host is at"
    assert of_kind(done(controller, 1, 2, 7.0), Cancel) and controller.finished(controller.batch)
    for step in range(3):
        assert starts(controller.begin(chunks(1, step=step), 8.0)) == [(1, 0)], "a worker on the lost host gets none"
        controller.on(Done(Attempt(controller.batch, chunks(1, step=step)[0], 1)), 9.0)
    assert says(done_late := controller.on(Done(Attempt(1, chunks(4)[2], 0)), 10.0)) == ["worker 0 answers again"]
    assert of_kind(done_late, Compare) and controller.num_workers == 2
    assert starts(controller.begin(chunks(2, step=4), 11.0)) == [(0, 0), (1, 1)]


def test_who_cannot_be_reached_for_long_is_replaced():
    controller = silent(unreachable_s=30.0)
    for now in (3.0, 5.0, 32.9):
        assert not of_kind(controller.on(Tick(), now), Abandon)
    actions = controller.on(Tick(), 33.0)
    assert of_kind(actions, Abandon) == [Abandon(0), Abandon(1)] and "no sign of life for 30 s" in says(actions)[-1]
    assert of_kind(actions, Spawn) == [Spawn(2), Spawn(3)] and not controller.unreachable


def test_a_run_without_a_worker_that_can_be_reached_waits_and_can_be_stopped():
    controller = silent(unreachable_s=1e9)
    assert controller.state == "computing"
    controller.on(Tick(), 3.0)
    controller.on(Tick(), 5.0)
    assert controller.state == "waiting" and controller.num_workers == 0
    controller.on(Answered(0), 6.0)
    assert controller.state == "computing" and controller.num_workers == 1


def test_too_few_that_can_be_reached_is_too_few():
    controller = Controller(2, min_workers=2, depth=1)
    controller.on(Tick(), 0.0)
    for worker in (0, 1):
        controller.on(Joined(worker), 0.0)
    controller.begin(chunks(6), 0.0)
    for worker in (0, 1):
        done(controller, worker, worker, 1.0)
    controller.on(Tick(), 3.0)
    controller.on(Answered(1), 3.1)
    controller.on(Tick(), 5.0)
    assert starts(done(controller, 1, 3, 6.0)) == []
    assert starts(controller.on(Answered(0), 7.0)) == [(1, 4)]


def test_a_first_chunk_may_take_long_before_anything_is_said_of_it():
    controller, _ = running(1, 4)
    assert says(controller.on(Tick(), 24.9)) == []
    controller.on(Tick(), 25.0)
    controller.on(Answered(0), 25.1)
    assert says(controller.on(Tick(), 29.9)) == []
    assert says(controller.on(Answered(0), 30.0)) == []
    assert "no result for 31 s, waiting for worker 0, which answers" in says(controller.on(Tick(), 30.6))[0]
