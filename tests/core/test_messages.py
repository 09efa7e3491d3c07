import numpy as np
import pytest

from metadist.core.messages import Chunk, ChunkReport, fold, plan
from metadist.core.task import TaskId


@pytest.mark.parametrize(("tasks", "size"), [(1, 1), (7, 3), (6, 3), (3, 10), (32, 5)])
def test_a_plan_covers_every_task_once_in_order(tasks, size):
    chunks = plan("train", 4, tasks, size)
    assert [task for chunk in chunks for task in chunk.tasks] == [TaskId("train", 4, i) for i in range(tasks)]
    assert all(len(chunk.tasks) == size for chunk in chunks[:-1]) and 1 <= len(chunks[-1].tasks) <= size


def test_a_chunk_names_its_tasks():
    assert Chunk("test", 0, 3, 5).tasks == [TaskId("test", 0, 3), TaskId("test", 0, 4)]


@pytest.mark.parametrize(("losses", "norms", "bad"), [
    ([1, 2, 3], [1, 1, 1], None),
    ([1, np.nan, np.nan], [1, 1, 1], 6),
    ([1, 2, 3], [1, 1, np.inf], 7),
    ([np.inf, 2, 3], [1, 1, np.nan], 5),
])  # fmt: skip
def test_the_first_task_that_is_not_finite_is_named(losses, norms, bad):
    report = ChunkReport(Chunk("train", 2, 5, 8), np.array(losses, float), np.array(norms, float), {})
    assert report.first_not_finite() == (None if bad is None else TaskId("train", 2, bad))


def test_fold_adds_in_float64():
    rows = np.array([[2.0**24], [1.0], [1.0]], np.float32)
    assert fold([rows], 1) == 2**24 + 2
    assert rows.sum(axis=0, dtype=np.float32) != 2**24 + 2


def test_fold_adds_in_the_order_given():
    rows = [np.array([[1e16]]), np.array([[-1e16]]), np.array([[1.0]])]
    assert fold(rows, 1) == 1 and fold([rows[2], rows[0], rows[1]], 1) == 0


def test_partial_sums_and_rows_fold_to_the_same():
    rows = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    whole = fold([rows], 4)
    assert np.allclose(fold([fold([rows[:3]], 4), fold([rows[3:]], 4)], 4), whole, rtol=1e-15)
    assert np.array_equal(fold([rows[:3], rows[3:]], 4), whole)


def test_fold_leaves_what_it_is_given():
    rows = np.ones((2, 3))
    fold([rows], 3)[:] = 9
    assert (rows == 1).all()
