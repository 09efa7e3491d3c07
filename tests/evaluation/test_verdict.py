import numpy as np
import pytest

from metadist.evaluation.verdict import compare, verdict

OWN = np.array([[0.0, 0.5], [0.0, 0.7], [0.0, 0.6], [0.0, 0.8]])


def beside(*, ahead, spread=0.01, metric="accuracy"):
    """Results in which the learner is that much ahead of its only baseline, in tasks that differ more than that."""
    noise = spread * np.array([1.0, -1.0, 1.0, -1.0])
    sign = 1 if metric == "accuracy" else -1
    return {metric: OWN, f"ridge/{metric}": OWN[:, -1] - sign * ahead + noise}


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
@pytest.mark.parametrize(("ahead", "word"), [(0.1, "ahead of"), (-0.1, "behind"), (0.005, "level with")])
def test_the_verdict_is_of_differences_within_tasks(ahead, word, metric):
    results = beside(ahead=ahead, metric=metric)
    found = compare(results)
    assert found is not None and found.baseline == "ridge" and found.tasks == 4
    # Student's t with 3 degrees of freedom, 97.5 %: 3.182446
    assert found.ahead == pytest.approx(ahead) and found.ci95 == pytest.approx(3.182446 * 0.01 * (4 / 3) ** 0.5 / 2)
    assert verdict(results).startswith(f"{word} its best baseline, ridge")


def test_the_best_baseline_is_the_one_over_which_it_is_least_ahead_on_its_own_tasks():
    """The first two tasks are hard: a mean over them alone says nothing of the four."""
    results = {"accuracy": OWN, "support_mean/accuracy": OWN[:, -1] - 0.05, "joint/accuracy": OWN[:2] - 0.02}
    found = compare(results)
    assert found is not None and (found.baseline, found.tasks) == ("joint", 2) and found.ahead == pytest.approx(0.02)


def test_what_cannot_be_compared_has_no_verdict():
    assert compare({"accuracy": OWN}) is None and "no baseline" in verdict({"accuracy": OWN})
    diverged = {"accuracy": np.array([[0.1, np.nan], [0.1, 0.5]]), "ridge/accuracy": np.array([0.5, 0.5])}
    assert verdict(diverged).startswith("no verdict")
    assert verdict({"accuracy": OWN[:1], "ridge/accuracy": OWN[:1, -1]}).startswith("no verdict")
    theirs = {"accuracy": OWN, "ridge/accuracy": np.array([np.nan, 0.5, 0.5, 0.5])}
    assert compare(theirs) is None and "ridge diverged" in verdict(theirs)


def test_a_baseline_that_is_left_out_since_its_tasks_diverged_is_named():
    """It may be the best one: in three tasks of four it is ahead."""
    best = np.array([np.nan, 0.9, 0.9, 0.9])
    told = verdict({**beside(ahead=0.1), "from_scratch/accuracy": best, "from_scratch/loss": OWN[:, -1]})
    assert told.startswith("ahead of its best baseline, ridge") and "from scratch diverged" in told
    assert "diverged" not in verdict({**beside(ahead=0.1), "from_scratch/loss": best})
