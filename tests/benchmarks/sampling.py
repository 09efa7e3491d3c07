"""Tasks a second that one core samples out of a mapped file: `python tests/benchmarks/sampling.py [DATASET]`.

Without a dataset it makes one of Omniglot's size and shapes.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from metadist.core.task import TaskId
from metadist.data import About, DatasetWriter, Field, Group, open_dataset, staging
from metadist.data.sources import ClassSource

CHUNK = 8  # tasks that are drawn at once, as a worker draws those of a chunk


def make(out: Path, classes: int = 1100, drawings: int = 20) -> Path:
    """Random 28x28 uint8 images, `drawings` of each class."""
    groups = [Group(f"class{number:04d}", "train", drawings) for number in range(classes)]
    rng = np.random.default_rng(0)
    with staging(out, overwrite=False) as directory:
        field = Field("image", "input", "uint8", (1, 28, 28), scale=1 / 255)
        writer = DatasetWriter(directory, [field], groups, About("classes", "random", "none", {}))
        for number in range(classes):
            images = rng.integers(0, 256, (drawings, 1, 28, 28), dtype=np.uint8)
            writer.add(np.full(drawings, number), {"image": images})
        writer.finish()
    return out


def measure(path: Path, tasks: int = 5000, repeats: int = 5) -> list[float]:
    """Tasks a second, 5-way 1-shot 15-query, for each repeat."""
    source = ClassSource(open_dataset(path).splits, shots=1, queries=15, seed=0, ways=5)
    source(TaskId("train", 0, 0))
    rates = []
    for repeat in range(repeats):
        began = time.perf_counter()
        for first in range(0, tasks, CHUNK):
            list(source.sample([TaskId("train", repeat, index) for index in range(first, first + CHUNK)]))
        rates.append(tasks / (time.perf_counter() - began))
    return sorted(rates)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(Path(sys.argv[1]) if len(sys.argv) > 1 else make(Path(folder) / "random"))
    print(f"5-way 1-shot 15-query tasks a second: min {rates[0]:.0f}, median {rates[2]:.0f}, max {rates[-1]:.0f}")
