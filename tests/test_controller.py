import random

import pytest

from metadist.controller import (
    Assign,
    Controller,
    Done,
    Joined,
    Lost,
    Retire,
    Say,
    Spawn,
    Target,
    Tick,
    TooManyLosses,
    Waiting,
    cut_deals,
)
from metadist.messages import Chunk, plan


def chunks(count: int, step: int = 0) -> list[Chunk]:
    return plan("train", step, count, 1)


def starts(actions) -> list[tuple[int, int]]:
    """(worker, first task) of every chunk assigned."""
    return [(action.worker, action.chunk.start) for action in actions if isinstance(action, Assign)]


def of_kind(actions, kind: type) -> list:
    return [action for action in actions if isinstance(action, kind)]


def running(target: int, count: int, **options) -> tuple[Controller, list]:
    """A controller whose workers have all joined, with a batch under way; and its assignments so far."""
    controller = Controller(target, **options)
    actions = [*controller.begin([], 0.0)]
    for action in of_kind(actions, Spawn):
        controller.on(Joined(action.worker), 0.0)
    return controller, starts(controller.begin(chunks(count), 0.0))


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
    assert starts(controller.on(Done(1, chunks(6)[1]), 1.0)) == [(1, 4)]
    assert starts(controller.on(Done(1, chunks(6)[3]), 2.0)) == [(1, 5)]
    assert starts(controller.on(Done(1, chunks(6)[4]), 3.0)) == []


def test_a_batch_is_finished_when_every_chunk_is_returned():
    controller, dealt = running(2, 4)
    for worker, start in dealt:
        assert not controller.finished
        controller.on(Done(worker, chunks(4)[start]), 1.0)
    assert controller.finished
    assert starts(controller.begin(chunks(4, step=1), 2.0)) == [(0, 0), (1, 1), (0, 2), (1, 3)]


def test_a_batch_does_not_begin_before_the_last_one_is_finished():
    controller, _ = running(1, 2)
    with pytest.raises(AssertionError):
        controller.begin(chunks(2, step=1), 1.0)


def test_a_lost_workers_chunks_are_dealt_first_and_in_order():
    controller, _ = running(2, 8)
    actions = controller.on(Lost(0, "killed"), 1.0)
    assert Spawn(2) in actions
    assert [chunk.start for chunk in controller.queue] == [0, 2, 4, 5, 6, 7]
    assert starts(controller.on(Joined(2), 2.0)) == [(2, 0), (2, 2)]


def test_a_loss_is_said_with_its_reason():
    controller, _ = running(2, 8)
    (said,) = of_kind(controller.on(Lost(0, "out of memory"), 1.0), Say)
    assert "worker 0 was lost (out of memory)" in said.text


def test_a_replacement_has_a_number_that_was_never_used():
    controller, _ = running(2, 8)
    numbers = [0, 1]
    for worker in (0, 1, 2):
        (spawn,) = of_kind(controller.on(Lost(worker, "killed"), 1.0), Spawn)
        numbers.append(spawn.worker)
        controller.on(Joined(spawn.worker), 1.0)
    assert numbers == [0, 1, 2, 3, 4]


def test_a_worker_lost_before_it_joined_is_replaced():
    controller = Controller(1)
    controller.begin(chunks(2), 0.0)
    assert of_kind(controller.on(Lost(0, "no memory"), 1.0), Spawn) == [Spawn(1)]
    assert starts(controller.on(Joined(0), 2.0)) == []
    assert starts(controller.on(Joined(1), 2.0)) == [(1, 0), (1, 1)]


def test_what_a_lost_worker_still_returns_is_not_taken():
    controller, _ = running(2, 4)
    controller.on(Lost(0, "killed"), 1.0)
    before = set(controller.remaining)
    assert controller.on(Done(0, chunks(4)[0]), 2.0) == []
    assert controller.remaining == before


def test_a_second_loss_of_a_worker_and_a_second_return_of_a_chunk_are_nothing():
    controller, _ = running(2, 4)
    controller.on(Lost(0, "killed"), 1.0)
    assert controller.on(Lost(0, "killed"), 1.0) == []
    controller.on(Done(1, chunks(4)[1]), 2.0)
    queue = list(controller.queue)
    assert controller.on(Done(1, chunks(4)[1]), 2.0) == [] and list(controller.queue) == queue


