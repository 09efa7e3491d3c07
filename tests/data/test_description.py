import json
from pathlib import Path

import numpy as np
import pytest

from metadist.data import About, DatasetWriter, Field, Group, describe, staging
from metadist.data.description import as_text, too_few_classes
from metadist.data.importers import table, text
from tests.cli.command import run
from tests.data.example import write_example


def written(out: Path, kind: str, groups: list[Group], fields: list[Field], rows: dict[str, np.ndarray]) -> Path:
    """A dataset with the given rows, group after group."""
    with staging(out, overwrite=False) as directory:
        writer = DatasetWriter(directory, fields, groups, About(kind, "made up", "none", {}))
        writer.add(np.repeat(np.arange(len(groups)), [group.rows for group in groups]), rows)
        writer.finish()
    return out


def classes(out: Path, **sizes: list[int]) -> Path:
    """Classes of one number a row, of the given sizes in each split."""
    groups = [Group(f"{split}{n}", split, rows) for split, all in sizes.items() for n, rows in enumerate(all)]  # type: ignore[arg-type]
    rows = {"x": np.arange(sum(group.rows for group in groups)) / 100}
    return written(out, "classes", groups, [Field("x", "input", "float32", ())], rows)


def test_a_description_is_complete_and_json(tmp_path: Path) -> None:
    write_example(tmp_path / "set")
    told = json.loads(json.dumps(describe(tmp_path / "set")))
    assert told["kind"] == "values" and told["source"] == "made up" and told["licence"] == "none"
    assert told["splits"]["train"] == {
        "groups": 2,
        "rows": 5,
        "rows_per_group": {"min": 2, "max": 3},
        "parents": 2,
        "first_groups": ["a", "b"],
        "first_parents": ["P", "Q"],
        "smallest": {"group": "a", "rows": 2},
        "largest": {"group": "b", "rows": 3},
    }
    assert told["fields"][0] == {
        "name": "image",
        "role": "input",
        "dtype": "uint8",
        "shape": [1, 2, 3],
        "offset": 10.0,
        "scale": 0.5,
        "shared": False,
    }
    assert told["ranges"] == {"image": [0, 59], "price": [0.0, 13.5]}
    assert told["options"] == {"importer": "example"} and len(told["digest"]) == 32
    assert told["size_bytes"] == sum(file.stat().st_size for file in (tmp_path / "set").iterdir())


def test_the_text_names_splits_classes_sizes_and_what_models_get(tmp_path: Path) -> None:
    write_example(tmp_path / "set")
    text = as_text(describe(tmp_path / "set"))
    assert "4 groups, 10 rows" in text and "train: 2 groups of 2 parents, 5 rows, from 2 (a) to 3 (b)" in text
    assert "0 to 59; models get -5 to 24.5" in text  # (stored - 10) / 2
    many = as_text(describe(classes(tmp_path / "many", train=[20] * 8, test=[20])))
    assert "train0, train1, train2, train3, train4 and 3 more" in many and "20 each" in many
    told = describe(tmp_path / "set")
    told["options"]["importer"] = "\x1b[2J"
    assert "imported   \\x1b[2J" in as_text(told)


def test_classes_that_are_too_few_or_too_small_for_the_tasks_are_warned_of(tmp_path: Path) -> None:
    out = classes(tmp_path / "set", train=[20] * 9 + [3], validation=[20] * 10, test=[20, 20, 15])
    warned = describe(out, ways=5, shots=1, queries=15)["warnings"]
    assert [sentence.split(":")[0] for sentence in warned] == [
        "1 of 10 classes of train have not the 16 rows that 1 shots and 15 queries take ('train9' for example), and "
        "tasks pass over them",
        "train has 9 classes to draw from, so that its tasks of 5 ways are nearly all the same classes",
        "1 of 3 classes of test have not the 16 rows that 1 shots and 15 queries take ('test2' for example), and tasks "
        "pass over them",
        "test has 2 classes to draw from and 5 ways need 5",
    ]
    assert describe(out, ways=1, shots=1, queries=2)["warnings"] == []
    assert [s[:31] for s in describe(classes(tmp_path / "no", train=[2, 2]), 1, 1, 1)["warnings"]] == [
        "there is no validation split: t",
        "there is no test split: nothing",
    ]


def test_labels_with_too_few_rows_and_numbers_far_from_0_are_warned_of(tmp_path: Path) -> None:
    lines = [f"u{user},{user * 1000 + n},5,{n % 2}" for user in range(9) for n in range(8)]
    lines += [f"w,{n},5,0" for n in range(8)]
    (tmp_path / "t.csv").write_text("user,x,same,y\n" + "\n".join(lines))
    wanted = ["v=x", "same"]
    for scaled in (False, True):
        out = table(tmp_path / "t.csv", tmp_path / str(scaled), group="user", inputs=wanted, targets=["y"],
                    standardize=scaled, fractions=(1, 0, 0))  # fmt: skip
        warned = describe(out, ways=2, shots=1, queries=3)["warnings"][2:]
        assert "1 of 10 groups of train have not 2 labels with 4 rows each" in warned[0] and "'w'" in warned[0]
        assert ["'v' goes from 0 to 8007" in sentence for sentence in warned[1:]].count(True) == (not scaled)
        assert any("'same' is" in sentence and "says nothing" in sentence for sentence in warned)


def test_texts_cut_and_tokens_unknown_are_shares_by_split(tmp_path: Path) -> None:
    rows = [{"text": "ab ab ab", "label": "one"}, {"text": "ab", "label": "one"}]
    rows += [{"text": "ab zz", "label": "two"}, {"text": "zz", "label": "two"}]
    for row in rows:
        row["split"] = "train" if row["label"] == "one" else "test"
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = text(tmp_path / "t.jsonl", tmp_path / "set", split_column="split", length=2)
    splits = describe(out)["splits"]
    assert (splits["train"]["texts_cut"], splits["train"]["tokens_unknown"]) == (0.5, 0)
    assert splits["test"]["texts_cut"] == 0.5 and splits["test"]["tokens_unknown"] == pytest.approx(3 / 4)
    assert "0.0% tokens unknown, 50.0% cut" in as_text(describe(out))
    warned = describe(out)["warnings"]
    assert any("50% of the texts are cut in train" in sentence for sentence in warned)
    assert any("75% of the tokens are unknown in test" in sentence for sentence in warned)


def test_the_command_prints_a_text_or_json_and_draws(tmp_path: Path) -> None:
    classes(tmp_path / "set", train=[20] * 9, test=[20])
    done = run("data", "describe", "set", "--ways", "2", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("set: 10 classes, 200 rows")
    assert "test has 1 classes to draw from and 2 ways need 2" in done.stdout
    small = classes(tmp_path / "small", train=[4] * 5, validation=[4] * 4, test=[4] * 4)
    assert describe(small)["warnings"] == [] and len(describe(small, ways=5, shots=1, queries=15)["warnings"]) == 6
    assert too_few_classes(describe(small)) == []
    (told,) = too_few_classes(describe(tmp_path / "set"))
    assert told.startswith("test has 1 class, and a task takes 2 or more: divide the classes otherwise (--fractions")
    assert json.loads(run("data", "describe", "set", "--json", cwd=tmp_path).stdout)["splits"]["test"]["rows"] == 20
    refused = run("data", "describe", "set", "--figure", "sheet.png", cwd=tmp_path)
    assert refused.returncode == 2 and "holds no pictures" in refused.stderr and not (tmp_path / "sheet.png").exists()
