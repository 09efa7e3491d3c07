from pathlib import Path

import numpy as np
import pytest

import metadist.data.importers.sinusoid  # noqa: F401  (modules must not hide the functions of the same name)
from metadist.core.errors import InputError
from metadist.data import importers, open_dataset


def test_digits_are_disjoint_classes_of_bright_ink(tmp_path: Path) -> None:
    dataset = open_dataset(importers.digits(tmp_path / "set"), verify=True)
    assert len(dataset.splits["train"].group_names) == 4 * 8 - 1
    assert dataset.splits["train"].counts.sum() == 8 * 723 - 180
    groups = {s: sorted({name[0] for name in table.group_names}) for s, table in dataset.splits.items()}
    assert groups == {"train": ["3", "4", "7", "9"], "validation": ["2", "6", "8"], "test": ["0", "1", "5"]}
    assert sum(table.num_rows for table in dataset.splits.values()) == 1797 + 7 * 723 - 180
    images = dataset.splits["train"].gather(np.arange(100)).inputs[0]
    assert images.shape == (100, 1, 8, 8) and images.min() == 0 and images.max() == 1
    other = open_dataset(importers.digits(tmp_path / "other", seed=1))
    assert other.splits["test"].group_names != groups["test"]


def test_sinusoids_are_sines_of_the_papers_family(tmp_path: Path) -> None:
    dataset = open_dataset(importers.sinusoid(tmp_path / "set", groups=(300, 2, 3), points=40), verify=True)
    assert dataset.kind == "values"
    assert [table.num_rows for table in dataset.splits.values()] == [12000, 80, 120]
    train = dataset.splits["train"]
    x = train.column("x").reshape(300, 40).astype(float)
    y = train.column("y").reshape(300, 40)
    assert -5 <= x.min() < -4.9 and 4.9 < x.max() <= 5
    amplitudes, phases = [], []
    for inputs, outputs in zip(x, y, strict=True):  # A sin(x - p) = A cos(p) sin(x) - A sin(p) cos(x)
        basis = np.stack([np.sin(inputs), -np.cos(inputs)], axis=1)
        solution, residual, *_ = np.linalg.lstsq(basis, outputs, rcond=None)
        assert residual < 1e-9
        amplitudes.append(np.hypot(*solution))
        phases.append(np.arctan2(solution[1], solution[0]))
    assert 0.1 <= min(amplitudes) < 0.3 and 4.8 < max(amplitudes) <= 5
    assert -1e-6 <= min(phases) < 0.1 and 3.0 < max(phases) <= np.pi + 1e-6


def test_a_larger_family_extends_a_smaller_one(tmp_path: Path) -> None:
    small = open_dataset(importers.sinusoid(tmp_path / "small", groups=(5, 0, 2), points=7)).splits["train"]
    large = open_dataset(importers.sinusoid(tmp_path / "large", groups=(9, 0, 2), points=7)).splits["train"]
    np.testing.assert_array_equal(large.column("y")[:35], small.column("y"))


@pytest.mark.parametrize("asked", [{"groups": (0, 0, 0)}, {"groups": (1, 2)}, {"points": 0}])
def test_impossible_families_are_refused(tmp_path: Path, asked: dict) -> None:
    with pytest.raises(InputError, match="three numbers of groups"):
        importers.sinusoid(tmp_path / "set", **asked)
    assert list(tmp_path.iterdir()) == []
