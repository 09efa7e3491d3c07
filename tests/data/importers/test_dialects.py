"""Tables as people have them: CSV dialects, files that do not agree, types of every kind, what is missing."""

import decimal
import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest

from metadist.core.errors import InputError
from metadist.data import Dataset, open_dataset
from metadist.data.importers import table

N = 30
USERS = [f"u{n % 5}" for n in range(N)]
AGES = [20 + 3 * n for n in range(N)]
INCOMES = [n + 0.25 for n in range(N)]


def imported(source: Path, tmp_path: Path, **asked: Any) -> Dataset:
    asked = {"group": "user", "inputs": ["x=age,income"], "fractions": (1, 0, 0)} | asked
    return open_dataset(table(source, tmp_path / "set", overwrite=True, **asked), verify=True)


def told(dataset: Dataset) -> dict[str, int]:
    """Counts by what a note says; equal rows left aside."""
    found: dict[str, int] = {}
    for note in dataset.metadata["notes"]:
        found[note["what"]] = found.get(note["what"], 0) + note["count"]
    found.pop("rows repeated", None)
    found.pop("rows shared", None)
    return found


def stored(dataset: Dataset, field: str = "x") -> np.ndarray:
    return dataset.splits["train"].column(field)


def by_user(values: Any) -> np.ndarray:
    """In the order of the groups: all rows of u0, then of u1, ..."""
    return np.array([values[n] for user in range(5) for n in range(user, N, 5)])


EXPECTED = np.stack([by_user(AGES), by_user(INCOMES)], axis=1)


def written(tmp_path: Path, mark: str = ",", point: str = ".", end: str = "\n", header: str = "", name: str = "t.csv",
            encoding: str = "utf-8") -> Path:  # fmt: skip
    incomes = [str(income).replace(".", point) for income in INCOMES]
    lines = [mark.join([user, str(age), income]) for user, age, income in zip(USERS, AGES, incomes, strict=True)]
    file = tmp_path / name
    file.write_bytes((end.join([header or mark.join(["user", "age", "income"]), *lines]) + end).encode(encoding))
    return file


@pytest.mark.parametrize(
    ("form", "notes"),
    [
        ({}, {}),
        ({"encoding": "utf-8-sig"}, {}),
        ({"encoding": "utf-16"}, {}),
        ({"end": "\r\n"}, {}),
        ({"header": " user, age ,income"}, {}),
        ({"header": '"user","age","income"'}, {}),
        ({"name": "t.tsv", "mark": "\t"}, {}),
        ({"mark": ";"}, {"files read in another form": 1}),
        ({"mark": "\t"}, {"files read in another form": 1}),
        ({"mark": "|"}, {"files read in another form": 1}),
        ({"mark": ";", "point": ","}, {"files read in another form": 1, "columns with decimal commas": 1}),
        ({"name": "t.tsv", "mark": "\t", "point": ","}, {"columns with decimal commas": 1}),
        ({"mark": ";", "point": ",", "encoding": "utf-8-sig", "end": "\r\n"},
         {"files read in another form": 1, "columns with decimal commas": 1}),
    ],
)  # fmt: skip
def test_dialects_are_read(tmp_path: Path, form: dict[str, str], notes: dict[str, int]) -> None:
    dataset = imported(written(tmp_path, **form), tmp_path)
    np.testing.assert_array_equal(stored(dataset), EXPECTED)
    assert told(dataset) == notes


def test_gzip_and_mixed_line_ends(tmp_path: Path) -> None:
    plain = written(tmp_path).read_bytes().split(b"\n")
    mixed = b"\r\n".join(plain[:9]) + b"\r\n\n" + b"\n".join(plain[9:])
    for name in ("t.csv.gz", "T.CSV.GZ"):
        (tmp_path / name).write_bytes(gzip.compress(mixed))
        np.testing.assert_array_equal(stored(imported(tmp_path / name, tmp_path)), EXPECTED)


