import numpy as np
import pytest
from scipy import stats

from metadist.core.measure import Measure
from metadist.evaluation.comparison import Measured, difference, unpaired

TASKS = {"data": "digits", "digest": "ab", "split": "test", "seed": 0, "ways": 5, "first_task": "cd"}
OURS, THEIRS = np.array([0.9, 0.5, 0.8, 0.6]), np.array([0.8, 0.3, 0.7, 0.4])


def run(values, metric="accuracy", **others):
    return Measured(Measure.of({metric: 0}), np.asarray(values), {**TASKS, **others})


def test_the_same_tasks_are_paired():
    """Differences 0.1, 0.2, 0.1, 0.2: mean 0.15, deviation 0.057735; Student's t with 3 degrees of freedom 3.182446."""
    found = difference(run(OURS), run(THEIRS))
    assert found.better == pytest.approx(0.15) and found.ci95 == pytest.approx(3.182446 * 0.0577350 / 2)
    assert (found.tasks, found.why, found.word) == (4, "", "ahead")
    back = difference(run(THEIRS), run(OURS))
    assert back.better == pytest.approx(-0.15) and back.word == "behind"


def test_of_a_loss_less_is_better():
    assert difference(run(OURS, "loss"), run(THEIRS, "loss")).word == "behind"


def test_fewer_tasks_are_paired_with_the_first_of_more():
    found = difference(run(OURS[:2]), run(THEIRS))
    assert found.tasks == 2 and found.better == pytest.approx(0.15)


@pytest.mark.parametrize(("others", "why"), [
    ({"seed": 1}, "seed 0 and 1"),
    ({"ways": 3, "split": "validation"}, "split test and validation, ways 5 and 3"),
    ({"digest": "xy"}, "the data's content"),
    ({"data": "other", "digest": "xy", "first_task": "zz"}, "data digits and other"),
    ({"first_task": "zz"}, "the tasks' content"),
    ({"shots": 1}, "shots None and 1"),
])  # fmt: skip
def test_other_tasks_are_not_paired_and_it_is_said_why(others, why):
    found = difference(run(OURS, **others), run(THEIRS))
    assert (found.tasks, found.why) == (0, why)
    assert found.better == pytest.approx(0.15)
    assert found.word == ("not comparable" if "digest" in others else "level")  # the pairs alone told them apart


def test_on_other_data_no_run_is_ahead_however_large_the_difference():
    ours, theirs = run(OURS + 100, digest="xy"), run(THEIRS)
    found = difference(ours, theirs)
    assert found.word == "not comparable" and found.better == pytest.approx(100.15) and found.ci95 < 1
    assert difference(run(OURS + 100, data="elsewhere"), theirs).word == "ahead"  # the same under another name


def test_sources_without_a_digest_are_told_apart_by_their_names():
    theirs = run(THEIRS, digest=None)
    assert difference(run(OURS, digest=None, data="my:Lines", first_task="zz"), theirs).word == "not comparable"
    assert difference(run(OURS, digest=None, first_task="zz"), theirs).word == "level"


def test_the_unpaired_interval_is_welchs():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(1.0, 0.3, 40), rng.normal(0.5, 0.9, 15)
    low, high = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    mean, half = unpaired(ours, theirs)
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-12)


def test_what_has_no_interval_is_unknown():
    assert difference(run([0.5, np.nan]), run([0.5, 0.4])).word == "unknown"
    assert difference(run([0.5, np.nan], seed=3), run([0.5, 0.4])).word == "unknown"
    assert difference(run([0.5]), run([0.4])).word == "unknown"
    assert np.isnan(unpaired(np.array([1.0]), np.array([1.0, 2.0])).ci95)
    assert unpaired(np.array([2.0, 2.0]), np.array([1.0, 1.0])) == (1.0, 0.0)
