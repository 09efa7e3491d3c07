import math

import pytest
import torch

from metadist.core.errors import InputError
from metadist.models.losses import accuracy, confidence, cross_entropy, mean_squared_error, never


def test_cross_entropy_is_the_mean_over_examples_in_nats():
    outputs = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], dtype=torch.float64))
    expected = -(math.log(0.25) + math.log(0.8)) / 2
    assert math.isclose(float(cross_entropy(outputs, torch.tensor([1, 1]))), expected)


def test_cross_entropy_of_equal_logits_is_log_n():
    assert math.isclose(float(cross_entropy(torch.zeros(6, 5, dtype=torch.float64), torch.arange(6) % 5)), math.log(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("examples", "ways"), [(5, 5), (75, 5), (100, 20), (1, 2)])
def test_cross_entropy_under_vmap_is_torchs_to_the_bit(examples, ways, dtype):
    """Of losses, and of the gradients after a step by them."""
    draw = torch.Generator().manual_seed(examples)
    inputs = torch.randn(6, examples, 3, dtype=dtype, generator=draw)
    target = torch.randint(ways, (6, examples), generator=draw)
    weights = torch.randn(3, ways, dtype=dtype, generator=draw)

    def adapted(loss):
        def gradient(weights, inputs, target):
            inner = torch.func.grad(lambda weights: loss(inputs @ weights, target))(weights)
            return loss(inputs @ (weights - 0.1 * inner), target)

        return torch.func.vmap(torch.func.grad_and_value(gradient), (None, 0, 0))(weights, inputs, target)

    own, torchs = adapted(cross_entropy), adapted(torch.nn.functional.cross_entropy)
    assert torch.equal(own[0], torchs[0]) and torch.equal(own[1], torchs[1])


def test_cross_entropy_under_vmap_refuses_what_torch_refuses_and_takes_what_it_takes():
    batched = torch.func.vmap(cross_entropy)
    with pytest.raises((RuntimeError, ValueError), match="batch_size"):
        batched(torch.zeros(2, 6, 3), torch.zeros(2, 4, dtype=torch.long))
    for label in (-1, -100, 3):
        with pytest.raises(InputError, match=f"label {label} is none of the model's 3 outputs"):
            batched(torch.zeros(2, 6, 3), torch.full((2, 6), label))
    logits, pixels = torch.randn(2, 6, 3, 5), torch.randint(3, (2, 6, 5))
    assert torch.equal(batched(logits, pixels), torch.func.vmap(torch.nn.functional.cross_entropy)(logits, pixels))
    shares = logits.softmax(dim=2)
    assert torch.equal(batched(logits, shares), torch.func.vmap(torch.nn.functional.cross_entropy)(logits, shares))


def test_mean_squared_error_under_vmap_is_torchs():
    """Its gradient to the bit, the derivative of that to rounding."""
    draw = torch.Generator().manual_seed(0)
    outputs, targets, along = (torch.randn(6, 7, 3, generator=draw) for _ in range(3))

    def gradients(loss):
        first = torch.func.grad(loss)
        return torch.func.vmap(first)(outputs, targets), torch.func.vmap(
            torch.func.grad(lambda outputs, targets, along: (first(outputs, targets) * along).sum())
        )(outputs, targets, along)

    own, torchs = gradients(mean_squared_error), gradients(torch.nn.functional.mse_loss)
    assert torch.equal(own[0], torchs[0])
    torch.testing.assert_close(own[1], along * 2 / 21, rtol=1e-6, atol=0)
    torch.testing.assert_close(own[1], torchs[1], rtol=1e-6, atol=0)


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
    with pytest.raises(InputError, match="the model gives values for 6 examples, and there are targets of 5"):
        mean_squared_error(torch.zeros(6, 1), torch.zeros(5, 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("measure", [accuracy, confidence])
def test_what_is_not_finite_is_no_accuracy(measure, bad):
    """argmax of NaN is class 0: a diverged task would have the accuracy of chance."""
    outputs = torch.tensor([[5.0, 1.0], [2.0, 1.0]])
    assert measure(outputs, torch.tensor([0, 0])).isfinite()
    outputs[1, 1] = bad
    assert measure(outputs, torch.tensor([0, 0])).isnan()
    batched = torch.func.vmap(measure)(torch.stack([outputs, torch.ones(2, 2)]), torch.zeros(2, 2, dtype=torch.long))
    assert batched.isnan().tolist() == [True, False]


@pytest.mark.parametrize("label", [-100, -1, 2, 7])
def test_a_label_outside_the_outputs_is_named(label):
    with pytest.raises(InputError, match=f"label {label} is none of the model's 2 outputs: .* from 0 to 1"):
        cross_entropy(torch.zeros(3, 2), torch.tensor([0, label, 1]))


def test_classes_that_are_absent_have_no_probability_and_no_derivative():
    logits = torch.tensor([[0.5, 9.0, -0.25]], dtype=torch.float64, requires_grad=True)
    loss = cross_entropy(never(logits, torch.tensor([True, False, True])), torch.tensor([2]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.75)), rel=1e-14)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    share = math.exp(0.75) / (1 + math.exp(0.75))
    assert gradient[0].tolist() == pytest.approx([share, 0, -share], rel=1e-14) and gradient[0, 1] == 0
    (second,) = torch.autograd.grad(gradient[0, 0], logits)
    assert second[0].tolist() == pytest.approx([share * (1 - share), 0, -share * (1 - share)], rel=1e-12)