@pytest.mark.parametrize("asked", ["x=income, EUR", "income, EUR", "x=age,income, EUR", "x=income, EUR,age"])
def test_columns_with_commas_in_their_names(tmp_path: Path, asked: str) -> None:
    source = written(tmp_path, header='user,age,"income, EUR"')
    dataset = imported(source, tmp_path, inputs=[asked])
    found = stored(dataset, asked.split("=")[0]).reshape(N, -1)
    columns = {"income, EUR": by_user(INCOMES), "age": by_user(AGES)}
    names = asked.partition("=")[2] or asked
    order = sorted(filter(names.__contains__, columns), key=names.index)
    np.testing.assert_array_equal(found, np.stack([columns[name] for name in order], axis=1))


def refused(source: Path, tmp_path: Path, message: str, **asked: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        imported(source, tmp_path / "out", **asked)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_ambiguous_commas_and_doubled_columns_are_refused(tmp_path: Path) -> None:
    rows = [f'{user},"{1000 + n:,}",1' for n, user in enumerate(USERS)]
    source = tmp_path / "t.csv"
    source.write_text("\n".join(["user,age,income", *rows]))
    refused(source, tmp_path, "column 'age' of .* has '1,000', of which the comma may be a decimal point")
    source = written(tmp_path, mark=";", point=",")
    source.write_text(source.read_text() + "u1;3;1.5\n")
    refused(source, tmp_path, "column 'income' of .* has '0,25', of which the comma")
    refused(written(tmp_path, header="user,age,age"), tmp_path, "two columns named 'age'", inputs=["age"])


@pytest.mark.parametrize("marker", ["?", "NA", "n/a", "NULL", "-", "nan", " ", ""])
def test_ways_to_say_missing(tmp_path: Path, marker: str) -> None:
    ages = [marker if n % 10 == 3 else str(age) for n, age in enumerate(AGES)]
    source = tmp_path / "t.csv"
    source.write_text("\n".join(["user,age", *(f"{u},{a}" for u, a in zip(USERS, ages, strict=True))]))
    dataset = imported(source, tmp_path, inputs=["age"])
    assert stored(dataset, "age").dtype == np.int64
    np.testing.assert_array_equal(stored(dataset, "age_mask"), by_user([n % 10 != 3 for n in range(N)]))
    np.testing.assert_array_equal(
        stored(dataset, "age"), by_user([0 if n % 10 == 3 else a for n, a in enumerate(AGES)])
    )
    assert told(dataset) == {"missing values filled": 3} | ({"values read as missing": 3} if marker.strip() else {})


def parts(tmp_path: Path, *tables: pa.Table) -> Path:
    (tmp_path / "parts").mkdir(exist_ok=True)
    for n, part in enumerate(tables):
        pq.write_table(part, tmp_path / "parts" / f"{n}.parquet")
    return tmp_path / "parts"


HALF = N // 2
UNIFIED = {"columns of several types unified": 1}
PAIRS = [
    (pa.nulls(HALF), AGES[HALF:], "int64", {"missing values filled": HALF}),
    (AGES[:HALF], [a + 0.5 for a in AGES[HALF:]], "float64", UNIFIED),
    (pa.array(AGES[:HALF], pa.int32()), pa.array([2**40] * HALF, pa.int64()), "int64", UNIFIED),
    (pa.array(AGES[:HALF], pa.uint8()), pa.array([-1] * HALF, pa.int16()), "int64", UNIFIED),
    (pa.array(AGES[:HALF], pa.float32()), pa.array([0.1] * HALF), "float64", UNIFIED),
    (pa.array(AGES[:HALF], pa.decimal128(9, 2)), AGES[HALF:], "float64", UNIFIED),
    (AGES[:HALF], None, "int64", {"files without a column": 1, "missing values filled": HALF}),
    (None, AGES[HALF:], "int64", {"files without a column": 1, "missing values filled": HALF}),
]  # fmt: skip


@pytest.mark.parametrize(("one", "two", "dtype", "notes"), PAIRS)
def test_types_are_unified_over_files(tmp_path: Path, one: Any, two: Any, dtype: str, notes: dict[str, int]) -> None:
    halves = [{"user": USERS[:HALF]}, {"user": USERS[HALF:]}]
    for half, ages in zip(halves, (one, two), strict=True):
        if ages is not None:
            half["age"] = ages
    dataset = imported(parts(tmp_path, *map(pa.table, halves)), tmp_path, inputs=["age"])
    values = [*(pa.nulls(HALF) if one is None else pa.array(one)), *(pa.nulls(HALF) if two is None else pa.array(two))]
    expected = by_user([0 if v.as_py() is None else float(v.as_py()) for v in values])
    assert stored(dataset, "age").dtype == dtype
    np.testing.assert_array_equal(stored(dataset, "age"), expected)
    assert told(dataset) == notes


def test_types_without_a_common_one_are_refused(tmp_path: Path) -> None:
    texts = pa.table({"user": USERS, "age": ["old"] * N})
    source = parts(tmp_path, pa.table({"user": USERS, "age": AGES}), texts)
    refused(source, tmp_path, "'age' is int64 in .*0.parquet and string in .*1.parquet; make it one", inputs=["age"])


def test_csv_files_of_a_folder_are_unified_too(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.csv").write_text("user,age\n" + "".join(f"u{n},{n}\n" for n in range(5)))
    (tmp_path / "parts" / "b.csv").write_text("age;user\n" + "".join(f"{n},5;u{n}\n" for n in range(5)))
    (tmp_path / "parts" / "c.csv").write_text("")
    (tmp_path / "parts" / "d.csv").write_text("user,age\n")
    dataset = imported(tmp_path / "parts", tmp_path, inputs=["age"])
    np.testing.assert_array_equal(stored(dataset, "age"), [n + half for n in range(5) for half in (0, 0.5)])
    assert told(dataset) == {"files read in another form": 1, "columns with decimal commas": 1, "files left out": 1}


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_hive_partitions_are_columns(tmp_path: Path, suffix: str) -> None:
    for n in range(6):
        folder = tmp_path / "hive" / f"year={2000 + n % 2}" / f"user=a%20{n}"
        folder.mkdir(parents=True)
        content = pa.table({"age": [n, n + 0.5], "label": [0, 1]})
        if suffix == "parquet":
            pq.write_table(content, folder / "part.parquet")
        else:
            (folder / "part.csv").write_text(f"age,label\n{n},0\n{n + 0.5},1\n")
    (tmp_path / "hive" / "_SUCCESS").touch()
    (tmp_path / "hive" / "_temporary" / "user=x").mkdir(parents=True)
    (tmp_path / "hive" / "_temporary" / "user=x" / f"part.{suffix}").write_bytes(b"half written")
    dataset = imported(tmp_path / "hive", tmp_path, inputs=["x=age,year"], targets=["label"])
    assert dataset.splits["train"].group_names == [f"a {n}" for n in range(6)]
    np.testing.assert_array_equal(stored(dataset), [[n + half, 2000 + n % 2] for n in range(6) for half in (0, 0.5)])
    assert told(dataset) == {"files left out": 2}


def test_hidden_folders_of_a_table_are_left_out(tmp_path: Path) -> None:
    source = parts(tmp_path, pa.table({"user": USERS, "age": AGES}))
    (source / ".ipynb_checkpoints").mkdir()
    (source / ".ipynb_checkpoints" / "0-checkpoint.parquet").write_bytes((source / "0.parquet").read_bytes())
    dataset = imported(source, tmp_path, inputs=["age"])
    assert dataset.splits["train"].num_rows == N and told(dataset) == {"files left out": 1}


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_texts_of_every_type(tmp_path: Path, kind: pa.DataType) -> None:
    words = pa.array(["no" if n % 3 else "yes" for n in range(N)]).cast(kind)
    source = parts(tmp_path, pa.table({"user": pa.array(USERS).cast(kind), "age": AGES, "word": words}))
    dataset = imported(source, tmp_path, inputs=["age"], targets=["word"])
    assert dataset.metadata["extra"]["names"] == {"word": ["no", "yes"]}
    np.testing.assert_array_equal(stored(dataset, "word"), by_user([int(n % 3 == 0) for n in range(N)]))


def test_numbers_of_every_type(tmp_path: Path) -> None:
    columns = {
        "dictionary": pa.array(AGES).dictionary_encode(),
        "decimal": pa.array([decimal.Decimal(a) / 4 for a in AGES], pa.decimal128(10, 2)),
        "whole": pa.array([decimal.Decimal(a) for a in AGES], pa.decimal128(10, 0)),
        "half": pa.array(np.array(AGES, np.float16)),
        "unsigned": pa.array(AGES, pa.uint32()),
        "lists": pa.array([[a, a + 1] for a in AGES], pa.large_list(pa.int32())),
    }
    dataset = imported(parts(tmp_path, pa.table({"user": USERS, **columns})), tmp_path, inputs=list(columns))
    ages = by_user(AGES)
    for name in ("dictionary", "whole", "half", "unsigned"):
        np.testing.assert_array_equal(stored(dataset, name), ages)
    np.testing.assert_array_equal(stored(dataset, "decimal"), ages / 4)
    np.testing.assert_array_equal(stored(dataset, "lists"), np.stack([ages, ages + 1], axis=1))


def test_arrow_files_and_streams_of_every_layout(tmp_path: Path) -> None:
    ages = pa.array([None if n == 7 else age for n, age in enumerate(AGES)])
    lists = [None if n == 8 else [float(n), 0.5] for n in range(N)]
    content = pa.table(
        {
            "user": pa.array(USERS, pa.string_view()),
            "age": pyarrow.compute.run_end_encode(ages),
            "list": pa.array(lists, pa.list_view(pa.float64())),
            "code": pa.array([decimal.Decimal(n) + decimal.Decimal("0.50") for n in range(N)], pa.decimal128(8, 2)),
        }
    )
    for make in (pa.ipc.new_file, pa.ipc.new_stream):
        with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as sink, make(sink, content.schema) as out:
            out.write_table(content, max_chunksize=13)
        dataset = imported(tmp_path / "t.arrow", tmp_path, inputs=["age", "list"])
        np.testing.assert_array_equal(stored(dataset, "age"), by_user([0 if n == 7 else a for n, a in enumerate(AGES)]))
        expected = [[0, 0] if row is None else row for row in lists]
        np.testing.assert_array_equal(stored(dataset, "list"), by_user(expected))
        np.testing.assert_array_equal(stored(dataset, "list_mask")[:, 0], by_user([n != 8 for n in range(N)]))
        codes = imported(tmp_path / "t.arrow", tmp_path, inputs=["age"], group="code").splits["train"].group_names
        assert codes == sorted(f"{n}.50" for n in range(N))


def test_whole_number_floats_are_names(tmp_path: Path) -> None:
    users = [float(n % 5) for n in range(N)]
    labels = [float(n % 2) for n in range(N)]
    source = parts(tmp_path, pa.table({"user": users, "age": AGES, "label": labels}))
    dataset = imported(source, tmp_path, inputs=["age"], targets=["label"], kind="labelled")
    assert dataset.splits["train"].group_names == ["0", "1", "2", "3", "4"]
    np.testing.assert_array_equal(stored(dataset, "label"), by_user([n % 2 for n in range(N)]))
    assert stored(dataset, "label").dtype == np.int64
    assert told(dataset) == {"whole-number floats read as names": N}
    values = imported(source, tmp_path, inputs=["age"], targets=["label"])
    assert values.kind == "values" and told(values)["targets taken as values, not labels"] == 1


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_labels_that_int64_cannot_hold_stay_apart(tmp_path: Path, suffix: str) -> None:
    labels = [2**64 - 1 - n % 3 for n in range(N)]
    if suffix == "parquet":
        source = parts(tmp_path, pa.table({"user": USERS, "age": AGES, "label": pa.array(labels, pa.uint64())}))
    else:
        source = tmp_path / "t.csv"
        rows = zip(USERS, AGES, labels, strict=True)
        source.write_text("user,age,label\n" + "".join(f"{u},{a},{label}\n" for u, a, label in rows))
    dataset = imported(source, tmp_path, inputs=["age"], targets=["label"])
    np.testing.assert_array_equal(stored(dataset, "label"), by_user([2 - n % 3 for n in range(N)]))
    assert dataset.metadata["extra"]["names"]["label"] == [str(2**64 - 3 + n) for n in range(3)]


def test_groups_and_labels_that_differ_by_spaces_are_one(tmp_path: Path) -> None:
    users = [user + " " * (n % 2) for n, user in enumerate(USERS)]
    words = ["caf\u00e9" if n % 2 else "cafe\u0301" for n in range(N)]
    source = parts(tmp_path, pa.table({"user": users, "age": AGES, "word": words, "case": USERS[:-1] + ["U4"]}))
    dataset = imported(source, tmp_path, inputs=["age"], targets=["word"])
    assert dataset.splits["train"].group_names == sorted(set(USERS))
    assert dataset.metadata["extra"]["names"] == {"word": ["caf\u00e9"]}
    assert told(dataset) == {"values of column 'user' merged": 15, "values of column 'word' merged": 15}
    dataset = imported(source, tmp_path, inputs=["age"], group="case")
    assert told(dataset) == {"values of column 'case' kept apart": 1} and len(dataset.splits["train"].counts) == 6


def test_rows_that_cannot_be_used_are_skipped_on_demand(tmp_path: Path) -> None:
    ages = [float("inf") if n == 3 else float(age) for n, age in enumerate(AGES)]
    words = [None if n == 4 else f"w{n % 2}" for n in range(N)]
    users = [None if n == 5 else user for n, user in enumerate(USERS)]
    source = parts(tmp_path, pa.table({"user": users, "age": ages, "word": words}))
    refused(source, tmp_path, r"'user' of .* has no value in 1 rows .row 6 first.*--skip-bad", targets=["word"],
            inputs=["age"])  # fmt: skip
    dataset = imported(source, tmp_path, inputs=["age"], targets=["word"], skip_bad=True)
    assert dataset.splits["train"].num_rows == N - 3 and told(dataset) == {"rows left out": 3}
    assert sorted(stored(dataset, "age")) == [age for n, age in enumerate(AGES) if n not in (3, 4, 5)]


def test_labels_below_zero_are_said(tmp_path: Path) -> None:
    labels = [-100 if n % 10 == 0 else n % 2 for n in range(N)]
    source = parts(tmp_path, pa.table({"user": USERS, "age": AGES, "label": labels}))
    assert told(imported(source, tmp_path, inputs=["age"], targets=["label"])) == {"labels below 0": 3}


def test_every_number_is_standardized_and_what_is_not_is_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    many = {"count": rng.integers(0, 2000, N), "flag": rng.integers(0, 2, N) == 1, "constant": [0.1] * N}
    lists = [[n, 1000.0 * n, 0.3] for n in range(N)]
    target = rng.integers(0, 500, N)
    source = parts(tmp_path, pa.table({"user": USERS, **many, "list": lists, "y": target}))
    dataset = imported(source, tmp_path, inputs=[*many, "list"], targets=["y"], kind="values", standardize=True)
    (count, flag, constant, vector), (y,) = dataset.splits["train"].gather(np.arange(N))

    def scaled(values: Any) -> np.ndarray:
        values = by_user(values).astype(float)
        return (values - values.mean()) / values.std()

    np.testing.assert_allclose(count, scaled(many["count"]), atol=1e-5)
    np.testing.assert_allclose(y, scaled(target), atol=1e-5)
    np.testing.assert_allclose(vector[:, 0], scaled(range(N)), atol=1e-5)
    np.testing.assert_allclose(vector[:, 1], scaled(range(N)), atol=1e-5)
    assert np.abs(constant).max() < 1e-6 and np.abs(vector[:, 2]).max() < 1e-6
    assert flag.dtype == bool
    assert told(dataset) == {"fields not standardized": 1, "numbers not scaled": 2, "integer fields made floats": 1}


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint8(), pa.float32(), pa.float64()])
def test_what_is_missing_is_0_when_standardized(tmp_path: Path, kind: pa.DataType) -> None:
    counts = [None if n == 7 else n * n % 100 for n in range(N)]
    source = parts(tmp_path, pa.table({"user": USERS, "count": pa.array(counts, kind)}))
    dataset = imported(source, tmp_path, inputs=["count"], standardize=True)
    count, known = dataset.splits["train"].gather(np.arange(N))[0]
    values, expected_known = by_user([n * n % 100 for n in range(N)]), by_user([n != 7 for n in range(N)])
    there = values[expected_known].astype(float)
    expected = (values - there.mean()) / there.std() * expected_known
    np.testing.assert_array_equal(known, expected_known)
    np.testing.assert_allclose(count, expected, atol=1e-5)
    assert count[~known] == 0


