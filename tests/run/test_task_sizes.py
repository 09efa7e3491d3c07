"""Which tasks a dataset can give: counted by hand on small ones."""

import numpy as np
import pytest

from metadist.core.errors import InputError
from metadist.data import About, DatasetWriter, Field, Group, open_dataset, staging
from metadist.run.task_sizes import left_out, rows_by_ways, task_sizes


def dataset(tmp_path, kind, splits, labels=None):
    """`splits`: rows of each group, by split; `labels`: a function group number, row number -> label."""
    groups = [Group(f"{split}{n}", split, rows) for split, counts in splits.items() for n, rows in enumerate(counts)]
    fields = [Field("x", "input", "float32", (2,))]
    fields += [Field("y", "target", "float32" if kind == "values" else "int64", ())] * (kind != "classes")
    codes = np.repeat(np.arange(len(groups)), [group.rows for group in groups])
    rows = np.concatenate([np.arange(group.rows) for group in groups])
    columns = {"x": np.zeros((len(codes), 2), np.float32)}
    if kind != "classes":
        made = [labels(c, r) if labels else 0 for c, r in zip(codes, rows, strict=True)]
        columns["y"] = np.array(made, np.float32 if kind == "values" else np.int64)
    with staging(tmp_path / "set", overwrite=True) as folder:
        writer = DatasetWriter(folder, fields, groups, About(kind, "made up", "none", {}))
        writer.add(codes, columns)
        writer.finish()
    return open_dataset(tmp_path / "set")


def test_ways_are_those_of_the_smallest_split_and_rows_those_of_most_classes(tmp_path):
    """Of 8 training classes 6 (three quarters) have 9 rows or more; the 3 of validation and the 4 of test have more."""
    data = dataset(
        tmp_path, "classes", {"train": [30, 20, 12, 11, 10, 9, 3, 2], "validation": [40, 41, 42], "test": [15] * 4}
    )
    sizes = task_sizes(data)
    assert (sizes.ways, sizes.shots, sizes.queries) == (3, 3, 6)
    assert "the smallest split, validation, has 3 classes" in sizes.why_ways and "split train" in sizes.why_rows
    assert left_out(data, sizes, 6) == ["2 of 8 classes of train have fewer than 9 rows, and are in no task"]
    assert left_out(data, sizes, 5) == ["2 of 8 classes of train have fewer than 8 rows, and are in no task"]
    assert left_out(data, sizes, 0) == ["1 of 8 classes of train have fewer than 3 rows, and are in no task"]


def test_plenty_gives_five_ways_five_shots(tmp_path):
    data = dataset(tmp_path, "classes", {"train": [50] * 9, "validation": [20] * 7, "test": [20] * 6})
    sizes = task_sizes(data)
    assert (sizes.ways, sizes.shots, sizes.queries, left_out(data, sizes, 15)) == (5, 5, 15, [])


def test_few_rows_may_leave_out_up_to_half(tmp_path):
    """Half of them have 8 rows, three quarters but 2: tasks of 6 rows, rather than of 2."""
    rows = [8] * 6 + [2] * 6
    data = dataset(tmp_path, "classes", {"train": rows, "test": rows})
    sizes = task_sizes(data)
    assert (sizes.shots, sizes.queries) == (2, 4) and len(left_out(data, sizes, 4)) == 2


def test_labels_of_a_group(tmp_path):
    """Each group has 12 rows of labels 0, 0, 0, 1 in turn: 9 and 3; so 2 ways have 3 rows, and 3 ways none."""
    data = dataset(tmp_path, "labelled", {"train": [12] * 4, "validation": [12], "test": [12]}, lambda _, r: r % 4 // 3)
    assert list(rows_by_ways("labelled", data.splits["train"], 2)) == [3] * 4
    assert list(rows_by_ways("labelled", data.splits["train"], 3)) == []
    sizes = task_sizes(data)
    assert (sizes.ways, sizes.shots, sizes.queries) == (2, 1, 2)


def test_more_labels_are_more_ways_where_most_groups_have_them(tmp_path):
    """Three of four groups have four labels, the last has two."""
    splits = {"train": [16] * 4, "test": [16]}
    data = dataset(tmp_path, "labelled", splits, lambda group, row: row % (2 if group == 3 else 4))
    assert task_sizes(data).ways == 4
    data = dataset(tmp_path, "labelled", splits, lambda group, row: row % (2 if group in (2, 3) else 4))
    assert task_sizes(data).ways == 2


def test_values_share_their_rows_between_shots_and_queries(tmp_path):
    sizes = task_sizes(dataset(tmp_path, "values", {"train": [14, 15, 16, 5], "test": [30]}))
    assert (sizes.ways, sizes.shots, sizes.queries) == (0, 7, 7)
    assert task_sizes(dataset(tmp_path, "values", {"train": [90] * 3, "test": [30]})).shots == 10


@pytest.mark.parametrize(("kind", "splits", "why"), [
    ("classes", {"train": [5] * 4}, "its only split is train"),
    ("classes", {"train": [5] * 4, "test": [5]}, "test cannot give a task, which takes 2 classes with 2 rows each"),
    ("classes", {"train": [1] * 4, "test": [5] * 4}, "train cannot give a task"),
    ("labelled", {"train": [9] * 4, "test": [9] * 4}, "train and test cannot give a task, which takes a group with 2"),
    ("values", {"train": [9], "validation": [1], "test": [1]}, "validation and test cannot give a task"),
])  # fmt: skip
def test_too_little_data_is_refused_with_what_to_do(tmp_path, kind, splits, why):
    with pytest.raises(InputError) as raised:
        task_sizes(dataset(tmp_path, kind, splits))
    assert why in str(raised.value) and "\n" not in str(raised.value)
    assert "--fractions" in str(raised.value) or "import more classes: 2 splits need at least 4" in str(raised.value)


def test_too_few_classes_for_any_division_are_counted(tmp_path):
    for splits, said in (
        ({"train": [5], "validation": [5], "test": [5]}, "3 splits need at least 6, 2 each, and there are 3, since"),
        (
            {"train": [5], "validation": [5], "test": [5] * 3},
            "there are 5; or do without validation (--fractions",
        ),
        ({"train": [5] * 8, "validation": [5], "test": [5]}, "divide the classes otherwise (--fractions"),
    ):
        with pytest.raises(InputError) as raised:
            task_sizes(dataset(tmp_path, "classes", splits))
        assert said in str(raised.value)


def test_a_split_that_is_too_small_is_not_used(tmp_path):
    sizes = task_sizes(dataset(tmp_path, "classes", {"train": [6] * 4, "validation": [6], "test": [6] * 3}))
    assert sizes.splits == ["train", "test"] and sizes.ways == 3
