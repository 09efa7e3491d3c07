import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from metadist import MAML, Engine, Model
from metadist.models.layers import BatchNorm, Conv3x3, normalisation
from metadist.models.losses import mean_squared_error

SHAPES = [(5, 3, 2, 2), (4, 2), (3, 2, 5)]


def arguments(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x with a mean and a scale of its own, weight, bias."""
    torch.manual_seed(seed)
    kind = {"dtype": torch.float64}
    return 3 * torch.randn(shape, **kind) + 2, torch.randn(shape[1], **kind), torch.randn(shape[1], **kind)


LAYERS = {channels: BatchNorm(channels) for channels in (2, 3)}


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.func.functional_call(LAYERS[len(weight)], {"weight": weight, "bias": bias}, (x,))


def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True)


def by_hand(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    over = [axis for axis in range(x.dim()) if axis != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    centred = x - x.mean(over, keepdim=True)
    rstd = (centred.square().mean(over, keepdim=True) + 1e-5).rsqrt()
    return centred * rstd * weight.view(shape) + bias.view(shape)


def scalar(norm, *given: Tensor) -> Tensor:
    """Something curved of the normalised values."""
    normalised = torch.tanh(norm(*given))
    return (normalised * torch.linspace(-1, 1, given[0].numel(), dtype=torch.float64).view_as(normalised)).sum()


def products(norm, given: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hessian-vector products, reverse over reverse."""

    def directional(*at: Tensor) -> Tensor:
        gradient = torch.func.grad(lambda *inner: scalar(norm, *inner), argnums=(0, 1, 2))(*at)
        return sum((g * v).sum() for g, v in zip(gradient, along, strict=True))

    return torch.func.grad(directional, argnums=(0, 1, 2))(*given)


def close(ones, others) -> bool:
    return all(torch.allclose(one, other, rtol=1e-9, atol=1e-11) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_is_torchs(shape):
    given = arguments(shape)
    assert torch.allclose(ours(*given), theirs(*given), rtol=1e-12)
    grad = [torch.func.grad(lambda *at, norm=norm: scalar(norm, *at), argnums=(0, 1, 2)) for norm in (ours, theirs)]
    assert close(grad[0](*given), grad[1](*given))


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norms_derivatives_are_those_of_finite_differences(shape):
    given = tuple(value.requires_grad_() for value in arguments(shape))
    assert gradcheck(ours, given)
    assert gradgradcheck(ours, given)


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norms_second_derivatives_are_torchs(shape):
    given, along = arguments(shape), arguments(shape, seed=1)
    expected = products(theirs, given, along)
    assert close(products(ours, given, along), expected)
    assert close(products(by_hand, given, along), expected)


@pytest.mark.parametrize("batched", [(0, 0, 0), (None, 0, 0), (0, None, None), (None, 0, None)])
def test_batch_norm_under_vmap_is_one_call_after_the_other(batched):
    many = [torch.stack(values) for values in zip(*(arguments((5, 3, 2, 2), seed) for seed in range(3)), strict=True)]
    given = [values if axis == 0 else values[0] for values, axis in zip(many, batched, strict=True)]
    along = arguments((5, 3, 2, 2), seed=9)

    def everything(*at: Tensor) -> tuple[Tensor, ...]:
        gradient = torch.func.grad(lambda *inner: scalar(ours, *inner), argnums=(0, 1, 2))(*at)
        return ours(*at), *gradient, *products(ours, at, along)

    together = torch.func.vmap(everything, batched)(*given)
    for t in range(3):
        alone = everything(*(values[t] if axis == 0 else values for values, axis in zip(given, batched, strict=True)))
        assert close([values[t] for values in together], alone)


def test_batch_norm_keeps_the_memory_format_and_its_own_epsilon():
    x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    assert BatchNorm(3)(x).is_contiguous(memory_format=torch.channels_last)
    small = 1e-3 * torch.randn(4, 3, 5, 5)
    assert torch.allclose(BatchNorm(3, eps=0.1)(small), F.batch_norm(small, None, None, training=True, eps=0.1))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("size", "stride", "bias"), [
    ((6, 6), 1, True), ((7, 5), 2, True), ((1, 3), 2, False), ((6, 6), 2, False), ((7, 5), 1, False),
])  # fmt: skip
def test_a_3x3_convolution_is_torchs(channels, size, stride, bias):
    torch.manual_seed(0)
    layer = Conv3x3(channels, 5, stride, bias).double()
    plain = nn.Conv2d(channels, 5, 3, stride=stride, padding=1, bias=bias).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(3, channels, *size, dtype=torch.float64, requires_grad=True)
    assert layer(x).shape == plain(x).shape
    assert torch.allclose(layer(x), plain(x), rtol=1e-12, atol=1e-12)
    for images in (x, x.detach()):
        first, second = [], []
        for each in (layer, plain):
            given = [images, *each.parameters()][not images.requires_grad :]
            gradient = torch.autograd.grad(torch.tanh(each(images)).square().sum(), given, create_graph=True)
            first.append(gradient)
            second.append(torch.autograd.grad(sum(part.sin().sum() for part in gradient), given))
        assert close(*first) and close(*second)


@pytest.mark.parametrize("needed", ["x", "weight", "bias", "x weight", "x bias", "weight bias", "x weight bias"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_3x3_convolutions_derivatives_are_those_of_finite_differences(stride, needed):
    torch.manual_seed(0)
    layer = Conv3x3(4, 3, stride).double()
    given = {"x": torch.randn(2, 4, 3, 5, dtype=torch.float64), "weight": layer.weight, "bias": layer.bias}
    given = {name: value.detach().requires_grad_(name in needed.split()) for name, value in given.items()}

    def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.tanh(torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,)))

    assert gradcheck(convolved, tuple(given.values()))
    assert gradgradcheck(convolved, tuple(given.values()))


@pytest.mark.parametrize("batched", [(0, 0, 0), (None, 0, 0), (0, None, None), (None, 0, None)])
def test_a_3x3_convolution_under_vmap_is_one_call_after_the_other(batched):
    torch.manual_seed(0)
    layer = Conv3x3(4, 6, 2).double()
    sizes = (2, 4, 5, 3), (6, 4, 3, 3), (6,)
    given = [
        torch.randn(*([3] if axis == 0 else []), *size).double() for axis, size in zip(batched, sizes, strict=True)
    ]

    def everything(*at: Tensor) -> tuple[Tensor, ...]:
        def curved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return torch.tanh(torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))).sum()

        first = torch.func.grad(curved, (0, 1, 2))
        second = torch.func.grad(lambda *inner: sum(part.sin().sum() for part in first(*inner)), (0, 1, 2))
        return *first(*at), *second(*at)

    together = torch.func.vmap(everything, batched)(*given)
    for t in range(3):
        alone = everything(*(values[t] if axis == 0 else values for values, axis in zip(given, batched, strict=True)))
        assert close([values[t] for values in together], alone)


