import math

import pytest

from metadist.core.measure import ACCURACY, LOSS, Measure


def test_a_measure_says_on_which_side_it_is_better_and_is_shown_in_its_unit():
    assert (ACCURACY.sign, LOSS.sign, Measure("return", "higher").sign) == (1, -1, 1)
    assert ACCURACY.text(0.9416, 0.0042) == "94.16 % ± 0.42" and LOSS.text(0.25) == "0.2500"
    assert ACCURACY.difference(-0.05, 0.01) == "5.00 ± 1.00 percentage points"
    assert Measure("return", "higher").difference(-2.5, math.pi) == "2.5000 ± 3.1416"


def test_results_say_their_measure_and_those_of_old_are_of_accuracy_or_the_loss():
    own = Measure("psnr_db", "higher")
    assert Measure.of({"accuracy": {}, "measure": own.saved()}) == own
    assert Measure.of({"accuracy": {}, "loss": {}}) == ACCURACY and Measure.of({"loss": {}}) == LOSS


@pytest.mark.parametrize("saved", [None, "accuracy", {"name": "accuracy"}, {"name": "a", "better": "bigger"}])
def test_what_is_no_measure_is_refused(saved):
    with pytest.raises(ValueError, match="no measure"):
        Measure.of({"measure": saved})
