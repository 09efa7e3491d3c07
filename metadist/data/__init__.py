"""Few-shot data on disk: grouped Arrow tables, sources that draw tasks from them, and importers that write them.

The way of a value: `importers.arrays` makes numpy arrays of the columns of a Parquet, CSV or Arrow file, `writer` puts
them into Arrow files, `table` maps these and gathers rows, `sources` draws the rows of a task. A worker's engine makes
tensors of a task's arrays.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metadist.data.cache import cached
    from metadist.data.description import describe
    from metadist.data.online import Stream
    from metadist.data.preprocessing import Preprocessing, Preprocessor, preprocessing_of
    from metadist.data.remote import dataset_at, fetched_weights
    from metadist.data.shapes import Shapes, task_shapes
    from metadist.data.sources import ClassSource, LabelledSource, Source, TableSource, ValueSource, sample
    from metadist.data.table import Dataset, Field, Table, open_dataset
    from metadist.data.tokenizer import Tokenizer
    from metadist.data.writer import About, DatasetWriter, Group, staging

_HOMES = {
    "cache": ("cached",),
    "description": ("describe",),
    "online": ("Stream",),
    "preprocessing": ("Preprocessing", "Preprocessor", "preprocessing_of"),
    "remote": ("dataset_at", "fetched_weights"),
    "shapes": ("Shapes", "task_shapes"),
    "sources": ("ClassSource", "LabelledSource", "Source", "TableSource", "ValueSource", "sample"),
    "table": ("Dataset", "Field", "Table", "open_dataset"),
    "tokenizer": ("Tokenizer",),
    "writer": ("About", "DatasetWriter", "Group", "staging"),
}

__all__ = [
    "About", "ClassSource", "Dataset", "DatasetWriter", "Field", "Group", "LabelledSource", "Preprocessing",
    "Preprocessor", "Shapes", "Source", "Stream", "Table", "TableSource", "Tokenizer", "ValueSource", "cached",
    "dataset_at", "describe", "fetched_weights", "open_dataset", "preprocessing_of", "sample", "staging", "task_shapes",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import on first use: pyarrow is not loaded by those who need no data."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
