import pytest
import torch

from metadist.models import ResNet12


@pytest.mark.parametrize(("shape", "channels"), [
    ([3, 84, 84], (2, 3, 4, 5)),
    ([1, 16, 16], (2, 3, 4, 5)),
    ([3, 17, 30], (2, 3, 4, 5)),
    ([2, 4, 5], (4, 6)),
])  # fmt: skip
def test_every_shape_of_image_gives_one_row_of_outputs(shape, channels):
    module = ResNet12([shape], 5, channels)
    x = torch.randn(2, *shape)
    assert module(x).shape == (2, 5) and module.features(x).shape == (2, channels[-1])
    assert module.body(x).shape == (2, channels[-1], shape[1] >> len(channels), shape[2] >> len(channels))
    assert torch.equal(module(x), module.head(module.features(x)))


def test_the_literatures_network_has_its_parameters():
    """Lee et al. 2019: widths 64, 160, 320, 640; about 12.4 million parameters before the classifier."""

    def block(before: int, after: int) -> int:
        convolutions = 9 * before * after + 2 * (9 * after * after)
        return convolutions + before * after + 4 * 2 * after

    body = block(3, 64) + block(64, 160) + block(160, 320) + block(320, 640)
    with torch.device("meta"):
        module = ResNet12([[3, 84, 84]], 5)
    assert sum(p.numel() for p in module.parameters()) == body + 641 * 5
    assert 12.35e6 < body < 12.5e6


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_block_is_three_convolutions_beside_a_shortcut(norm):
    torch.manual_seed(0)
    block = ResNet12([[2, 8, 8]], 3, (8, 8), norm).body[0].double()
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    slope = torch.nn.LeakyReLU(0.1)
    one, two, three, beside = block.norms
    inner = slope(two(block.convs[1](slope(one(block.convs[0](x))))))
    expected = torch.nn.MaxPool2d(2)(slope(three(block.convs[2](inner)) + beside(block.shortcut(x))))
    assert torch.allclose(block(x), expected, rtol=1e-12)


def test_images_that_the_poolings_would_swallow_are_refused():
    with pytest.raises(ValueError, match="4 poolings leave nothing of 15x84 images: use conv4"):
        ResNet12([[3, 15, 84]], 5, (2, 2, 2, 2))
    ResNet12([[3, 16, 16]], 5, (2, 2, 2, 2))


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="'batch' or 'group', not 'layer'"):
        ResNet12([[3, 16, 16]], 5, (2, 2), "layer")
