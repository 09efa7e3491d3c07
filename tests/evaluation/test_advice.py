from dataclasses import replace

import pytest

from metadist.core.measure import ACCURACY, LOSS
from metadist.evaluation.advice import MOST, RULES, Facts, advise

# 60, 80, 88 and 89 % before and after each of three inner steps: the last gains 0.01 of 0.29, less than a twentieth
QUIET = Facts(
    measure=ACCURACY, baseline="logistic_regression", curve=[0.60, 0.80, 0.88, 0.89], ci95=0.005, inner_lr=0.1,
    validation=[(100, 0.85, 0.02), (200, 0.900, 0.02), (300, 0.902, 0.02), (400, 0.901, 0.02)], meta_steps=400,
    groups=900, columns=(0.9, 1.1), evaluate="EVALUATE", train="TRAIN", resume="RESUME",
)  # fmt: skip


def advice(**changes) -> list[str]:
    return advise(replace(QUIET, **changes))


def the_only(found: list[str]) -> str:
    assert len(found) == 1
    return found[0]


def test_where_no_rule_applies_meta_learning_may_be_the_wrong_tool():
    assert all(rule(QUIET) == "" for rule in RULES)
    assert "wrong tool" in the_only(advice()) and "logistic regression" in advice()[0]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"validation": [(100, 0.9, 0.02), (200, 0.8, 0.02)]}, "training was short (200 meta-steps)"),
        ({"validation": [], "meta_steps": 299}, "training was short (299 meta-steps)"),
        ({"validation": [(300, 0.90, 0.02), (600, 0.901, 0.02)]}, "the last validation was the best one"),
        ({"validation": [], "meta_steps": 300}, ""),
        ({"validation": [(300, 0.90, 0.02), (600, 0.899, 0.02)]}, ""),
    ],
)
def test_a_run_that_was_short_or_still_improved_is_no_reason_to_give_up(changes, why):
    found = the_only(advice(**changes))
    assert ("wrong tool" in found) == (not why) and found.startswith(why)
    assert ("`RESUME meta_steps=" in found) == bool(why)


def test_where_one_model_of_all_rows_is_as_good_it_may_do():
    for standing in ("level with", "behind"):
        assert f"is {standing} one model of all training rows, used as it is (pooled): one model for all may do" in (
            the_only(advice(pooled=standing))
        )
    assert "shifted by a task's own examples" in advice(pooled="behind", measure=LOSS)[0]
    assert "one model" not in the_only(advice(pooled="ahead of")) + the_only(advice(pooled=""))


def test_what_the_numbers_do_not_tell_can_still_be_tried():
    found = the_only(advice(groups=66, pictures=True))
    for told in ("more classes or groups in training (now 66)", "`metadist learners`", "`--size` at import"):
        assert told in found
    other = the_only(advice(groups=None))
    assert "--size" not in other and "(now" not in other and "`metadist learners`" in other


@pytest.mark.parametrize(
    ("columns", "speaks"),
    [
        ((0.9, 1.1), False), ((0.03, 1.4), False), (None, False),
        ((0.02, 1.1), True), ((0.5, 192.0), True), ((5.0, 12.0), True),
    ],
)  # fmt: skip
def test_columns_of_unlike_sizes_are_to_be_standardized(columns, speaks):
    """0.02 is less than a fiftieth of 1.1; 0.5 beside 192 is a blood test's table; 12 is more than 10."""
    assert ("--standardize" in advice(columns=columns)[0]) == speaks


def test_adaptation_that_gets_worse_is_stopped_at_its_best():
    assert "`EVALUATE evaluation.inner_steps=2`" in the_only(advice(curve=[0.6, 0.8, 0.88, 0.87]))
    assert "wrong tool" in the_only(advice(curve=[0.6, 0.8, 0.88, 0.876]))  # within the interval


def test_adaptation_that_only_hurts_takes_a_smaller_rate():
    found = the_only(advice(curve=[0.6, 0.5, 0.4]))
    assert "`EVALUATE evaluation.inner_lr=0.01`" in found and "`TRAIN learner.inner_lr=0.01`" in found
    learned = the_only(advice(curve=[0.6, 0.5, 0.4], inner_lr=None, smaller_rates="learner.highest_rate=0.01"))
    assert "inner_lr" not in learned and "`TRAIN learner.highest_rate=0.01`" in learned


