import math
import sys
import threading
from itertools import islice

import numpy as np
import pytest

from metadist.core.random import Draws, ManyDraws
from metadist.core.task import TaskId

MASK = 2**64 - 1
HOME = TaskId("train", 0, 0)
GOLDEN = {
    (0, HOME, 0): [0x2F4BA6408E4D89B, 0x3DD62B0B9CA8C5B2, 0x1C8667A55D902E79],
    (1, HOME, 0): [0x4DB6A27B756282DF, 0xD944FA03BABE0E2F, 0x27F872E577060D32],
    (0, TaskId("validation", 0, 0), 0): [0x57994A7DB8F816C6, 0x93967384228B3028, 0x162ED305C3FE6350],
    (0, TaskId("test", 0, 0), 0): [0xDE227EDFF3DC0EFC, 0x9C4FDBAF8FC5D354, 0xFF5E7FC4264184F4],
    (0, TaskId("train", 1, 0), 0): [0xA4C5607FB1206F77, 0x10435EC58BDFF201, 0x1ECD83886EC6CA79],
    (0, TaskId("train", 0, 1), 0): [0x363C6D54F81BA26E, 0x372E02C93DE0B01E, 0xC182A0E88E99B6D5],
    (0, HOME, 1): [0xD037F8C3F9A1D176, 0xC057419B4C210765, 0xABF13115117B0065],
    (2**63, TaskId("train", 59999, 31), 2): [0x9C279BA8E1A00C33, 0xE53818C6657AFC7A, 0x7F34123EF5AC16C4],
}


def philox(key: list[int], counter: list[int]) -> list[int]:
    """Philox4x64-10 as Salmon et al. 2011 write it."""
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [
            (second >> 64) ^ counter[1] ^ key[0],
            second & MASK,
            (first >> 64) ^ counter[3] ^ key[1],
            first & MASK,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & MASK, (key[1] + 0xBB67AE8584CAA73B) & MASK]
    return counter


@pytest.mark.parametrize(("key", "words"), GOLDEN.items(), ids=str)
def test_words_stay_what_they_were(key, words):
    draws = Draws(*key)
    assert [draws.word() for _ in words] == words


@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_words_are_the_published_cipher_of_key_and_counter(key):
    seed, task, stream = key
    split = ["train", "validation", "test"].index(task.split)
    blocks = [philox([seed, stream], [n, task.index, task.step, split]) for n in range(1, 60)]
    draws = Draws(*key)
    assert [draws.word() for _ in range(59 * 4)] == [word for block in blocks for word in block]


def stream(seed: int, task: TaskId, stream: int, count: int) -> list[int]:
    """numpy's own words for a key."""
    counter = [0, task.index, task.step, ["train", "validation", "test"].index(task.split)]
    return np.random.Philox(key=[seed, stream], counter=counter).random_raw(count).tolist()


@pytest.mark.parametrize("count", [1, 63, 64, 65, 129, 1000])
def test_any_number_of_words_are_numpys_stream(count):
    for key in GOLDEN:
        draws = Draws(*key)
        assert [draws.word() for _ in range(count)] == stream(*key, count)


def test_interleaved_draws_do_not_disturb_one_another():
    keys = list(GOLDEN)[:3]
    draws = [Draws(*key) for key in keys]
    words = [[each.word() for each in draws] for _ in range(200)]
    assert [list(own) for own in zip(*words, strict=True)] == [stream(*key, 200) for key in keys]


def test_threads_do_not_disturb_one_another():
    found: dict[int, list[list[int]]] = {}
    count, together = 65, threading.Barrier(4)

    def draw(place: int) -> None:
        together.wait()
        tasks = [TaskId("train", place, index) for index in range(300)]
        found[place] = [[words() for _ in range(count)] for words in (Draws(0, task).word for task in tasks)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=draw, args=(place,)) for place in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for place in range(4):
        assert found[place] == [stream(0, TaskId("train", place, index), 0, count) for index in range(300)]


MANY = [TaskId(split, step, index) for split in ("train", "test") for step in (0, 70) for index in (0, 3, 2**40)]


