import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from metadist.core.errors import InputError
from metadist.data import About, DatasetWriter, Field, Group, open_dataset, staging

from .example import ABOUT, GROUPS, IMAGE, PRICE, rows_of, write_example

SHARED = Field("molecule", "input", "float32", (2,), shared=True)
VALUE = Field("value", "target", "float32", ())


def test_memory_stays_bounded_however_large_the_table(tmp_path: Path) -> None:
    rows, width, block = 40_000, 2048, 500  # 82 MB
    tracemalloc.start()
    with staging(tmp_path / "set", overwrite=False) as directory:
        groups = [Group(f"{n:03d}", "train", rows // 100) for n in range(100)]
        writer = DatasetWriter(directory, [Field("x", "input", "uint8", (width,))], groups, ABOUT)
        for start in range(0, rows, block):
            codes = np.arange(start, start + block) % 100
            writer.add(codes, {"x": np.full((block, width), start % 251, np.uint8)})
        writer.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "set" / "train.arrow").stat().st_size > rows * width
    assert peak < 8e6


def test_progress_counts_rows(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with staging(tmp_path / "set", overwrite=False) as directory:
        codes, values = rows_of(GROUPS)
        report = DatasetWriter(directory, [IMAGE, PRICE], GROUPS, ABOUT, progress=lambda *at: seen.append(at))
        report.add(codes[:6], {name: data[:6] for name, data in values.items()})
        report.add(codes[6:], {name: data[6:] for name, data in values.items()})
        report.finish()
    assert seen == [(6, 10), (10, 10)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError, RuntimeError])
def test_nothing_is_left_when_an_import_ends_early(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "new" / "deeper" / "set"
    with pytest.raises(error), staging(out, overwrite=False) as directory:
        writer = DatasetWriter(directory, [IMAGE, PRICE], GROUPS, ABOUT)
        codes, values = rows_of(GROUPS)
        writer.add(codes, values)
        raise error("stop")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_another_process_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from metadist.data.importers import sinusoid\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a background job of a shell ignores
        "stop = lambda done, total: os.kill(os.getpid(), signal.SIGINT)\n"
        "sinusoid(sys.argv[1], groups=(3000, 10, 10), progress=stop)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "set")], capture_output=True, text=True)
    assert done.returncode != 0 and "KeyboardInterrupt" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_overwriting_is_explicit_and_all_or_nothing(tmp_path: Path) -> None:
    out = tmp_path / "set"
    write_example(out)
    digest = open_dataset(out).digest
    with pytest.raises(InputError, match="exists and is not empty.*--overwrite"):
        write_example(out)
    with pytest.raises(RuntimeError), staging(out, overwrite=True):
        raise RuntimeError
    assert open_dataset(out).digest == digest
    with staging(out, overwrite=True) as directory:
        writer = DatasetWriter(directory, [VALUE], [Group("g", "train", 1)], ABOUT)
        writer.add(np.zeros(1, int), {"value": np.ones(1)})
        writer.finish()
    assert list(open_dataset(out).splits) == ["train"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def test_only_a_dataset_is_ever_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.tex"), staging(tmp_path, overwrite=True):
        pass
    with pytest.raises(InputError, match="is a file"), staging(tmp_path / "thesis.tex", overwrite=True):
        pass
    with pytest.raises(InputError, match="cannot be written"), staging(tmp_path / "thesis.tex" / "set", overwrite=True):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_example(tmp_path / "set")
    assert sorted(os.listdir(tmp_path / "set")) == ["test.arrow", "train.arrow", "validation.arrow"]


def test_rows_that_do_not_match_the_first_pass_are_refused(tmp_path: Path) -> None:
    codes, values = rows_of(GROUPS)
    with (
        pytest.raises(InputError, match="changed while it was being read"),
        staging(tmp_path / "set", overwrite=False) as directory,
    ):
        writer = DatasetWriter(directory, [IMAGE, PRICE], GROUPS, ABOUT)
        writer.add(codes[1:], {name: data[1:] for name, data in values.items()})
        writer.finish()
    with (
        pytest.raises(InputError, match="changed while it was being read"),
        staging(tmp_path / "set", overwrite=False) as directory,
    ):
        writer = DatasetWriter(directory, [IMAGE, PRICE], GROUPS, ABOUT)
        writer.add(codes, values)
        writer.add(codes[:1], {name: data[:1] for name, data in values.items()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "groups", "message"),
    [
        ([Field("group", "input", "int64", ())], GROUPS, "reserved or given twice"),
        ([VALUE, VALUE], GROUPS, "reserved or given twice"),
        ([VALUE], [], "no rows"),
        ([VALUE], [Group("a", "train", 1), Group("a", "test", 1)], "group in two splits"),
    ],
)
def test_an_impossible_dataset_is_refused(tmp_path: Path, fields, groups, message: str) -> None:
    with pytest.raises(InputError, match=message), staging(tmp_path / "set", overwrite=False) as directory:
        DatasetWriter(directory, fields, groups, ABOUT)
    assert list(tmp_path.iterdir()) == []


def write_shared(out: Path) -> None:
    with staging(out, overwrite=False) as directory:
        groups = [Group("t1", "train", 3), Group("t2", "test", 2)]
        writer = DatasetWriter(directory, [SHARED, VALUE], groups, About("values", "s", "l", {}), shared_rows=3)
        items = np.array([2, 0, 1, 0, 2])
        assert writer.add_shared(items, {"molecule": np.stack([items, -items], axis=1)}) is None
        writer.add(np.array([0, 0, 0, 1, 1]), {"value": np.arange(5), "index": items})
        writer.finish()


def test_groups_share_rows(tmp_path: Path) -> None:
    write_shared(tmp_path / "set")
    dataset = open_dataset(tmp_path / "set", verify=True)
    train, test = dataset.splits["train"], dataset.splits["test"]
    assert train.column("molecule").shape == test.column("molecule").shape == (3, 2)
    assert train.index is not None and train.index.tolist() == [2, 0, 1]
    inputs, targets = test.gather(np.array([1, 0]))
    assert inputs[0].tolist() == [[2, -2], [0, 0]] and targets[0].tolist() == [4, 3]


def test_shared_rows_that_contradict_each_other_are_found(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="place"), staging(tmp_path / "set", overwrite=False) as directory:
        groups = [Group("t1", "train", 3)]
        writer = DatasetWriter(directory, [SHARED, VALUE], groups, ABOUT, shared_rows=3)
        assert writer.add_shared(np.array([0, 1, 1]), {"molecule": np.array([[0, 0], [1, 1], [1, 2]])}) == 1
        writer = DatasetWriter(directory, [SHARED, VALUE], groups, ABOUT, shared_rows=3)
        assert writer.add_shared(np.array([0, 1]), {"molecule": np.array([[0, 0], [1, 1]])}) is None
        assert writer.add_shared(np.array([2, 1]), {"molecule": np.array([[0, 0], [1, 3]])}) == 1
        raise RuntimeError("both were found in place")


def test_verification_reads_the_shared_rows_and_the_index(tmp_path: Path) -> None:
    write_shared(tmp_path / "set")
    for name, column in (("shared.arrow", "molecule"), ("test.arrow", "value")):
        file = tmp_path / "set" / name
        content = file.read_bytes()
        table = open_dataset(tmp_path / "set").splits["test"]
        at = content.index(table.column(column).tobytes())
        file.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
        with pytest.raises(InputError, match=rf"{name} is damaged.*digest"):
            open_dataset(tmp_path / "set", verify=True)
        file.write_bytes(content)
    file = tmp_path / "set" / "test.arrow"
    content = file.read_bytes()
    index = np.array([0, 2]).tobytes()
    at = content.rindex(index)
    file.write_bytes(content[:at] + np.array([0, 3]).tobytes() + content[at + 16 :])
    with pytest.raises(InputError, match="points outside the shared rows"):
        open_dataset(tmp_path / "set", verify=True)
    (tmp_path / "set" / "shared.arrow").unlink()
    with pytest.raises(InputError, match=r"shared\.arrow is missing"):
        open_dataset(tmp_path / "set")
