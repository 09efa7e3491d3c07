from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from metadist.data.mapped import BLOCK_BYTES, BlockWriter, blocks, give_back, mapped_array


def resident_mb(file: Path) -> float:
    """How much of a mapped file is in this process's memory."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = found or line.endswith(file.name)
        if found and line.startswith("Rss:"):
            return int(line.split()[1]) / 1024
    return 0.0


@pytest.fixture
def array(tmp_path: Path) -> np.ndarray:
    """48 MB of numbers in a file, all of them just written."""
    mapped = mapped_array(tmp_path / "numbers.raw", np.dtype(np.int64), (6 << 20, 1))
    mapped[:] = np.arange(len(mapped)).reshape(mapped.shape)
    return mapped


def test_what_is_given_back_stays_in_the_file(array: np.ndarray, tmp_path: Path) -> None:
    assert resident_mb(tmp_path / "numbers.raw") > 40
    give_back(array[5:100].view(np.uint8))  # of any view
    assert resident_mb(tmp_path / "numbers.raw") < 5
    assert array[:: 1 << 20, 0].tolist() == [n << 20 for n in range(6)]
    give_back(np.zeros(3))  # no mapped file: nothing happens


def test_blocks_are_all_rows_in_order_and_little_memory(array: np.ndarray, tmp_path: Path) -> None:
    seen, most = 0, 0.0
    for rows in blocks(array):
        part = array[rows]
        assert part[0, 0] == seen and part.nbytes <= BLOCK_BYTES
        seen += len(part)
        if seen > len(part):
            most = max(most, resident_mb(tmp_path / "numbers.raw"))
    assert seen == len(array) and most < 2 * BLOCK_BYTES / 1e6
    assert [*blocks(np.zeros((5, 2)), 32)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert [*blocks(np.zeros((0, 2)))] == []


def test_pyarrow_writes_through_it(array: np.ndarray, tmp_path: Path) -> None:
    column = pa.Array.from_buffers(pa.int64(), len(array), [None, pa.py_buffer(array)])
    batch = pa.record_batch([column, pa.array(range(len(array)), pa.int64())], names=["mapped", "plain"])
    sink = pa.PythonFile(BlockWriter(tmp_path / "out.arrow", [array]), "w")
    with sink, pa.ipc.new_file(sink, batch.schema) as file:
        file.write_batch(batch)
    assert resident_mb(tmp_path / "numbers.raw") < 5
    assert pa.ipc.open_file(tmp_path / "out.arrow").get_batch(0).equals(batch)