def test_a_higher_target_spawns_the_difference():
    controller, _ = running(2, 20)
    assert controller.on(Target(4), 1.0) == [Spawn(2), Spawn(3)]
    assert starts(controller.on(Joined(2), 2.0)) == [(2, 4), (2, 5)]


def test_a_lower_target_retires_the_newest_once_they_hold_nothing():
    controller, _ = running(3, 20)
    assert controller.on(Target(1), 1.0) == []
    assert starts(controller.on(Done(2, chunks(20)[2]), 2.0)) == []
    assert controller.on(Done(2, chunks(20)[5]), 3.0) == [Retire(2)]
    controller.on(Done(1, chunks(20)[1]), 4.0)
    assert controller.on(Done(1, chunks(20)[4]), 5.0) == [Retire(1)]
    assert controller.num_workers == 1
    assert starts(controller.on(Done(0, chunks(20)[0]), 6.0)) == [(0, 6)]


def test_a_lower_target_retires_idle_workers_and_those_still_starting_at_once():
    controller, _ = running(3, 0)
    controller.on(Target(5), 1.0)
    controller.on(Joined(3), 1.0)
    assert sorted(controller.on(Target(2), 2.0)) == [Retire(2), Retire(3), Retire(4)]
    assert set(controller.in_flight) == {0, 1} and not controller.starting
    assert controller.on(Joined(4), 3.0) == [] and controller.num_workers == 2


def test_a_raised_target_keeps_workers_that_were_about_to_retire():
    controller, _ = running(2, 20)
    controller.on(Target(1), 1.0)
    assert starts(controller.on(Target(2), 2.0)) == []
    assert starts(controller.on(Done(1, chunks(20)[1]), 3.0)) == [(1, 4)]


def test_nothing_is_dealt_below_min_workers_and_it_is_said_every_notice_s():
    controller = Controller(2, min_workers=2, notice_s=10)
    controller.begin(chunks(4), 0.0)
    assert controller.on(Joined(0), 1.0) == []
    assert controller.on(Tick(), 9.9) == []
    assert controller.on(Tick(), 10.0) == [Waiting(1, 2, paused=True)]
    assert controller.on(Tick(), 19.9) == []
    assert of_kind(controller.on(Tick(), 20.0), Waiting)
    assert starts(controller.on(Joined(1), 25.0)) == [(0, 0), (1, 1), (0, 2), (1, 3)]
    assert controller.on(Tick(), 60.0) == []


def test_a_run_that_goes_on_with_fewer_workers_says_so_a_sixth_as_often():
    controller, _ = running(2, 20, notice_s=10)
    controller.on(Lost(0, "killed"), 1.0)
    assert controller.on(Tick(), 60.9) == []
    assert controller.on(Tick(), 61.0) == [Waiting(1, 2, paused=False)]


def test_a_run_that_falls_below_min_workers_pauses_and_goes_on():
    controller, _ = running(2, 8, min_workers=2)
    controller.on(Lost(0, "killed"), 1.0)
    assert starts(controller.on(Done(1, chunks(8)[1]), 2.0)) == []
    assert starts(controller.on(Joined(2), 3.0)) == [(2, 0), (1, 2), (2, 4)]


def test_a_target_below_min_workers_is_what_the_user_wants():
    controller, _ = running(2, 8, min_workers=2)
    controller.on(Target(1), 1.0)
    controller.on(Done(1, chunks(8)[1]), 2.0)
    controller.on(Done(1, chunks(8)[3]), 3.0)
    assert starts(controller.on(Done(0, chunks(8)[0]), 4.0)) == [(0, 4)]
    assert controller.on(Tick(), 100.0) == []


def test_no_one_is_told_to_wait_when_nothing_is_to_do():
    controller = Controller(1, notice_s=10)
    controller.begin([], 0.0)
    assert controller.on(Tick(), 100.0) == []


def lose(controller: Controller, times: list[float]) -> None:
    for worker, now in enumerate(times):
        controller.on(Lost(worker, f"reason {worker}"), now)


def test_too_many_losses_within_the_window_end_the_run_with_the_last_reason():
    controller, _ = running(1, 4, max_losses=3, window_s=100)
    with pytest.raises(TooManyLosses, match="5 workers were lost within 100 s, the last one because: reason 4"):
        lose(controller, [0, 20, 40, 60, 80])


