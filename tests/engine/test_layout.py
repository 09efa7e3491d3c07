import numpy as np
import pytest
import torch

from metadist.engine.layout import Layout

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "scale": torch.tensor(7.0), "a": torch.arange(4.0) + 10}
LAYOUT = Layout.of(TENSORS)


def test_order_is_that_of_the_mapping():
    assert LAYOUT.names == ("b", "scale", "a") and LAYOUT.shapes == ((2, 3), (), (4,))
    assert LAYOUT.sizes == [6, 1, 4] and LAYOUT.size == 11
    assert LAYOUT.flatten(TENSORS).tolist() == [*range(6), 7, 10, 11, 12, 13]


def test_flatten_follows_the_layout_whatever_the_order_of_what_it_is_given():
    assert torch.equal(LAYOUT.flatten(dict(reversed(TENSORS.items()))), LAYOUT.flatten(TENSORS))


def test_unflatten_is_the_inverse_of_flatten():
    back = LAYOUT.unflatten(LAYOUT.flatten(TENSORS))
    assert list(back) == list(TENSORS)
    assert all(torch.equal(back[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize(("shape", "last"), [
    ((4, 3, 2, 2), torch.channels_last), ((4, 3, 2, 2, 2), torch.channels_last_3d),
])  # fmt: skip
def test_unflatten_keeps_the_memory_format_and_flatten_the_order(shape, last):
    plain = torch.arange(float(np.prod(shape))).reshape(shape)
    tensors = {"last": plain.to(memory_format=last), "plain": plain, "expanded": plain[:1].expand(shape)}
    layout = Layout.of(tensors)
    back = layout.unflatten(layout.flatten(tensors))
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert torch.equal(layout.flatten(tensors)[: plain.numel()], plain.reshape(-1))
    assert back["last"].is_contiguous(memory_format=last) and not back["last"].is_contiguous()
    assert back["plain"].is_contiguous() and back["expanded"].is_contiguous()


def test_unflatten_gives_copies():
    vector = LAYOUT.flatten(TENSORS)
    for tensor in LAYOUT.unflatten(vector).values():
        tensor.fill_(-1)
    assert torch.equal(vector, LAYOUT.flatten(TENSORS))


def test_flatten_rows_is_flatten_of_each_task():
    rows = LAYOUT.flatten_rows({name: torch.stack([tensor, 2 * tensor, -tensor]) for name, tensor in TENSORS.items()})
    flat = LAYOUT.flatten(TENSORS)
    assert torch.equal(rows, torch.stack([flat, 2 * flat, -flat]))


def test_vector_is_the_inverse_of_named_arrays():
    flat = LAYOUT.flatten(TENSORS).numpy()
    arrays = LAYOUT.named_arrays(flat)
    assert {name: array.shape for name, array in arrays.items()} == {"b": (2, 3), "scale": (), "a": (4,)}
    assert all(np.shares_memory(array, flat) for array in arrays.values())
    assert np.array_equal(LAYOUT.vector(arrays), flat)


def test_an_absent_name_or_another_shape_is_named():
    arrays = LAYOUT.named_arrays(LAYOUT.flatten(TENSORS).numpy())
    with pytest.raises(ValueError, match=r"\(3, 2\) for 'b'; the model needs shape \(2, 3\)"):
        LAYOUT.vector(arrays | {"b": arrays["b"].T})
    with pytest.raises(ValueError, match="nothing for 'a'"):
        LAYOUT.vector({"b": arrays["b"], "scale": arrays["scale"]})
