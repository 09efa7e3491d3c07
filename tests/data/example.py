"""Small datasets, made where a test wants them."""

import hashlib
from pathlib import Path

import numpy as np

from metadist.core.task import Task
from metadist.data import About, DatasetWriter, Field, Group, staging

IMAGE = Field("image", "input", "uint8", (1, 2, 3), offset=10.0, scale=0.5)
PRICE = Field("price", "target", "float64", ())
GROUPS = [
    Group("b", "train", 3, "P"),
    Group("a", "train", 2, "Q"),
    Group("c", "validation", 1, "P"),
    Group("d", "test", 4, "R"),
]
ABOUT = About("values", "made up", "none", {"importer": "example"}, {"note": 1})


def rows_of(groups: list[Group]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Group numbers and values of every row, groups interleaved."""
    codes = np.repeat(np.arange(len(groups)), [group.rows for group in groups])
    codes = codes[np.argsort(np.arange(len(codes)) * 7 % 11, kind="stable")]
    n = len(codes)
    image = (np.arange(n * 6) % 256).astype(np.uint8).reshape(n, 1, 2, 3)
    return codes, {"image": image, "price": np.arange(n) * 1.5}


def write_example(out: Path, block: int = 4) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    codes, values = rows_of(GROUPS)
    with staging(out, overwrite=False) as directory:
        writer = DatasetWriter(directory, [IMAGE, PRICE], GROUPS, ABOUT)
        for start in range(0, len(codes), block):
            part = slice(start, start + block)
            writer.add(codes[part], {name: data[part] for name, data in values.items()})
        writer.finish()
    return codes, values


def digest(task: Task) -> str:
    """Stands for the types, shapes and bytes of a task's arrays."""
    content = hashlib.sha256()
    for part in task:
        for array in (*part.inputs, *part.targets):
            content.update(f"{array.dtype.str} {array.shape}".encode())
            content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()[:16]
