import math

import pytest
import torch

from metadist.errors import InputError
from metadist.losses import accuracy, cross_entropy, mean_squared_error


def test_cross_entropy_is_the_mean_over_examples_in_nats():
    outputs = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], dtype=torch.float64))
    expected = -(math.log(0.25) + math.log(0.8)) / 2
    assert math.isclose(float(cross_entropy(outputs, torch.tensor([1, 1]))), expected)


def test_cross_entropy_of_equal_logits_is_log_n():
    assert math.isclose(float(cross_entropy(torch.zeros(6, 5, dtype=torch.float64), torch.arange(6) % 5)), math.log(5))


def test_mean_squared_error_is_the_mean_over_examples_and_values():
    outputs = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert float(mean_squared_error(outputs, torch.tensor([[1.0, 0.0], [0.0, 4.0]]))) == (4 + 9) / 4


def test_several_targets_are_joined_in_order():
    outputs = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    scalar, vector = torch.tensor([0.0, 4.0]), torch.tensor([[2.0, 3.0], [5.0, 3.0]])
    assert math.isclose(float(mean_squared_error(outputs, scalar, vector)), (1 + 9) / 6, rel_tol=1e-6)


def test_a_target_without_a_value_axis_is_not_broadcast():
    """[n, 1] minus [n] would be [n, n]."""
    assert float(mean_squared_error(torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 2.0]))) == 0


def test_integer_targets_are_regressed_in_the_outputs_type():
    loss = mean_squared_error(torch.tensor([[1.5], [2.0]], dtype=torch.float64), torch.tensor([1, 2]))
    assert loss.dtype == torch.float64 and float(loss) == 0.125


def test_accuracy_is_the_fraction_of_largest_logits():
    outputs = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])
    assert float(accuracy(outputs, torch.tensor([1, 1, 1, 0]))) == 0.75


def test_a_model_with_other_than_the_targets_values_is_refused():
    with pytest.raises(InputError, match="the model gives 1 values for an example, its targets are 2"):
        mean_squared_error(torch.zeros(3, 1), torch.zeros(3, 2))
