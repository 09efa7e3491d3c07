import torch
from torch import nn

from metadist.models import MLP


def test_it_is_linear_layers_with_relu_between():
    torch.manual_seed(0)
    module = MLP([[3]], 2, hidden=(4, 5))
    x = torch.randn(7, 3)
    first, _, second, _ = module.body
    assert torch.equal(module(x), module.head(torch.relu(second(torch.relu(first(x))))))
    assert [layer.weight.shape for layer in (first, second, module.head)] == [(4, 3), (5, 4), (2, 5)]


def test_the_sinusoid_network_has_1761_parameters():
    assert sum(p.numel() for p in MLP([[1]], 1).parameters()) == 2 * 40 + 41 * 40 + 41


def test_several_inputs_are_flattened_and_joined_in_order_masks_as_numbers():
    module = MLP([[2, 2], [], [2]], 1, hidden=())
    nn.init.zeros_(module.head.bias)
    module.head.weight.data = torch.arange(7.0).reshape(1, 7)
    image = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])
    number, mask = torch.tensor([1, 2]), torch.tensor([[True, False], [False, True]])
    assert module(image, number, mask).tolist() == [[0 + 4 + 5], [3 + 2 * 4 + 6]]


def test_without_hidden_layers_it_is_linear():
    module = MLP([[3]], 2, hidden=())
    x = torch.randn(4, 3)
    assert torch.equal(module(x), module.head(x))


def test_an_identifier_is_the_row_of_a_table_and_joined_in_its_place():
    module = MLP([[2], [], [1]], 1, hidden=(), vocabularies=[None, 4, None], embedding=3)
    numbers, item, more = torch.randn(5, 2), torch.tensor([0, 3, 3, 1, 2]), torch.randn(5, 1)
    rows = module.embeddings["input_1"].weight[item]
    assert torch.equal(module(numbers, item, more), module.head(torch.cat([numbers, rows, more], dim=1)))
    assert module.head.in_features == 2 + 3 + 1


def test_an_unknown_identifier_begins_as_zeros_and_others_do_not():
    module = MLP([[2], [], []], 1, hidden=(), vocabularies=[None, 4, 3], embedding=3)
    zero, numbers = torch.zeros(5, dtype=torch.int64), torch.randn(5, 2)
    assert torch.equal(module(numbers, zero, zero), module.head(torch.cat([numbers, torch.zeros(5, 6)], dim=1)))
    tables = [part.weight for part in module.modules() if isinstance(part, nn.Embedding)]
    assert len(tables) == 2 and all(table[1:].all() and table.requires_grad for table in tables)
