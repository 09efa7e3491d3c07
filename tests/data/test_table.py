import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from metadist.core.errors import InputError
from metadist.data import About, DatasetWriter, Field, Group, open_dataset, staging

from .example import GROUPS, IMAGE, PRICE, write_example


def test_round_trip_sorts_rows_by_group_and_keeps_their_order_within(tmp_path: Path) -> None:
    codes, values = write_example(tmp_path / "set")
    dataset = open_dataset(tmp_path / "set", verify=True)
    assert dataset.kind == "values" and list(dataset.splits) == ["train", "validation", "test"]
    assert dataset.metadata["source"] == "made up" and dataset.metadata["extra"] == {"note": 1}
    train = dataset.splits["train"]
    assert train.fields == (IMAGE, PRICE)
    assert train.group_names == ["a", "b"] and train.num_rows == 5
    assert train.starts.tolist() == [0, 2] and train.counts.tolist() == [2, 3]
    assert train.starts.dtype == train.counts.dtype == np.int64
    assert train.parent_names == ["P", "Q"] and train.parents is not None
    assert train.parents.tolist() == [1, 0] and train.parents.dtype == np.int32
    for table in dataset.splits.values():
        for name, start, count in zip(table.group_names, table.starts, table.counts, strict=True):
            number = next(n for n, group in enumerate(GROUPS) if group.name == name)
            for field in ("image", "price"):
                stored = table.column(field)[start : start + count]
                np.testing.assert_array_equal(stored, values[field][codes == number])


def test_columns_are_read_only_views_of_the_map(tmp_path: Path) -> None:
    write_example(tmp_path / "set")
    table = open_dataset(tmp_path / "set").splits["train"]
    before = pa.total_allocated_bytes()
    column = table.column("image")
    assert pa.total_allocated_bytes() == before
    assert not column.flags.owndata and not column.flags.writeable
    assert column.dtype == np.uint8 and column.shape == (5, 1, 2, 3)
    with pytest.raises(ValueError, match="read-only"):
        column[0] = 0