def test_a_3x3_convolution_takes_one_image_and_autocast_as_torchs_does():
    layer, x = Conv3x3(4, 5).double(), torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.grad(layer(x[0]).sum(), [x, layer.weight])
    assert type(layer(x).grad_fn).__name__ == "_ConvolutionBackward"
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 as it is
        assert type(layer(x).grad_fn).__name__ == "ConvolutionBackward0"


def test_a_3x3_convolutions_weights_keep_the_format_that_its_images_have():
    engine = Engine(MAML(model=Model(Conv3x3(8, 8)), loss=mean_squared_error, inner_lr=0.1))
    theta = engine.initial_theta()
    weight = engine.layout.unflatten(theta)["weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert torch.equal(engine.layout.flatten({"weight": weight, "bias": theta[-8:]}), theta)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_convolution_of_few_channels_begins_channels_last_memory(channels):
    maps = Conv3x3(channels, 8)(torch.randn(2, channels, 6, 6))
    assert maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()
    assert Conv3x3(8, 8)(BatchNorm(8)(maps)).is_contiguous(memory_format=torch.channels_last)


def test_group_norm_takes_any_memory_format():
    x = torch.randn(2, 16, 3, 3)
    norm = normalisation("group", 16)
    assert torch.allclose(norm(x.to(memory_format=torch.channels_last)), F.group_norm(x, 8), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_takes_running_statistics_and_notes_its_own(shape):
    x, weight, bias = arguments(shape)
    layer, own = BatchNorm(shape[1]), [torch.zeros(shape[1], dtype=x.dtype), torch.ones(shape[1], dtype=x.dtype)]
    layer.noted = []
    torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
    F.batch_norm(x, *own, weight, bias, training=True, momentum=1.0)
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(layer.noted[0], own, strict=True))
    layer.running = own[0] + 1, own[1] * 2
    found = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
    assert torch.allclose(found, F.batch_norm(x, *layer.running, weight, bias, training=False), rtol=1e-9)
