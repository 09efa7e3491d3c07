import pytest

from metadist.core.errors import InputError
from metadist.models import MODELS
from metadist.run.plugins import call, resolve


@pytest.mark.parametrize(("name", "sentence"), [
    ("nothing_here:Thing", "No module named 'nothing_here'"),
    ("torch.nn:Lineear", "'Lineear'"),
    ("conv", "did you mean conv4?"),
    ("Conv4", "did you mean conv4?"),
])  # fmt: skip
def test_what_a_name_does_not_resolve_to_is_said(name, sentence):
    with pytest.raises(InputError) as raised:
        resolve(name, MODELS)
    assert sentence in str(raised.value)


def test_a_module_that_is_not_found_says_where_to_run():
    with pytest.raises(InputError, match="PYTHONPATH"):
        resolve("nothing_here:Thing")


def sized(width: int, share: float = 0.5, on: bool = False) -> tuple[int, float, bool]:
    return width, share, on


def test_true_and_false_are_no_numbers():
    assert call("it", sized, {"width": "3", "share": 1, "on": True}) == (3, 1.0, True)
    for options in ({"width": True}, {"width": 1, "share": False}):
        with pytest.raises(InputError, match="it: (width|share)"):
            call("it", sized, options)


def test_what_cannot_be_called_is_said():
    with pytest.raises(InputError, match="it is a int"):
        call("it", 3, {})  # pyright: ignore[reportArgumentType]