def test_gather_copies_and_scales(tmp_path: Path) -> None:
    write_example(tmp_path / "set")
    table = open_dataset(tmp_path / "set").splits["train"]
    rows = np.array([4, 0, 4])
    examples = table.gather(rows)
    (image,), (price,) = examples
    assert image.dtype == price.dtype == np.float32
    np.testing.assert_array_equal(image, (table.column("image")[rows].astype(np.float32) - 10) * 0.5)
    np.testing.assert_array_equal(price, table.column("price")[rows].astype(np.float32))
    image[:] = 0
    with pytest.raises(IndexError):
        table.gather(np.array([5]))


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "int32", "int64", "uint16", "uint8", "float16", "float32", "float64"]
)
@pytest.mark.parametrize("shape", [(), (3,)])
def test_every_dtype_survives(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    values = (np.arange(4 * max(1, int(np.prod(shape)))) % 2).astype(dtype).reshape(4, *shape)
    with staging(tmp_path / "set", overwrite=False) as directory:
        groups = [Group("g", "train", 4)]
        writer = DatasetWriter(directory, [Field("x", "input", dtype, shape)], groups, About("classes", "s", "l", {}))
        writer.add(np.zeros(4, int), {"x": values})
        writer.finish()
    table = open_dataset(tmp_path / "set", verify=True).splits["train"]
    column = table.column("x")
    assert column.dtype == dtype and not column.flags.owndata and table.parents is None
    np.testing.assert_array_equal(column, values)
    gathered = table.gather(np.array([1])).inputs[0]
    assert gathered.dtype == (np.float32 if dtype == "uint8" or "float" in dtype else np.dtype(dtype))


def test_float64_is_shifted_before_it_is_rounded(tmp_path: Path) -> None:
    field = Field("time", "input", "float64", (), offset=1.7e9)
    with staging(tmp_path / "set", overwrite=False) as directory:
        writer = DatasetWriter(directory, [field], [Group("g", "train", 2)], About("classes", "s", "l", {}))
        writer.add(np.zeros(2, int), {"time": np.array([1.7e9 + 1, 1.7e9 + 2])})
        writer.finish()
    assert open_dataset(tmp_path / "set").splits["train"].gather(np.arange(2)).inputs[0].tolist() == [1, 2]


def test_a_dataset_and_a_table_travel_as_their_path(tmp_path: Path) -> None:
    write_example(tmp_path / "set")
    dataset = open_dataset(tmp_path / "set")
    message = pickle.dumps(dataset)
    assert len(message) < 500
    again = pickle.loads(message)
    assert again.digest == dataset.digest and len(dataset.digest) <= 36
    table = pickle.loads(pickle.dumps(dataset.splits["test"]))
    np.testing.assert_array_equal(table.column("image"), dataset.splits["test"].column("image"))


def test_the_digest_depends_on_content_only(tmp_path: Path) -> None:
    write_example(tmp_path / "one", block=2)
    write_example(tmp_path / "two", block=10)
    assert open_dataset(tmp_path / "one").digest == open_dataset(tmp_path / "two").digest


def test_gathering_80_images_takes_well_under_a_millisecond(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    with staging(tmp_path / "set", overwrite=False) as directory:
        field = Field("image", "input", "uint8", (1, 28, 28), scale=1 / 255)
        writer = DatasetWriter(directory, [field], [Group("g", "train", 5000)], About("classes", "s", "l", {}))
        writer.add(np.zeros(5000, int), {"image": generator.integers(0, 256, (5000, 1, 28, 28), dtype=np.uint8)})
        writer.finish()
    table = open_dataset(tmp_path / "set").splits["train"]
    draws = [generator.integers(0, 5000, 80) for _ in range(200)]
    seconds = []
    for rows in draws:
        start = time.perf_counter()
        table.gather(rows)
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 500e-6  # 22 us on an idle core; the bound only catches a lost fast path


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("numpy", "pyarrow", "PIL", "sklearn", "torch", "ray")
    code = f"import sys, metadist.data; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a dataset folder"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no train\.arrow"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -7000, -40, -1])
def test_a_file_cut_short_is_refused(tmp_path: Path, keep: int) -> None:
    write_example(tmp_path / "set")
    file = tmp_path / "set" / "test.arrow"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"test\.arrow is damaged.*import it again"):
        open_dataset(tmp_path / "set")


def test_a_file_with_flipped_bytes_is_refused_or_fails_verification(tmp_path: Path) -> None:
    write_example(tmp_path / "set")
    file = tmp_path / "set" / "train.arrow"
    content = file.read_bytes()
    table = open_dataset(tmp_path / "set").splits["train"]
    at = content.index(table.column("image").tobytes())
    file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    open_dataset(tmp_path / "set")
    with pytest.raises(InputError, match="does not match its digest"):
        open_dataset(tmp_path / "set", verify=True)


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    write_example(tmp_path / "set")
    file = tmp_path / "set" / "train.arrow"
    content = file.read_bytes()
    generator = np.random.default_rng(1)
    for _ in range(300):
        damaged = bytearray(content)
        for place in generator.integers(0, len(content), 12):
            damaged[place] = generator.integers(0, 256)
        file.unlink()
        file.write_bytes(damaged)
        try:
            open_dataset(tmp_path / "set", verify=True)
        except InputError:
            continue


def test_another_arrow_file_is_refused(tmp_path: Path) -> None:
    table = pa.table({"a": [1, 2]})
    with pa.OSFile(str(tmp_path / "train.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    with pytest.raises(InputError, match=r"train\.arrow is damaged or no metadist dataset"):
        open_dataset(tmp_path)


def rewrite(file: Path, change, codes: list[int] | None = None, batches: int = 1) -> None:
    """Write the file again with another header, other group codes, or several batches."""
    batch = pa.ipc.open_file(pa.BufferReader(file.read_bytes())).get_batch(0)
    header = json.loads(batch.schema.metadata[b"metadist"])
    change(header)
    columns = list(batch.columns)
    if codes is not None:
        columns[0] = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), columns[0].dictionary)
    schema = batch.schema.with_metadata({b"metadist": json.dumps(header).encode()})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as out:
        for _ in range(batches):
            out.write_batch(pa.record_batch(columns, schema=schema))


def test_a_later_format_names_the_metadist_it_needs(tmp_path: Path) -> None:
    write_example(tmp_path / "set")
    rewrite(tmp_path / "set" / "train.arrow", lambda header: header.update(version=2, needs="3.1"))
    with pytest.raises(InputError, match=r"format 2 and this metadist reads 1; install metadist >= 3\.1"):
        open_dataset(tmp_path / "set")


@pytest.mark.parametrize("key", ["kind", "digest", "fields", "counts", "version"])
def test_an_incomplete_header_is_refused(tmp_path: Path, key: str) -> None:
    write_example(tmp_path / "set")
    rewrite(tmp_path / "set" / "train.arrow", lambda header: header.pop(key))
    with pytest.raises(InputError, match=r"train\.arrow is damaged or no metadist dataset .its header"):
        open_dataset(tmp_path / "set")


def test_a_field_of_no_known_type_is_refused(tmp_path: Path) -> None:
    write_example(tmp_path / "set")
    rewrite(tmp_path / "set" / "train.arrow", lambda header: header["fields"][0].update(dtype="uint9"))
    with pytest.raises(InputError, match="does not describe its fields"):
        open_dataset(tmp_path / "set")


def test_scattered_groups_are_refused(tmp_path: Path) -> None:
    write_example(tmp_path / "set")
    rewrite(tmp_path / "set" / "train.arrow", lambda header: None, codes=[0, 1, 0, 1, 1])
    with pytest.raises(InputError, match="do not lie together"):
        open_dataset(tmp_path / "set")


def test_several_batches_are_refused(tmp_path: Path) -> None:
    write_example(tmp_path / "set")
    rewrite(tmp_path / "set" / "train.arrow", lambda header: None, batches=2)
    with pytest.raises(InputError, match="2 record batches instead of 1"):
        open_dataset(tmp_path / "set")


def test_splits_of_different_datasets_are_refused(tmp_path: Path) -> None:
    write_example(tmp_path / "set")
    rewrite(tmp_path / "set" / "test.arrow", lambda header: header["fields"][0].update(scale=9.0))
    with pytest.raises(InputError, match="have different fields"):
        open_dataset(tmp_path / "set")


def aged(folder: Path) -> None:
    """As if the files had been written long ago: what was changed just now is never reused."""
    for file in folder.iterdir():
        os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns - 10**10))