def test_losses_spread_over_time_do_not_end_the_run():
    controller, _ = running(1, 4, max_losses=3, window_s=100)
    lose(controller, [0, 40, 80, 120, 160, 200, 240])
    assert not controller.finished and controller.starting == {7}


@pytest.mark.parametrize("seed", range(300))
def test_whatever_happens_every_chunk_is_returned_exactly_once(seed):
    """Random losses, joins, targets and repeated returns; a worker's chunks come back in the order it got them."""
    draw = random.Random(seed)
    controller = Controller(draw.randint(1, 4), draw.randint(1, 2), depth=draw.randint(1, 3), max_losses=10**9)
    spawned: list[int] = []
    working: dict[int, list[Chunk]] = {}
    retired: set[int] = set()
    returned: list[Chunk] = []
    late: list[Done] = []

    def carry_out(actions) -> None:
        for action in actions:
            match action:
                case Spawn(worker):
                    assert worker not in working and worker not in spawned
                    spawned.append(worker)
                case Assign(worker, chunk):
                    assert worker not in retired and len(working[worker]) < controller.depth
                    working[worker].append(chunk)
                case Retire(worker):
                    assert not working.pop(worker, [])
                    retired.add(worker)
                case Say():
                    pass

    def happen(now: float, calm: bool) -> None:
        waiting = [w for w in spawned if w not in working and w not in retired]
        busy = [w for w, held in working.items() if held]
        kind = draw.choices(["join", "done", "lose", "target", "late", "tick"], [4, 8, *[0 if calm else 1] * 4])[0]
        if kind == "join" and waiting:
            worker = draw.choice(waiting)
            working[worker] = []
            carry_out(controller.on(Joined(worker), now))
        elif kind == "done" and busy:
            worker = draw.choice(busy)
            done = Done(worker, working[worker].pop(0))
            late.append(done)
            returned.append(done.chunk)
            carry_out(controller.on(done, now))
        elif kind == "lose" and (waiting or working):
            worker = draw.choice([*waiting, *working])
            late.extend(Done(worker, chunk) for chunk in working.pop(worker, []))
            retired.add(worker)
            carry_out(controller.on(Lost(worker, "chance"), now))
        elif kind == "target":
            carry_out(controller.on(Target(draw.randint(2, 5)), now))
        elif kind == "late" and late:
            remaining = set(controller.remaining)
            carry_out(controller.on(draw.choice(late), now))
            assert controller.remaining == remaining
        else:
            carry_out(controller.on(Tick(), now))

    if controller.target < controller.min_workers:
        carry_out(controller.on(Target(2), 0.0))
    for step in range(3):
        batch = chunks(draw.randint(1, 15), step)
        returned.clear()
        carry_out(controller.begin(batch, 100.0 * step))
        for moment in range(2000):
            if controller.finished:
                break
            happen(100.0 * step + moment / 100, calm=moment > 200)
        assert controller.finished
        assert sorted(returned) == batch
        late.clear() if draw.random() < 0.5 else None


@pytest.mark.parametrize(("count", "workers"), [(0, 2), (1, 3), (8, 2), (100, 7), (512, 128), (4096, 128)])
def test_deals_hold_every_chunk_once_in_order_and_get_smaller(count, workers):
    deals = cut_deals(chunks(count), workers)
    assert [chunk for deal in deals for chunk in deal] == chunks(count)
    sizes = [len(deal) for deal in deals]
    assert sizes == sorted(sizes, reverse=True) and max(sizes, default=1) <= 8
    assert all(size == 1 for size in sizes[-2 * workers :]) or count % workers


def test_few_chunks_are_dealt_one_by_one():
    assert [len(deal) for deal in cut_deals(chunks(8), 4)] == [1] * 8
    assert [len(deal) for deal in cut_deals(chunks(8), 2)] == [2, 2, 1, 1, 1, 1]


def test_an_event_costs_no_more_with_many_workers():
    """Of workers that have all joined, only the one that returned a chunk is looked at."""
    controller, dealt = running(1000, 4000)
    assert len(dealt) == 2000
    for worker, start in dealt[:2]:
        assert starts(controller.on(Done(worker, chunks(4000)[start]), 1.0)) == [(worker, 2000 + start)]
