from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from metadist.core.errors import InputError
from metadist.data import Dataset, open_dataset
from metadist.data.importers import table

PART = {"a": "train", "b": "train", "c": "validation", "d": "test", "e": "train"}
ROWS = [
    ("a", "m1"), ("a", "m2"), ("a", "m3"), ("b", "m2"), ("b", "m4"), ("b", "m5"), ("c", "m3"), ("c", "m4"), ("c", "m6"),
    ("d", "m5"), ("d", "m6"), ("d", "m7"), ("e", "m5"), ("e", "m3"),
]  # fmt: skip
KEPT = {"a": ["m1", "m2"], "b": ["m2"], "c": ["m3", "m4"], "d": ["m5", "m6", "m7"]}


def imported(tmp_path: Path, name: str, rows: list[tuple[str, str | None]] = ROWS, **asked: Any) -> Dataset:
    groups, molecules = zip(*rows, strict=True)
    content = {
        "group": groups, "molecule": molecules, "part": [PART[group] for group in groups],
        "x": [float((molecule or "m0")[1:]) for molecule in molecules], "y": [0.5 * n for n in range(len(rows))],
        "word": [f"{group} {molecule}" for group, molecule in rows],
    }  # fmt: skip
    pa.parquet.write_table(pa.table(content), tmp_path / "source.parquet", row_group_size=4)
    known: dict[str, Any] = {"group": "group", "inputs": ["x"], "targets": ["y"], "split_column": "part"}
    return open_dataset(table(tmp_path / "source.parquet", tmp_path / name, **known | asked), verify=True)


def molecules(dataset: Dataset) -> dict[str, list[str]]:
    """Those of each group, by its input, which is the molecule's number."""
    found: dict[str, list[str]] = {}
    for split in dataset.splits.values():
        x = split.gather(np.arange(split.num_rows)).inputs[0]
        for name, start, count in zip(split.group_names, split.starts, split.counts, strict=True):
            found[name] = [f"m{number:.0f}" for number in x[start : start + count]]
    return found


@pytest.mark.parametrize("share", [None, "molecule"])
def test_no_value_is_in_two_splits_and_it_is_said_what_that_costs(tmp_path: Path, share: str | None) -> None:
    dataset = imported(tmp_path, "set", disjoint="molecule", share=share)
    assert molecules(dataset) == KEPT
    notes = {(note["what"], note["count"], note["why"], note["example"]) for note in dataset.metadata["notes"]}
    assert notes == {
        ("rows left out", 5, "of train, whose molecule is in validation or test too", "m3"),
        ("rows left out", 1, "of validation, whose molecule is in test too", "m6"),
        ("groups left out", 1, "each of their rows has a molecule that is in a later split too", "e"),
    }


def test_items_and_labels_of_rows_left_out_are_not_numbered(tmp_path: Path) -> None:
    dataset = imported(tmp_path, "set", disjoint="molecule", inputs=["word"], targets=[], share="word")
    assert sum(split.num_rows for split in dataset.splits.values()) == 8
    assert dataset.splits["train"].column("word").shape[0] == 8
    dataset = imported(tmp_path, "labels", disjoint="molecule", targets=["word"])
    assert dataset.metadata["extra"]["names"]["word"] == sorted(f"{g} {m}" for g, ms in KEPT.items() for m in ms)


def test_the_test_split_is_the_same_and_random_splits_do_not_move(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names, known = [f"g{n}" for n in range(30)], [f"m{n}" for n in range(150)]
    content = {"group": rng.choice(names, 600), "molecule": rng.choice(known, 600), "x": rng.random(600)}
    pa.parquet.write_table(pa.table(content | {"y": rng.random(600)}), tmp_path / "random.parquet", row_group_size=50)
    asked: dict[str, Any] = {"group": "group", "inputs": ["x"], "targets": ["y"]}
    usual = open_dataset(table(tmp_path / "random.parquet", tmp_path / "usual", **asked))
    apart = open_dataset(table(tmp_path / "random.parquet", tmp_path / "apart", **asked, disjoint="molecule"))
    np.testing.assert_array_equal(usual.splits["test"].column("x"), apart.splits["test"].column("x"))
    place = {group: split for split, part in usual.splits.items() for group in part.group_names}
    assert all(place[group] == split for split, part in apart.splits.items() for group in part.group_names)
    values = dict(zip(content["x"], content["molecule"], strict=True))
    seen = {split: {values[x] for x in part.column("x")} for split, part in apart.splits.items()}
    assert not (seen["train"] & seen["test"] or seen["train"] & seen["validation"] or seen["validation"] & seen["test"])
    later = {m for g, m in zip(content["group"], content["molecule"], strict=True) if place[g] != "train"}
    kept = Counter(g for g, m in zip(content["group"], content["molecule"], strict=True) if m not in later)
    assert apart.splits["train"].num_rows == sum(kept[group] for group in usual.splits["train"].group_names) > 0


@pytest.mark.parametrize(
    ("rows", "asked", "message"),
    [
        ([("a", "m1"), ("b", "m2"), ("d", "m1"), ("d", "m2")], {}, "leaves no row of .* in train"),
        ([("a", "m1"), ("a", None), ("d", "m2")], {}, "'molecule' of .* no value in 1 rows"),
        (ROWS, {"disjoint": "patient"}, "no column 'patient'"),
    ],
)
def test_what_cannot_be_kept_apart_is_refused(tmp_path: Path, rows: list, asked: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        imported(tmp_path, "set", rows, **{"disjoint": "molecule"} | asked)


def test_a_row_without_a_value_can_be_left_out(tmp_path: Path) -> None:
    dataset = imported(tmp_path, "set", [*ROWS, ("d", None)], disjoint="molecule", skip_bad=True)
    assert molecules(dataset) == KEPT
