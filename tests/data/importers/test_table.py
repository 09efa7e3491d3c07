from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from metadist.core.errors import InputError
from metadist.data import Table, open_dataset
from metadist.data.importers import table

N = 60
GROUPS = [f"g{n % 6}" for n in range(N)]


def columns(**more: Any) -> pa.Table:
    base = {
        "group": GROUPS,
        "parent": [f"p{n % 6 // 2}" for n in range(N)],
        "part": [("train", "train", "train", "train", "val", "test")[n % 6] for n in range(N)],
        "age": [float(n) for n in range(N)],
        "income": [1000.0 * n for n in range(N)],
        "vector": [[n, n + 1, n + 2] for n in range(N)],
        "y": [0.5 * n for n in range(N)],
        "label": [n % 2 for n in range(N)],
        "word": ["no" if n % 3 else "yes" for n in range(N)],
    }
    return pa.table({**base, **more})


def save(tmp_path: Path, content: pa.Table, suffix: str = "parquet") -> Path:
    file = tmp_path / f"source.{suffix}"
    if suffix == "parquet":
        pa.parquet.write_table(content, file, row_group_size=7)
    elif suffix == "arrow":
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, content.schema) as out:
            out.write_table(content, max_chunksize=7)
    else:
        options = pa.csv.WriteOptions(delimiter="\t" if suffix == "tsv" else ",")
        pa.csv.write_csv(content.drop_columns(["vector"]), file, options)
    return file


def by_group(split: Table, field: str) -> dict[str, np.ndarray]:
    column = split.column(field)
    return {
        name: column[start : start + count]
        for name, start, count in zip(split.group_names, split.starts, split.counts, strict=True)
    }


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "arrow"])
def test_all_formats_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    source = save(tmp_path, columns(), suffix)
    asked: dict[str, Any] = {"group": "group", "inputs": ["x=age,income"], "targets": ["y"], "parent": "parent"}
    dataset = open_dataset(table(source, tmp_path / "set", **asked), verify=True)
    assert dataset.kind == "values"
    assert sorted(name for split in dataset.splits.values() for name in split.group_names) == sorted(set(GROUPS))
    for split in dataset.splits.values():
        for name, rows in by_group(split, "x").items():
            ages = np.arange(int(name[1]), N, 6)
            np.testing.assert_array_equal(rows, np.stack([ages, 1000 * ages], axis=1))
        for name, rows in by_group(split, "y").items():
            np.testing.assert_array_equal(rows, np.arange(int(name[1]), N, 6) * 0.5)
        assert split.parents is not None
        for name, parent in zip(split.group_names, split.parents, strict=True):
            assert split.parent_names[parent] == f"p{int(name[1]) // 2}"
    assert dataset.digest == "9fe02009ac00ea2ce0b43cc75a1ef58f"


def test_a_folder_of_files_is_read_in_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    whole = columns()
    pa.parquet.write_table(whole.slice(30), tmp_path / "parts" / "b.parquet")
    pa.parquet.write_table(whole.slice(0, 30), tmp_path / "parts" / "a.parquet")
    asked: dict[str, Any] = {"group": "group", "inputs": ["age"]}
    one = open_dataset(table(save(tmp_path, whole), tmp_path / "one", **asked))
    assert open_dataset(table(tmp_path / "parts", tmp_path / "two", **asked)).digest == one.digest


