import numpy as np
import pytest

from metadist.core.measure import Measure
from metadist.evaluation import verdict as judging


def compare(results):
    return judging.compare(results, Measure.of(results))


def compare_with(baseline, results):
    return judging.compare_with(baseline, results, Measure.of(results))


def verdict(results):
    return judging.verdict(results, Measure.of(results))


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


def test_a_baseline_of_a_few_easy_tasks_is_not_the_best_where_another_solves_these_better():
    """from_scratch has 0.6 and 0.9 on the two tasks it was trained on, ridge 0.7 and 0.9 there and 0.1 elsewhere."""
    own = np.array([0.5, 0.8, 0.3, 0.2])
    results = {
        "accuracy": own[:, None], "ridge/accuracy": np.array([0.7, 0.9, 0.1, 0.1]),
        "support_mean/accuracy": np.array([0.4, 0.5, 0.1, 0.1]), "from_scratch/accuracy": np.array([0.6, 0.9]),
    }  # fmt: skip
    found = compare(results)
    assert found is not None and (found.baseline, found.tasks) == ("ridge", 4)
    assert found.ahead == pytest.approx(own.mean() - 0.45)


def test_a_baseline_of_fewer_tasks_is_the_best_where_it_is_better_there_beyond_the_interval():
    """Leads of 0.03 and 0.03 in two tasks are sure, 0.01 and 0.05 (the same mean) are not, nor is one task."""
    results = {"accuracy": OWN, "support_mean/accuracy": OWN[:, -1] - 0.05, "joint/accuracy": OWN[:2] - 0.02}
    found = compare(results)
    assert found is not None and (found.baseline, found.tasks) == ("joint", 2) and found.ahead == pytest.approx(0.02)
    for theirs in (OWN[:2, -1] - [0.04, 0.0], OWN[:1, -1]):
        found = compare(results | {"joint/accuracy": theirs})
        assert found is not None and (found.baseline, found.tasks) == ("support_mean", 4)


def test_of_a_loss_the_baseline_that_is_lower_is_the_best():
    losses = {"loss": OWN, "support_mean/loss": OWN[:, -1] + 0.2, "ridge/loss": OWN[:, -1] + 0.1}
    found = compare(losses | {"from_scratch/loss": OWN[:2, -1] + 0.3})
    assert found is not None and found.baseline == "ridge" and found.ahead == pytest.approx(0.1)
    found = compare(losses | {"from_scratch/loss": OWN[:2, -1]})
    assert found is not None and (found.baseline, found.tasks) == ("from_scratch", 2)


def test_any_baseline_can_be_compared_with_by_name():
    results = {"loss": OWN, "pooled/loss": OWN[:, -1] - [0.1, 0.2, 0.1, 0.2], "ridge/loss": OWN[:, -1] - 1}
    found = compare_with("pooled", results)
    assert found is not None and found.ahead == pytest.approx(-0.15) and found.standing == "behind"
    assert compare_with("joint", results) is None
    assert compare_with("ridge", results | {"ridge/loss": np.array([np.nan, 1, 1, 1])}) is None


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