@pytest.mark.parametrize("most", [1, 2, 50, 2**32 - 1, 2**32, 2**62])
def test_integers_of_many_tasks_are_those_of_each(most):
    sizes = np.random.default_rng(0).integers(1, most, (len(MANY), 3, 40), endpoint=True)
    sizes[0, 0] = most
    drawn = ManyDraws(2**63, MANY, 120).below(sizes)
    for task, own, numbers in zip(MANY, sizes, drawn, strict=True):
        draws = Draws(2**63, task)
        assert numbers.dtype == np.int64
        assert numbers.ravel().tolist() == [draws.below(int(n)) for n in own.ravel()]


@pytest.mark.parametrize("most", [25, 200, 10**12])
def test_choices_of_many_tasks_are_those_of_each(most):
    """As two sources draw: some sets of their own, and two sets of which first each one's support, then its query."""
    sizes = np.random.default_rng(0).integers(25, most, (len(MANY), 2), endpoint=True)
    many = ManyDraws(5, MANY, 6 + 2 * 25)
    groups, rows = many.choose(np.full((len(MANY), 1), 30), 6), many.choose(sizes, 9, 16)
    assert rows.shape == (len(MANY), 2, 25)
    for place, task in enumerate(MANY):
        draws = Draws(5, task)
        assert groups[place].tolist() == [draws.choose(30, 6)]
        orders = [draws.shuffle(int(n)) for n in sizes[place]]
        supports = [list(islice(order, 9)) for order in orders]
        assert rows[place].tolist() == [a + list(islice(order, 16)) for a, order in zip(supports, orders, strict=True)]


def test_one_tasks_draws_do_not_depend_on_what_was_drawn_for_another():
    other = Draws(3, TaskId("train", 5, 1))
    alone = [Draws(3, TaskId("train", 5, 0)).choose(100, 100) for _ in range(2)]
    mine = Draws(3, TaskId("train", 5, 0))
    mixed = []
    for step in mine.shuffle(100):
        other.uniform(7)
        mixed.append(step)
    assert alone[0] == alone[1] == mixed


def test_draws_do_not_touch_numpys_global_generator():
    np.random.seed(0)
    before = np.random.random()
    np.random.seed(0)
    Draws(0, HOME).normal(100)
    assert np.random.random() == before


def test_every_part_of_the_key_changes_the_words():
    keys = [
        (seed, TaskId(split, step, index), stream)
        for seed in (0, 1, 2)
        for split in ("train", "validation", "test")
        for step in (0, 1, 2)
        for index in (0, 1, 2)
        for stream in (0, 1, 2)
    ]
    words = {word for key in keys for word in islice(iter(Draws(*key).word, None), 4)}
    assert len(words) == 4 * len(keys)


def test_below_reaches_every_number_of_its_range_and_no_other():
    draws = Draws(0, HOME)
    assert {draws.below(7) for _ in range(500)} == set(range(7))
    assert {draws.below(1) for _ in range(10)} == {0}


def test_choose_gives_distinct_numbers_of_the_range():
    draws = Draws(1, HOME)
    for n, k in [(1, 1), (5, 5), (10, 3), (10**12, 20), (3, 0)]:
        chosen = draws.choose(n, k)
        assert len(chosen) == len(set(chosen)) == k and all(0 <= i < n for i in chosen)


def test_choose_is_uniform_over_ordered_selections():
    counts: dict[tuple[int, ...], int] = {}
    trials = 12000
    for index in range(trials):
        chosen = tuple(Draws(0, TaskId("train", 0, index)).choose(5, 3))
        counts[chosen] = counts.get(chosen, 0) + 1
    expected = trials / 60
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert len(counts) == 60
    assert chi_square < 59 + 4 * math.sqrt(2 * 59)


def test_a_longer_choice_begins_with_the_shorter_one():
    assert Draws(0, HOME).choose(50, 20)[:6] == Draws(0, HOME).choose(50, 6)


def test_uniform_lies_in_the_unit_interval_with_its_moments():
    values = Draws(0, HOME).uniform(20000)
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 1 / 2) < 4 / math.sqrt(12 * 20000)
    assert abs((values**2).mean() - 1 / 3) < 4 * math.sqrt(4 / 45 / 20000)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_normal_gives_as_many_as_asked(count):
    assert Draws(0, HOME).normal(count).shape == (count,)


def test_normal_has_the_moments_of_a_standard_normal():
    values = Draws(0, HOME).normal(20000)
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 4 / math.sqrt(20000)
    assert abs((values**2).mean() - 1) < 4 * math.sqrt(2 / 20000)
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96 / 20000)