def test_one_path_is_opened_once_while_its_files_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_example(tmp_path / "set")
    aged(tmp_path / "set")
    dataset = open_dataset(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    assert open_dataset("set") is dataset and open_dataset(tmp_path / "set", verify=True) is dataset
    assert pickle.loads(pickle.dumps(dataset)) is dataset
    for number in range(9):
        write_example(tmp_path / f"other{number}")
        aged(tmp_path / f"other{number}")
        open_dataset(tmp_path / f"other{number}")
    assert open_dataset("set") is not dataset  # the least recently opened are forgotten


@pytest.mark.parametrize("change", ["rewritten", "replaced", "removed", "another", "in place just now"])
def test_a_changed_dataset_is_opened_anew(tmp_path: Path, change: str) -> None:
    out, file = tmp_path / "set", tmp_path / "set" / "train.arrow"
    write_example(out)
    aged(out)
    old = open_dataset(out)
    if change == "rewritten":
        rewrite(file, lambda header: header.update(source="somebody else"))
    elif change == "replaced":  # of the same size and time of change
        rewrite(tmp_path / "set" / "test.arrow", lambda header: None)
        stamp, content = file.stat().st_mtime_ns, file.read_bytes()
        file.unlink()
        file.write_bytes(content)
        os.utime(file, ns=(stamp, stamp))
    elif change == "removed":
        (out / "test.arrow").unlink()
    elif change == "another":
        os.rename(out, tmp_path / "old")
        write_example(out, block=2)
    else:
        for source in ("one", "two"):
            rewrite(file, lambda header, source=source: header.update(source=source))
            assert open_dataset(out).metadata["source"] == source
    new = open_dataset(out)
    assert new is not old
    assert list(new.splits) == (["train", "validation"] if change == "removed" else ["train", "validation", "test"])
    assert new.metadata["source"] == {"rewritten": "somebody else", "in place just now": "two"}.get(change, "made up")
