from pathlib import Path

import numpy as np
import pytest

import metadist
from metadist import Task
from metadist.data import importers
from tests.examples import ratings

JOBS = Path(__file__).resolve().parents[2] / "jobs" / "domains"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with data/ratings of 120 users, as the job's head makes it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(JOBS.parents[1]))
    ratings.write_ratings("ratings.csv", users=120)
    importers.table(
        "ratings.csv", ratings.DATA, group="user", inputs=["item"], identifiers=["item"], targets=["rating"],
        standardize=True,
    )  # fmt: skip
    cached = (ratings.training, ratings.item_offsets, ratings.factors)
    for function in cached:
        function.cache_clear()
    yield tmp_path
    for function in cached:
        function.cache_clear()


def test_ratings_are_halves_of_different_items():
    found = list(ratings.rows(7))
    assert len({item for _, item, _ in found}) == len(found) == ratings.EACH
    assert {2 * rating for _, _, rating in found} <= set(map(float, range(2, 11)))
    assert found == list(ratings.rows(7))


def test_each_row_is_solved_by_ridge_regression():
    rng = np.random.default_rng(0)
    rows, design, values = rng.integers(0, 5, 40), rng.normal(size=(40, ratings.RANK)), rng.normal(size=40)
    found = ratings._solved(rows, design, values, 6)
    for row in range(5):
        mine = design[rows == row]
        gram = mine.T @ mine + ratings.PENALTY * np.eye(ratings.RANK)
        np.testing.assert_allclose(found[row], np.linalg.solve(gram, mine.T @ values[rows == row]))
    assert not found[5].any()


def test_the_mean_of_an_item_is_shrunk_and_shifted_by_the_users_own(here):
    users, numbers, given = ratings.training()
    above = given - np.array([given[users == user].mean() for user in users])
    offset = {n: above[numbers == n].sum() / ((numbers == n).sum() + ratings.SHRINKAGE) for n in (1, 2, 3)}
    task = Task.of(np.array([1, 2]), np.array([0.5, 0.1]), np.array([3, 1]), np.zeros(2))
    own = np.mean([0.5 - offset[1], 0.1 - offset[2]])
    np.testing.assert_allclose(ratings.item_mean(task)[:, 0], [offset[3] + own, offset[1] + own])


def test_the_job_runs_and_draws_a_users_ratings(here):
    settings = [
        "meta_steps=2", "meta_batch_size=2", "evaluation.every=1", "evaluation.tasks=4", "evaluation.test_tasks=20",
        "evaluation.joint_steps=2", "tracking.mlflow=false", "run_dir=run",
    ]  # fmt: skip
    results = metadist.train(metadist.load_config([JOBS / "ratings.yaml"], settings), quiet=True)
    losses = {name: found["loss"]["mean"] for name, found in results["baselines"].items() if name != "joint"}
    assert losses["matrix_factorization"] < losses["support_mean"]
    assert (here / "run" / "ratings.png").exists()
    adapted = metadist.load(here / "run", trust_code=True).adapt({"item": ["i3", "i5"]}, [4.5, 2.0])
    with pytest.warns(UserWarning, match="categories unknown"):
        assert 0 < adapted.predict({"item": "never heard of"})[0] < 6