@pytest.mark.parametrize("suffix", ["csv", "parquet", "arrow"])
def test_only_regular_files_are_opened(tmp_path: Path, suffix: str) -> None:
    asked: dict[str, Any] = {"inputs": ["age"]}
    os.mkfifo(tmp_path / f"pipe.{suffix}")
    refused(tmp_path / f"pipe.{suffix}", tmp_path, "is a pipe and no regular file", **asked)
    (tmp_path / f"zero.{suffix}").symlink_to("/dev/zero")
    refused(tmp_path / f"zero.{suffix}", tmp_path, "is a device and no regular file", **asked)
    (tmp_path / "parts").mkdir()
    os.mkfifo(tmp_path / "parts" / f"pipe.{suffix}")
    refused(tmp_path / "parts", tmp_path, "is a pipe and no regular file", **asked)


def test_files_that_are_no_tables_end_in_one_sentence(tmp_path: Path) -> None:
    source = tmp_path / "t.csv"
    for content, message in (
        (b"user,age\n" + b"x" * (1 << 26) + b",1\n", "longer than 16 MiB"),
        (b"x" * (1 << 25), "a line longer than 16 MiB"),
        (b"user,age\nu1,\xff\n", "cannot be read as csv .it is not UTF-8 text"),
        (b"\xff\xfeu\x00", "cannot be read as csv|no column"),
        (b"user,age\n\x00,1\n", "no value|cannot be read|groups cannot fill|holds no"),
        (b"user,age\nu1,2019-01-01\n", "column 'age' of .* is string, not numbers .'2019-01-01' for example"),
    ):
        source.write_bytes(content)
        refused(source, tmp_path, message, inputs=["age"], fractions=(0.5, 0.5, 0))
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"user,age\nu1,1\n" * 1000)[:-20])
    refused(tmp_path / "t.csv.gz", tmp_path, "cannot be read as csv", inputs=["age"])