def test_files_named_for_splits_are_told_to_be_put_together(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for name in ("train", "test", "val-00000-of-00001"):
        pa.parquet.write_table(columns(), tmp_path / "parts" / f"{name}.parquet")
    asked: dict[str, Any] = {"group": "group", "inputs": ["age"]}
    for more, count in (({}, 3), ({"split_column": "part"}, None)):
        dataset = open_dataset(table(tmp_path / "parts", tmp_path / str(count), **asked, **more))
        told = {note["what"]: note for note in dataset.metadata["notes"]}
        assert told.get("file names not taken as splits", {}).get("count") == count
    told = open_dataset(table(tmp_path / "parts" / "train.parquet", tmp_path / "one", **asked)).metadata["notes"]
    assert "file names not taken as splits" not in [note["what"] for note in told]


def test_kinds_follow_the_targets(tmp_path: Path) -> None:
    source = save(tmp_path, columns(flag=[n % 2 == 0 for n in range(N)]))
    classes = open_dataset(table(source, tmp_path / "classes", group="group", inputs=["vector"]))
    assert classes.kind == "classes" and classes.fields[0].shape == (3,) and classes.fields[0].dtype == "int64"
    labelled = open_dataset(
        table(source, tmp_path / "labelled", group="group", inputs=["age"], targets=["word", "flag", "label"])
    )
    assert labelled.kind == "labelled" and labelled.metadata["extra"]["names"] == {"word": ["no", "yes"]}
    assert [field.dtype for field in labelled.fields[1:]] == ["int64"] * 3
    for split in labelled.splits.values():
        ages = split.column("age").astype(int)
        np.testing.assert_array_equal(split.column("word"), ages % 3 == 0)
        np.testing.assert_array_equal(split.column("flag"), ages % 2 == 0)
    values = table(source, tmp_path / "values", group="group", inputs=["age"], targets=["label"], kind="values")
    assert open_dataset(values).fields[1].dtype == "float32"


def test_plain_columns_are_taken_as_they_are_and_named_ones_are_float_vectors(tmp_path: Path) -> None:
    source = save(tmp_path, columns())
    asked = ["label", "one=label", "many=vector", "two=label,age"]
    dataset = open_dataset(table(source, tmp_path / "set", group="group", inputs=asked, targets=["renamed=word"]))
    assert [(field.name, field.dtype, field.shape) for field in dataset.fields] == [
        ("label", "int64", ()),
        ("one", "float64", (1,)),
        ("many", "float64", (3,)),
        ("two", "float64", (2,)),
        ("renamed", "int64", ()),
    ]


def test_a_split_column_decides(tmp_path: Path) -> None:
    source = save(tmp_path, columns())
    dataset = open_dataset(table(source, tmp_path / "set", group="group", inputs=["age"], split_column="part"))
    assert {split: t.group_names for split, t in dataset.splits.items()} == {
        "train": ["g0", "g1", "g2", "g3"],
        "validation": ["g4"],
        "test": ["g5"],
    }


def test_missing_inputs_become_zero_with_a_mask(tmp_path: Path) -> None:
    age = [None if n % 4 == 0 else float("nan") if n % 4 == 1 else float(n) for n in range(N)]
    vector = [None if n < 9 else [n, None, 1.5] for n in range(N)]
    source = save(tmp_path, columns(age=age, vector=vector, count=[None if n == 7 else n for n in range(N)]))
    for standardize in (False, True):
        out = table(
            source, tmp_path / f"set{standardize}", group="group", inputs=["age", "vector", "count", "income"],
            split_column="part", standardize=standardize,
        )  # fmt: skip
        dataset = open_dataset(out, verify=True)
        names = ["age", "age_mask", "vector", "vector_mask", "count", "count_mask", "income"]
        assert [field.name for field in dataset.fields] == names
        for split in dataset.splits.values():
            age_in, age_known, vector_in, vector_known, _, count_known, _ = split.gather(
                np.arange(split.num_rows)
            ).inputs
            assert age_known.dtype == bool and vector_known.shape == (split.num_rows, 3)
            number = split.column("count")
            np.testing.assert_array_equal(age_known[count_known], (number % 4 > 1)[count_known])
            assert not age_in[~age_known].any() and not vector_in[~vector_known].any()
            np.testing.assert_array_equal(vector_known[count_known, 0], number[count_known] >= 9)
            assert not vector_known[:, 1].any()


def test_standardized_fields_and_their_inverse(tmp_path: Path) -> None:
    source = save(tmp_path, columns(constant=[3.5] * N))
    out = table(
        source, tmp_path / "set", group="group", inputs=["age", "both=age,income", "constant", "vector"], targets=["y"],
        split_column="part", standardize=True,
    )  # fmt: skip
    dataset = open_dataset(out)
    train = dataset.splits["train"]
    (age, both, constant, vector), (y,) = train.gather(np.arange(train.num_rows))
    raw = np.concatenate([np.arange(g, N, 6) for g in range(4)]).astype(float)
    for values in (age, y, *both.T):
        np.testing.assert_allclose(values, (raw - raw.mean()) / raw.std(), atol=1e-6)
    assert not constant.any() and vector.dtype == np.float32
    for element in range(3):
        np.testing.assert_allclose(vector[:, element], (raw - raw.mean()) / raw.std(), atol=1e-6)
    np.testing.assert_allclose(age / dataset.fields[0].scale + dataset.fields[0].offset, raw, atol=1e-4)
    told = dataset.metadata["extra"]["standardized"]["both"]
    np.testing.assert_allclose(both[:, 1] / told["scale"][1] + told["offset"][1], 1000 * raw, atol=0.1)


def test_rows_share_their_inputs(tmp_path: Path) -> None:
    molecule = [f"m{n // 6}" for n in range(N)]
    features = [[n // 6, 2 * (n // 6)] if n // 6 else None for n in range(N)]
    source = save(tmp_path, columns(molecule=molecule, features=features))
    asked: dict[str, Any] = {"group": "group", "inputs": ["features"], "targets": ["y"], "share": "molecule"}
    dataset = open_dataset(table(source, tmp_path / "set", **asked), verify=True)
    for split in dataset.splits.values():
        assert split.column("features").shape == (10, 2)
        (features_in, known), (y,) = split.gather(np.arange(split.num_rows))
        np.testing.assert_array_equal(features_in[:, 1], 2 * (y * 2 // 6).astype(int))
        np.testing.assert_array_equal(known[:, 0], y * 2 // 6 > 0)
    refused(
        save(tmp_path, columns(molecule=molecule)), tmp_path, "differ in their inputs", **{**asked, "inputs": ["age"]}
    )


def test_a_csv_column_may_change_its_type_late_and_names_stay_names(tmp_path: Path) -> None:
    source = tmp_path / "late.csv"
    lines = [f"{n % 3:03},{n},{n}" for n in range(200_000)]
    source.write_text("\n".join(["task,a,b", *lines, '002,1.5,""', ""]))
    dataset = open_dataset(table(source, tmp_path / "set", group="task", inputs=["x=a,b"]))
    assert sorted(name for t in dataset.splits.values() for name in t.group_names) == ["000", "001", "002"]
    assert [field.name for field in dataset.fields] == ["x", "x_mask"] and dataset.fields[0].dtype == "float64"


def refused(source: Path, tmp_path: Path, message: str, **asked: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        table(source, tmp_path / "out" / "set", **asked)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


NAN = float("nan")


@pytest.mark.parametrize(
    ("more", "asked", "message"),
    [
        ({}, {"group": "grup"}, "no column 'grup'; it has group, parent.*did you mean group"),
        ({}, {"inputs": ["x=age,incom"]}, "no column 'incom'.*did you mean income"),
        ({}, {"inputs": []}, "no input column"),
        ({}, {"inputs": ["word"], "most_categories": 1}, "column 'word' of .* has more than 1 names in train"),
        ({}, {"inputs": ["x=age,zz_*"]}, "no column of .* fits 'zz_\\*'"),
        ({}, {"inputs": ["x=age,-agee"]}, "no column 'agee'.*did you mean age"),
        ({}, {"inputs": ["x=age,-age"]}, "'age,-age' names no column"),
        ({}, {"inputs": ["x=wor*"]}, "'x' of .* has no column of numbers"),
        ({}, {"inputs": ["x=a2..a1"]}, "'a2..a1' is no range"),
        ({}, {"inputs": ["x=a1..a3"]}, "no column 'a1'"),
        ({}, {"categories": ["word"]}, "'word' of .* is in no input"),
        ({}, {"time": "word"}, "column 'word' of .* holds no times"),
        ({}, {"inputs": ["age", "age"]}, "given twice"),
        ({}, {"inputs": ["group=age"]}, "reserved"),
        ({}, {"inputs": ["x=age,vector"]}, "stacks lists"),
        ({}, {"group": "y"}, "column 'y' of .* is double, not names .0.5 for example"),
        ({"y": [NAN, None] + [1.0] * (N - 2)}, {"targets": ["y"]}, "'y' .* no value .null or NaN. in 2 rows"),
        ({"y": [float("inf")] + [1.0] * (N - 1)}, {"targets": ["y"]}, "'y' .* an infinite value in 1 rows"),
        ({"age": [-float("inf")] * 2 + [1.0] * (N - 2)}, {}, "'age' .* an infinite value in 2 rows"),
        ({"word": [None] + ["a"] * (N - 1)}, {"targets": ["word"]}, "'word' .* no value in 1 rows"),
        ({"group": [None, ""] + GROUPS[2:]}, {}, "'group' .* no value in 2 rows"),
        ({"age": [None] * N}, {}, "'age' of .* has no value in any row"),
        ({"parent": [f"p{n}" for n in range(N)]}, {"parent": "parent"}, "group 'g0' of .* has parent 'p0' and 'p6'"),
        ({"part": ["later"] * N}, {"split_column": "part"}, "says 'later'; write train"),
        ({"vector": [[1] * (1 + n % 2) for n in range(N)]}, {"inputs": ["vector"]}, "lists of several lengths"),
        ({"vector": [[1] * (1 + (n > 9)) for n in range(N)]}, {"inputs": ["vector"]}, "lists of several lengths"),
        ({}, {"targets": ["y"], "kind": "labelled"}, "'y' of .* is a float and no label"),
        ({}, {"targets": ["word"], "kind": "values"}, "'word' of .* is text and no number"),
        ({}, {"targets": ["y"], "kind": "classes"}, "takes no targets"),
        ({}, {"kind": "values"}, "takes at least one target"),
        ({}, {"fractions": (0.5, 0.1, 0.1)}, "sum to 1"),
    ],
)
def test_unusable_tables_are_refused(tmp_path: Path, more: dict, asked: dict, message: str) -> None:
    source = save(tmp_path, columns(**more))
    refused(source, tmp_path, message, **{"group": "group", "inputs": ["age"], **asked})


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"group": "group", "inputs": ["age"]}
    refused(tmp_path / "nowhere.csv", tmp_path, "does not exist", **asked)
    for suffix in ("parquet", "arrow"):
        source = save(tmp_path, columns(), suffix)
        whole = source.read_bytes()
        for content in (b"", b"group,age\n1,2\n", whole[: len(whole) // 2]):
            source.write_bytes(content)
            refused(source, tmp_path, "cannot be read as", **asked)
        source.unlink()
    csv = tmp_path / "source.csv"
    for content in (b"", b"group,age\na,1\nb\n", b"group,age\na,1\n\xff\xfe,2\n"):
        csv.write_bytes(content)
        refused(csv, tmp_path, "cannot be read as csv", **asked)
    csv.write_text("group,age\n")
    refused(csv, tmp_path, "holds no rows", **asked)
    csv.write_text("group,age\na,1\nb,old\nc,2\n")
    refused(csv, tmp_path, "column 'age' of .* is string, not numbers", **asked)
    csv.rename(tmp_path / "source.xlsx")
    refused(tmp_path / "source.xlsx", tmp_path, "convert the data", **asked)


def columns_of(tmp_path: Path, *inputs: str, targets: tuple[str, ...] = ("y",), **more: Any) -> dict[str, list[str]]:
    """The columns that the fields are made of."""
    wide = pa.table(
        {name: [1.0 * n for n in range(12)] for name in ("x1", "x2", "x10", "px_a", "px_b", "a,b", "px*", "y")}
    )
    wide = wide.append_column("user", pa.array([f"u{n % 4}" for n in range(12)]))
    wide = wide.append_column("px_text", pa.array([f"t{n}" for n in range(12)]))
    pa.parquet.write_table(wide, tmp_path / "wide.parquet")
    out = table(tmp_path / "wide.parquet", tmp_path / "wide", group="user", inputs=inputs, targets=targets,
                overwrite=True, **more)  # fmt: skip
    return open_dataset(out).metadata["extra"]["columns"]


def test_columns_are_chosen_by_patterns_ranges_and_exceptions(tmp_path: Path) -> None:
    y = {"y": ["y"]}
    assert columns_of(tmp_path, "x=x1..x2,x10") == {"x": ["x1", "x2", "x10"]} | y
    assert columns_of(tmp_path, "x=px_*") == {"x": ["px_a", "px_b"]} | y  # the texts are left out
    notes = {note["what"]: note for note in open_dataset(tmp_path / "wide").metadata["notes"]}
    assert notes["columns left out"]["example"] == "px_text" and notes["columns left out"]["count"] == 1
    assert (notes["columns taken by a pattern"]["count"], notes["columns taken by a pattern"]["example"]) == (
        2,
        "px_a, px_b",
    )
    assert columns_of(tmp_path, "x=*") == {"x": ["x1", "x2", "x10", "px_a", "px_b", "a,b", "px*"]} | y
    assert columns_of(tmp_path, "x=px_*,px_text") == {"x": ["px_a", "px_b", "px_text"]} | y  # named too
    assert columns_of(tmp_path, "x=*,-px_*,-x10,-a,b") == {"x": ["x1", "x2", "px*"]} | y
    assert columns_of(tmp_path, "*", "x10") == {"x": ["x1", "x2", "px_a", "px_b", "a,b", "px*"], "x10": ["x10"]} | y
    assert columns_of(tmp_path, "px*") == {"px*": ["px*"]} | y  # a column of that name is that column
    assert columns_of(tmp_path, "x=x?", targets=("y=px_?",)) == {"x": ["x1", "x2"], "y": ["px_a", "px_b"]}


def test_names_become_an_element_each_of_those_that_train_has(tmp_path: Path) -> None:
    n = np.arange(N)
    word = ["red" if k % 2 else "blue" for k in n]
    word[5], word[10], word[4] = "pink", None, ""  # of groups g5 (test), g4 (val), g4
    shop = n % 6 // 2 + 100  # 0, 1 of train are shops 100, 101; g4 and g5 have 102
    source = save(tmp_path, columns(word=word, shop=shop.tolist()))
    asked: dict[str, Any] = {"group": "group", "targets": ["y"], "split_column": "part", "standardize": True}
    out = table(source, tmp_path / "set", inputs=["x=age,word,shop"], categories=["shop"], **asked)
    dataset = open_dataset(out, verify=True)
    extra = dataset.metadata["extra"]
    assert extra["categories"] == {"x": {"word": ["blue", "red"], "shop": ["100", "101"]}}
    (field, _) = dataset.fields
    assert field.shape == (1 + 3 + 3,)
    found = {s: by_group(t, "x") for s, t in dataset.splits.items()}
    np.testing.assert_array_equal(found["train"]["g0"][:, 1:], [[1, 0, 0, 1, 0, 0]] * 10)  # even: blue, shop 100
    np.testing.assert_array_equal(found["train"]["g3"][:, 1:], [[0, 1, 0, 0, 1, 0]] * 10)
    np.testing.assert_array_equal(found["test"]["g5"][0, 1:], [0, 0, 1, 0, 0, 1])  # pink
    np.testing.assert_array_equal(found["validation"]["g4"][:3, 1:], [[0, 0, 1, 0, 0, 1]] * 2 + [[1, 0, 0, 0, 0, 1]])
    ages = n[n % 6 < 4]
    np.testing.assert_allclose(found["train"]["g0"][:, 0], (n[n % 6 == 0] - ages.mean()) / ages.std(), rtol=1e-5)
    told = {(note["what"], note["example"]): note["count"] for note in dataset.metadata["notes"]}
    assert told["columns of texts taken as categories", "word"] == 1
    assert told["categories unknown", "pink"] == 1 and told["categories unknown", "102"] == 20
    assert sum(count for (what, _), count in told.items() if what == "missing categories taken as unknown") == 2


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_lone_column_of_names_is_an_input_too(tmp_path: Path, suffix: str) -> None:
    source = save(tmp_path, columns(), suffix)
    dataset = open_dataset(table(source, tmp_path / "set", group="group", inputs=["word"], fractions=(1, 0, 0)))
    rows = dataset.splits["train"].column("word")
    assert rows.shape == (N, 3) and rows.sum(axis=0).tolist() == [N * 2 // 3, N // 3, 0]  # no, yes, none unknown
    again = table(source, tmp_path / "again", group="group", inputs=["word", "w=word"], fractions=(1, 0, 0))
    assert [field.shape for field in open_dataset(again).fields] == [(3,), (3,)]


def test_numbers_with_a_few_texts_are_no_names_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("group,age\na,1\nb,old\nc,2\n")
    asked: dict[str, Any] = {"group": "group", "inputs": ["age"], "fractions": (1, 0, 0)}
    refused(tmp_path / "t.csv", tmp_path, "'age' of .* is string, not numbers .'old' .* '1'.*--category age", **asked)
    dataset = open_dataset(table(tmp_path / "t.csv", tmp_path / "set", categories=["age"], **asked))
    assert dataset.metadata["extra"]["categories"] == {"age": {"age": ["1", "2", "old"]}}


TIMES = [(7 * k) % N for k in range(N)]


@pytest.mark.parametrize(
    "times",
    [
        pa.array(TIMES),
        pa.array([time / 7 for time in TIMES]),
        pa.array([10**9 * time for time in TIMES], pa.timestamp("ns")),
        pa.array([2**60 + time for time in TIMES]),  # more digits than a float has
        pa.array(TIMES, pa.date32()),
        pa.array(TIMES, pa.time32("s")),
        pa.array([f"2024-01-01T10:00:{time:02}" for time in TIMES]),
        pa.array([f"2024-01-01T10:00:{time:02}+02:00" for time in TIMES]),
    ],
    ids=["int", "float", "timestamp", "large", "date", "time", "text", "text with zone"],
)
def test_rows_of_a_group_are_ordered_by_time(tmp_path: Path, times: pa.Array) -> None:
    source = save(tmp_path, columns().append_column("when", times))
    asked: dict[str, Any] = {"group": "group", "inputs": ["age", "x=income"], "targets": ["y"]}
    dataset = open_dataset(table(source, tmp_path / "set", time="when", **asked), verify=True)
    assert dataset.metadata["extra"]["time"] == "when"
    for split in dataset.splits.values():
        for name, ages in by_group(split, "age").items():
            expected = sorted((n for n in range(N) if GROUPS[n] == name), key=lambda n: TIMES[n])
            assert ages.tolist() == expected
            assert (by_group(split, "y")[name] * 2).tolist() == expected
            assert (by_group(split, "x")[name][:, 0] / 1000).tolist() == expected


def test_rows_without_a_time_are_refused_or_left_out(tmp_path: Path) -> None:
    source = save(tmp_path, columns().append_column("when", pa.array([None, NAN] + [1.0] * (N - 2))))
    asked: dict[str, Any] = {"group": "group", "inputs": ["age"], "time": "when"}
    refused(source, tmp_path, "'when' of .* has no time in 2 rows", **asked)
    dataset = open_dataset(table(source, tmp_path / "set", skip_bad=True, **asked))
    assert sum(split.num_rows for split in dataset.splits.values()) == N - 2


def test_groups_of_which_no_row_is_left_are_told(tmp_path: Path) -> None:
    lacking = [None if group in ("g1", "g4") or n == 0 else 1.5 * n for n, group in enumerate(GROUPS)]
    source = save(tmp_path, columns(y=pa.array(lacking)))
    out = table(source, tmp_path / "set", group="group", inputs=["age"], targets=["y"], skip_bad=True)
    dataset = open_dataset(out)
    assert sorted(name for split in dataset.splits.values() for name in split.group_names) == ["g0", "g2", "g3", "g5"]
    (note,) = [note for note in dataset.metadata["notes"] if note["what"] == "groups left out"]
    assert (note["count"], note["example"]) == (2, "g1") and note["why"] and note["remedy"]


@pytest.mark.parametrize(
    ("asked", "digest"),
    [
        ({"inputs": ["vector", "label"]}, "1246404f411428951cd41470556a075b"),
        ({"inputs": ["age"], "targets": ["word", "label"]}, "55169edeaa4df42a55eea7692db849da"),
        ({"inputs": ["age", "word"], "targets": ["label", "y"]}, "1908d6ba592cf82f19767512d6651a28"),
        ({"inputs": ["age"], "targets": ["label"], "kind": "values"}, "34807ecf95ccfd89e66c5fc3637a81b6"),
        (
            {
                "inputs": ["x=age,word", "label"],
                "targets": ["label2=label", "y"],
                "standardize": True,
                "split_column": "part",
            },
            "9af7dffe773993f159ea68228811b5b4",
        ),
    ],
)
def test_what_is_stored_is_what_it_was_before_identifiers_and_whole_numbers(
    tmp_path: Path, asked: dict, digest: str
) -> None:
    out = table(save(tmp_path, columns()), tmp_path / "set", group="group", **asked)
    assert open_dataset(out).digest == digest


@pytest.mark.parametrize("standardize", [False, True])
def test_an_action_stays_a_whole_number_beside_values(tmp_path: Path, standardize: bool) -> None:
    source = save(tmp_path, columns(price=[100 * n for n in range(N)]))
    asked: dict[str, Any] = {"group": "group", "inputs": ["age"], "targets": ["did=label", "y", "price"]}
    out = table(source, tmp_path / "set", integers=["label"], standardize=standardize, **asked)
    dataset = open_dataset(out, verify=True)
    assert dataset.kind == "values"
    assert [field.dtype for field in dataset.fields[1:]] == ["int64", "float64", "float32"]
    for split in dataset.splits.values():
        did, y, price = split.gather(np.arange(split.num_rows)).targets
        assert (did.dtype, y.dtype, price.dtype) == (np.int64, np.float32, np.float32)
        for name, rows in by_group(split, "did").items():
            np.testing.assert_array_equal(rows, np.arange(int(name[1]), N, 6) % 2)
    told = {note["what"]: note for note in dataset.metadata["notes"]}
    assert (
        told["integer targets made floats"]["example"] == "price"
        and "--integer" in told["integer targets made floats"]["remedy"]
    )


def test_whole_numbers_alone_among_integers_are_values_too(tmp_path: Path) -> None:
    source = save(tmp_path, columns(count=list(range(N)), gaps=[float(n) for n in range(N)]))
    out = table(source, tmp_path / "a", group="group", inputs=["age"], targets=["label", "count"], integers=["count"])
    assert [field.dtype for field in open_dataset(out).fields[1:]] == ["float32", "int64"]
    out = table(source, tmp_path / "b", group="group", inputs=["age"], targets=["gaps", "y"], integers=["gaps"])
    assert [field.dtype for field in open_dataset(out).fields[1:]] == ["int64", "float64"]


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
@pytest.mark.parametrize("standardize", [False, True])
def test_identifiers_are_numbered_and_those_that_train_has_not_are_0(
    tmp_path: Path, suffix: str, standardize: bool
) -> None:
    n = np.arange(N)
    film = [f"{900 + k}" for k in n // 3]  # six rows' groups have other films now and then
    film[5], film[4] = "unheard of", None  # of groups g5 (test) and g4 (validation)
    source = save(tmp_path, columns(film=film), suffix)
    asked: dict[str, Any] = {"group": "group", "targets": ["y"], "split_column": "part", "standardize": standardize}
    out = table(source, tmp_path / "set", inputs=["age", "seen=film"], identifiers=["film"], **asked)
    dataset = open_dataset(out, verify=True)
    train = sorted({film[k] for k in n if k % 6 < 4})
    assert dataset.metadata["extra"]["vocabularies"] == {"seen": len(train) + 1} and len(train) == 20
    seen = dataset.fields[1]
    assert (seen.name, seen.dtype, seen.shape, seen.scale) == ("seen", "int64", (), 1.0)
    for split in dataset.splits.values():
        ages = np.concatenate([np.arange(int(name[1]), N, 6) for name in split.group_names])
        expected = [1 + train.index(film[k]) if film[k] in train else 0 for k in ages]
        np.testing.assert_array_equal(split.gather(np.arange(split.num_rows)).inputs[1], expected)
    told = {(note["what"], note["count"]): note["example"] for note in dataset.metadata["notes"]}
    assert told["categories unknown", 1] == "unheard of" and told["missing categories taken as unknown", 1]
    assert "seen" not in told.values()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"identifiers": ["word"]}, "'word' of .* is in no input"),
        ({"inputs": ["x=age,word"], "identifiers": ["word"]}, "make it an input of its own, --input word"),
        ({"inputs": ["word"], "identifiers": ["word"], "categories": ["word"]}, "a category and an identifier"),
        ({"integers": ["label"]}, "'label' of .* is no target of its own"),
        ({"targets": ["t=label,y"], "integers": ["label"]}, "'label' of .* is no target of its own"),
        ({"targets": ["label", "y"], "integers": ["y"]}, "'y' of .* has fractions"),
        ({"targets": ["label"], "integers": ["label"], "kind": "values"}, "is alone and in whole numbers"),
        ({"targets": ["word", "y"], "integers": ["word"]}, "'word' of .* is text and no number"),
    ],
)
def test_identifiers_and_whole_numbers_that_cannot_be_are_refused(tmp_path: Path, asked: dict, message: str) -> None:
    refused(save(tmp_path, columns()), tmp_path, message, **{"group": "group", "inputs": ["age"], **asked})
