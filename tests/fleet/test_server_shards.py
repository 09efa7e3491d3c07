"""theta cut over several servers: the same bits as on one, wherever it is cut."""

import math

import numpy as np
import pytest

from metadist.core.errors import Diverged
from metadist.core.messages import Chunk, ChunkReport, Weights, fold
from metadist.fleet.actors import join_weights
from metadist.fleet.local import LocalExecutor
from metadist.fleet.recovery import ShardedServer
from metadist.fleet.server import BLOCK, Optimization, Server, Shard, Stats, block_sums, root, slices

SIZE = 3 * BLOCK + 17
OPTIMIZATIONS = {
    "adam": Optimization(meta_lr=0.05),
    "adamw, clipped": Optimization(optimizer="adamw", meta_lr=0.05, weight_decay=0.1, clip_norm=2.0, clip_value=1.5),
    "sgd, clipped": Optimization(optimizer="sgd", meta_lr=0.1, momentum=0.9, clip_norm=3.0),
    "with statistics": Optimization(meta_lr=0.05, clip_norm=2.0, statistics=BLOCK + 30, statistics_rate=0.2),
}


class Sharded:
    """A `ShardedServer` on shards in this process, given and returning plain values."""

    def __init__(self, theta: np.ndarray, optimization: Optimization, count: int, state=None):
        self.executor, self.pieces = LocalExecutor(lambda: None), slices(len(theta), count)
        self.server = ShardedServer(self.executor, theta, optimization, state, count)
        self.snapshot = self.server.snapshot

    def results(self, chunks) -> list[list]:
        """Each chunk as a bundle of its own."""
        return [
            [self.executor.put([report]), *(self.executor.put([gradient[..., piece]]) for piece in self.pieces)]
            for report, gradient in chunks
        ]

    def apply(self, step: int, *chunks, num_tasks: int | None = None) -> tuple[Weights, Stats]:
        refs, stats = self.server.apply(step, *self.results(chunks), num_tasks=num_tasks)
        assert len(refs) == len(self.pieces)
        return join_weights(self.executor.get(refs))[0], stats


def parts(*chunks) -> list[list]:
    """What a shard takes: reports and gradients of one bundle."""
    return [[report for report, _ in chunks], [gradient for _, gradient in chunks]]


def chunks(step: int, kind: str = "rows", size: int = SIZE) -> list[tuple[ChunkReport, np.ndarray]]:
    """Seven tasks in chunks of 3, 3 and 1."""
    rows = np.random.default_rng(step).normal(size=(7, size)).astype(np.float32)
    made = []
    for start, stop in ((0, 3), (3, 6), (6, 7)):
        own = rows[start:stop]
        norms = np.sqrt((own.astype(np.float64) ** 2).sum(axis=1))
        report = ChunkReport(Chunk("train", step, start, stop), np.arange(start, stop, dtype=float), norms, {})
        made.append((report, own if kind == "rows" else fold([own], size)))
    return made


def theta() -> np.ndarray:
    return np.random.default_rng(9).normal(size=SIZE).astype(np.float32)


@pytest.mark.parametrize("count", [2, 3, 9])
@pytest.mark.parametrize("kind", ["rows", "sums"])
@pytest.mark.parametrize("name", OPTIMIZATIONS)
def test_theta_and_statistics_are_those_of_one_server_to_the_bit(name, kind, count):
    one, many = Server(theta(), OPTIMIZATIONS[name]), Sharded(theta(), OPTIMIZATIONS[name], count)
    for step in range(3):
        whole, stats = one.apply(step, *chunks(step, kind), num_tasks=7)
        parts, same = many.apply(step, *chunks(step, kind), num_tasks=7)
        assert parts.version == whole.version and parts.theta.tobytes() == whole.theta.tobytes()
        assert np.array(same).tobytes() == np.array(stats).tobytes()  # NaN included


@pytest.mark.parametrize("name", OPTIMIZATIONS)
def test_a_run_goes_on_with_another_number_of_servers_to_the_same_bits(name):
    optimization, weights = OPTIMIZATIONS[name], Weights(0, theta())
    one, state = Server(theta(), optimization), None
    for step, count in enumerate([2, 3, 1, 4]):
        server = Sharded(weights.theta, optimization, count, state)
        weights, _ = server.apply(step, *chunks(step))
        state = server.snapshot()
        expected, _ = one.apply(step, *chunks(step))
        assert weights.theta.tobytes() == expected.theta.tobytes()
        assert repr(state) == repr(one.snapshot())