def test_fields_above_128_kib_are_read(tmp_path: Path) -> None:
    source = written(tmp_path)
    source.write_text(source.read_text().replace("user,age,income", "user,age,income,note").replace("\n", ",x\n")
                      .replace("note,x", "note") + f"u1,3,4.5,{'word ' * 400_000}\n")  # fmt: skip
    assert imported(source, tmp_path).splits["train"].num_rows == N + 1


def test_large_numbers_keep_their_digits_or_it_is_said(tmp_path: Path) -> None:
    times = [1_700_000_000 + n for n in range(N)]
    source = parts(tmp_path, pa.table({"user": USERS, "time": [float(t) for t in times], "y": times}))
    asked: dict[str, Any] = {"inputs": ["time"], "targets": ["y"], "kind": "values"}
    plain = imported(source, tmp_path, **asked)
    np.testing.assert_array_equal(stored(plain, "y"), by_user(times))
    assert told(plain) == {"fields of large numbers rounded": 2}
    dataset = imported(source, tmp_path, **asked, standardize=True)
    (time,), (y,) = dataset.splits["train"].gather(np.arange(N))
    scaled = (by_user(range(N)) - np.mean(range(N))) / np.std(range(N))
    np.testing.assert_allclose(time, scaled, atol=1e-5)
    np.testing.assert_allclose(y, scaled, atol=1e-5)
    assert told(dataset) == {}
