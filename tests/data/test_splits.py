import hashlib

import numpy as np
import pytest

from metadist.core.errors import InputError
from metadist.data.splits import divide, shuffled, split_named, uniforms


def test_a_split_never_changes() -> None:
    names = [f"class{n}" for n in range(50)]
    splits = divide(names, (0.64, 0.16, 0.2), seed=3)
    assert [list(splits.values()).count(split) for split in ("train", "validation", "test")] == [32, 8, 10]
    assert set(splits) == set(names)
    golden = hashlib.sha256(repr(sorted(splits.items())).encode()).hexdigest()[:16]
    assert golden == "eb17f1a1077f867f"
    assert divide(reversed(names), (0.64, 0.16, 0.2), seed=3) == splits
    assert divide(names, (0.64, 0.16, 0.2), seed=4) != splits


def test_draws_never_change() -> None:
    draws = uniforms("x", 7, 1000)
    assert draws.dtype == np.float64 and 0 <= draws.min() < draws.max() < 1
    assert hashlib.sha256(draws.astype("<f8").tobytes()).hexdigest()[:16] == "e42bf8da2edabfd4"
    np.testing.assert_array_equal(uniforms("x", 7, 10), draws[:10])
    assert shuffled("abcde", 0) == list("dacbe")


@pytest.mark.parametrize(
    ("count", "fractions", "counts"),
    [(3, (0.64, 0.16, 0.2), (1, 1, 1)), (10, (1.0, 0.0, 0.0), (10, 0, 0)), (7, (0.5, 0.0, 0.5), (4, 0, 3))],
)
def test_no_split_asked_for_is_empty(count: int, fractions: tuple[float, ...], counts: tuple[int, ...]) -> None:
    splits = list(divide([str(n) for n in range(count)], fractions, seed=0).values())
    assert tuple(splits.count(split) for split in ("train", "validation", "test")) == counts


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.5, 0.4, 0.2), (1.2, -0.2, 0.0)])
def test_fractions_must_sum_to_one(fractions: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="sum to 1"):
        divide(["a", "b", "c"], fractions, seed=0)


def test_too_few_groups_are_refused() -> None:
    with pytest.raises(InputError, match="2 groups cannot fill 3 splits"):
        divide(["a", "b"], (0.64, 0.16, 0.2), seed=0)


def test_names_of_splits() -> None:
    assert [split_named(text) for text in ("train", " Val", "valid", "test", "other")] == [
        "train",
        "validation",
        "validation",
        "test",
        None,
    ]
