import pytest
import torch

from metadist.models import Conv4


@pytest.mark.parametrize(("shape", "pool", "features"), [
    ([1, 28, 28], False, 64),
    ([1, 8, 8], False, 64),
    ([1, 3, 3], False, 64),
    ([1, 28, 28], True, 64),
    ([3, 84, 84], True, 64 * 25),
    ([3, 16, 32], True, 64 * 2),
])  # fmt: skip
def test_every_shape_of_image_gives_one_row_of_outputs(shape, pool, features):
    module = Conv4([shape], 5, pool=pool)
    assert module.head.weight.shape == (5, features)
    assert module(torch.randn(2, *shape)).shape == (2, 5)


def test_the_omniglot_network_has_the_papers_parameters():
    """Finn et al. 2017: four blocks of 64 filters, 2x2 strides, batch normalisation."""
    count = sum(p.numel() for p in Conv4([[1, 28, 28]], 5).parameters())
    assert count == (9 * 64 + 3 * (9 * 64 * 64)) + 4 * 64 + 4 * 2 * 64 + 65 * 5


def test_a_pooled_image_too_small_names_the_remedy():
    with pytest.raises(ValueError, match="16x16 or more, these are 15x28: set pool=false"):
        Conv4([[1, 15, 28]], 5, pool=True)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="'batch' or 'group', not 'layer'"):
        Conv4([[1, 28, 28]], 5, norm="layer")


@pytest.mark.parametrize("pool", [False, True])
def test_group_norm_treats_each_image_alone_and_batch_norm_does_not(pool):
    torch.manual_seed(0)
    x = torch.randn(4, 1, 16, 16, dtype=torch.float64)
    group, batch = (Conv4([[1, 16, 16]], 3, 16, pool, norm).double() for norm in ("group", "batch"))
    assert torch.allclose(group(x)[:1], group(x[:1]), atol=1e-12)
    assert not torch.allclose(batch(x)[:1], batch(torch.cat([x[:1], x[:1] + 1]))[:1], atol=1e-3)


def test_batch_norm_uses_the_batch_at_hand_and_keeps_nothing():
    module = Conv4([[1, 8, 8]], 3, 8).double()
    assert list(module.buffers()) == []
    normalised = module.body[0].norm(torch.randn(5, 8, 4, 4, dtype=torch.float64) * 3 + 2)
    assert torch.allclose(normalised.mean(dim=(0, 2, 3)), torch.zeros(8, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(normalised.var(dim=(0, 2, 3), unbiased=False), torch.ones(8, dtype=torch.float64), atol=1e-4)


def test_the_strided_head_sees_the_mean_of_the_last_map():
    module = Conv4([[1, 40, 40]], 3, 8)
    x = torch.randn(2, 1, 40, 40)
    assert module.body(x).shape == (2, 8, 3, 3)
    assert torch.equal(module(x), module.head(module.body(x).mean(dim=(2, 3))))


def test_no_channels_are_refused_as_what_they_are():
    with pytest.raises(ValueError, match="channels=0 must be 1 or more"):
        Conv4([[1, 28, 28]], 5, channels=0)