def test_adaptation_that_goes_to_and_fro_takes_a_smaller_rate():
    found = advice(curve=[0.6, 0.8, 0.7, 0.82])
    assert "to and fro" in found[0] and "`EVALUATE evaluation.inner_lr=0.01`" in found[0]


def test_adaptation_that_still_gains_takes_more_steps():
    """0.88 to 0.91 is a tenth of what there was to gain from 0.60."""
    assert "`EVALUATE evaluation.inner_steps=6`" in the_only(advice(curve=[0.6, 0.8, 0.88, 0.91]))
    assert "`EVALUATE evaluation.inner_steps=5`" in the_only(advice(curve=[0.6, 0.8]))


def test_adaptation_that_changes_nothing_takes_larger_steps():
    assert "`TRAIN learner.inner_lr=1`" in the_only(advice(curve=[0.60, 0.601, 0.602]))
    assert "learner.inner_lr" not in advice(curve=[0.60, 0.601, 0.602], inner_lr=None)[0]


def test_validation_that_still_rises_takes_more_meta_steps():
    """From step 200, the second of four, to the end by 3 points, with an interval of 2."""
    rising = [(100, 0.85, 0.02), (200, 0.87, 0.02), (300, 0.89, 0.02), (400, 0.90, 0.02)]
    found = the_only(advice(validation=rising))
    assert "3.0 percentage points from step 200 to 400" in found and "`RESUME meta_steps=1200`" in found
    assert "wrong tool" in the_only(advice(validation=rising[3:]))
    flat = [(step, 0.9 - 0.001 * step / 100, 0.02) for step, *_ in rising]
    assert "wrong tool" in the_only(advice(validation=flat))


def test_a_loss_is_better_where_it_is_lower():
    falling = [(50, 4.0, 0.5), (100, 3.0, 0.5), (150, 2.5, 0.5), (200, 2.0, 0.5)]
    quiet = {"measure": LOSS, "curve": [4.0, 2.0, 1.2, 1.1], "ci95": 0.05, "validation": []}
    assert "wrong tool" in the_only(advice(**quiet))
    assert "by 1 from step 100" in the_only(advice(**quiet | {"validation": falling}))
    assert "inner_steps=2" in the_only(advice(**quiet | {"curve": [4.0, 2.0, 1.2, 1.4]}))
    assert "smaller inner rate" in the_only(advice(**quiet | {"curve": [4.0, 5.0, 9.0]}))


def test_gradient_steps_that_a_simple_learner_beats_give_way_to_a_closed_form():
    found = the_only(advice(closed_form="learner.name=protonet learner.inner_lr=null"))
    assert "`TRAIN learner.name=protonet learner.inner_lr=null`" in found and "logistic regression" in found
    assert "wrong tool" in the_only(
        advice(closed_form="learner.name=protonet", descends=False, inner_lr=None, curve=[0.8])
    )


def test_few_classes_are_named_beside_what_can_be_done_with_them():
    few, data = advice(groups=31, closed_form="learner.name=r2d2")
    assert "31 training classes" in few and "`TRAIN learner.name=r2d2`" in few
    assert "data of more of them" in data and "31" in data
    assert data.endswith("until then use a model fitted to each task's own examples") and "regression" not in data
    assert advice(groups=31, baseline="pooled")[-1].endswith("until then use one model of all training rows")
    scratch = the_only(advice(baseline="from_scratch"))
    assert "from scratch" not in scratch and "tasks: a model fitted to each task's own examples does as well" in scratch
    assert "wrong tool" in the_only(advice(groups=50)) and "wrong tool" in the_only(advice(groups=None))


def test_the_most_telling_advice_comes_first_and_it_is_not_too_much():
    found = advice(
        columns=(0.5, 192.0), curve=[0.6, 0.8], closed_form="learner.name=r2d2", groups=5,
        validation=[(1, 0.1, 0.01), (2, 0.9, 0.01)],
    )  # fmt: skip
    assert len(found) == MOST
    assert ["--standardize" in found[0], "inner_steps" in found[1], "meta_steps" in found[2]] == [True] * 3
