import torch

from metadist.models import Bag


def bag() -> Bag:
    torch.manual_seed(0)
    return Bag([[6], [6]], 3, vocabulary_size=20, embedding=8, hidden=8).double()


TOKENS = torch.tensor([[5, 7, 9, 0, 0, 0], [1, 2, 3, 4, 5, 6]])
MASK = torch.tensor([[True, True, True, False, False, False], [True] * 6])


def test_masked_tokens_do_not_matter():
    other = torch.where(MASK, TOKENS, 13)
    assert torch.equal(bag()(TOKENS, MASK), bag()(other, MASK))
    assert not torch.equal(bag()(TOKENS, MASK), bag()(other, torch.ones_like(MASK)))


def test_the_order_of_tokens_and_the_padding_do_not_matter():
    short = bag()(TOKENS[:1, [2, 0, 1]], MASK[:1, :3])
    assert torch.allclose(short, bag()(TOKENS, MASK)[:1], atol=1e-12)


def test_the_number_of_repeats_matters():
    ones = torch.ones(1, 3, dtype=torch.bool)
    a, b = bag()(torch.tensor([[1, 1, 2]]), ones), bag()(torch.tensor([[1, 2, 2]]), ones)
    assert not torch.allclose(a, b, atol=1e-6)


def test_a_text_without_tokens_has_finite_outputs_and_gradients():
    module = bag()
    module(TOKENS, torch.zeros_like(MASK)).sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in module.parameters())


def test_it_averages_then_normalises_then_applies_one_hidden_layer():
    module = bag()
    mean = torch.stack([module.embedding.weight[[5, 7, 9]].mean(dim=0), module.embedding.weight[1:7].mean(dim=0)])
    assert torch.allclose(module(TOKENS, MASK), module.head(module.body(mean)), atol=1e-12)
