"""Arrays in files of any size, of which little is in memory at a time: what is done with is given back."""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BLOCK_BYTES = 1 << 24


def mapped_array(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """A new file as an array."""
    return np.memmap(file, dtype=dtype, mode="w+", shape=shape)


def blocks(array: np.ndarray, block_bytes: int = BLOCK_BYTES) -> Iterator[slice]:
    """Consecutive rows of an array, about so many bytes at a time; those of a mapped file are given back after each."""
    step = max(1, block_bytes // max(1, array[:1].nbytes))
    for number, start in enumerate(range(0, len(array), step), start=1):
        yield slice(start, start + step)
        if number * block_bytes % BLOCK_BYTES == 0:
            give_back(array)


def give_back(array: np.ndarray) -> None:
    """Let a mapped file's pages go from this process's memory; the file keeps them."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


class BlockWriter:
    """A file for pyarrow to write `arrays` to: in blocks, after each of which their pages are given back."""

    def __init__(self, path: Path, arrays: list[np.ndarray]) -> None:
        self._file, self._arrays = path.open("wb"), arrays

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BLOCK_BYTES):
            self._file.write(view[start : start + BLOCK_BYTES])
            if len(view) > BLOCK_BYTES:
                for array in self._arrays:
                    give_back(array)
        return len(view)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        self._file.close()