def test_theta_is_cut_between_blocks_into_nearly_equal_parts():
    assert slices(5, 3) == [slice(0, 5)]
    assert slices(BLOCK + 1, 2) == [slice(0, BLOCK), slice(BLOCK, BLOCK + 1)]
    for count in (1, 2, 3, 4, 9):
        found = slices(SIZE, count)
        assert len(found) == min(count, 4) and (found[0].start, found[-1].stop) == (0, SIZE)
        assert all(a.stop == b.start and a.stop % BLOCK == 0 for a, b in zip(found, found[1:], strict=False))


def test_the_norm_of_a_small_theta_is_the_plain_one():
    values = np.random.default_rng(0).normal(size=BLOCK)
    assert root(block_sums(np.square(values))) == float(np.sqrt(np.sum(np.square(values))))
    assert math.isclose(root(block_sums(np.square(theta()))), np.linalg.norm(theta().astype(np.float64)), rel_tol=1e-6)


def test_clipping_by_norm_scales_every_shard_alike():
    optimization = Optimization(optimizer="sgd", meta_lr=1.0, clip_norm=1e-3)
    moved, _ = Sharded(np.zeros(SIZE), optimization, 4).apply(0, *chunks(0))
    assert math.isclose(np.linalg.norm(moved.theta), 1e-3, rel_tol=1e-9)


def test_a_shard_goes_through_an_applied_step_again_without_moving():
    server = Sharded(theta(), OPTIMIZATIONS["adam"], 2)
    first, stats = server.apply(0, *chunks(0))
    again, same = server.apply(0, *chunks(0)[:1])
    assert again.theta.tobytes() == first.theta.tobytes() and same == stats
    assert server.apply(1, *chunks(1))[0].version == 2


def test_a_shard_goes_through_a_folded_step_again_to_the_same_bits():
    """As where the answer to a call is lost on the way and the end of the step is sent once more."""
    once, twice = (Shard(theta(), OPTIMIZATIONS["adam"]) for _ in range(2))
    for shard, times in ((once, 1), (twice, 2)):
        shard.take(0, True, *parts(*chunks(0)[:2]))
        for _ in range(times):
            folded = shard.fold(0, False, 7, *parts(chunks(0)[2]))
        shard.move(0, folded, shard.attempt(0, folded))
    assert once.weights().theta.tobytes() == twice.weights().theta.tobytes()


def test_a_shard_takes_nothing_of_a_step_that_it_has_not_begun():
    """Not even what continues the tasks of the step before, as where the first part of a larger one is lost."""
    shard = Shard(theta(), OPTIMIZATIONS["adam"])
    shard.take(0, True, *parts(*chunks(0)[:2]))
    folded = shard.fold(0, False, 6)
    shard.move(0, folded, shard.attempt(0, folded))
    with pytest.raises(ValueError, match="needs training task 0 next"):
        shard.take(1, False, *parts(chunks(1)[2]))


def test_every_shard_refuses_missing_tasks_and_moving_before_folding():
    shard = Shard(np.zeros(SIZE), OPTIMIZATIONS["adam"])
    with pytest.raises(ValueError, match="needs training task 0 next"):
        shard.take(0, True, *parts(chunks(0)[1]))
    shard.take(0, False, *parts(chunks(0)[0]))
    with pytest.raises(ValueError, match="needs 7 tasks; got 3"):
        shard.fold(0, False, 7)
    with pytest.raises(ValueError, match="have not been folded"):
        shard.attempt(0)
    with pytest.raises(ValueError, match="it has not been tried"):
        shard.move(0)
    with pytest.raises(ValueError, match="it cannot apply step 1"):
        shard.take(1, True)
    assert (shard.weights().theta == 0).all()


def test_what_is_not_finite_stops_every_shard():
    bad = chunks(0)
    bad[1][0].norms[2] = math.inf
    server = Sharded(theta(), OPTIMIZATIONS["adam"], 2)
    with pytest.raises(Diverged, match="train:0:5"):
        server.apply(0, *bad)
    assert server.apply(0, *chunks(0))[0].version == 1  # the chunk was computed again


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("place", [0, 2 * BLOCK + 5, SIZE - 1])
def test_no_shard_moves_where_one_would_not_stay_finite(count, place):
    """The element named is that of all of theta."""
    server, other = (Sharded(np.ones(SIZE, np.float32), Optimization(), count) for _ in range(2))
    for each in (server, other):
        each.apply(0, *chunks(0))
    report, rows = chunks(1)[0]
    rows = rows.copy()
    rows[1, place] = 1e22
    with pytest.raises(Diverged, match="the optimizer's exp_avg_sq infinite") as raised:
        server.apply(1, (report, rows))
    assert raised.value.element == place
    assert server.snapshot()["step"] == 1 and all(
        part.version == 1 for part in server.executor.get(server.server.weights())
    )
    kept, expected = (each.apply(1, *chunks(1))[0].theta for each in (server, other))
    assert np.array_equal(kept, expected)
