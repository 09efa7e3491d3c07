"""What a dataset holds, in JSON-able terms."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from metadist.data.table import Dataset, Table, open_dataset


def describe(path: str | Path) -> dict[str, Any]:
    """Kind, fields, splits (groups, rows, parents, rows per group), stored value ranges, source, licence, digest, size
    in bytes, import options, notes of the import. Raises InputError where the dataset cannot be opened."""
    dataset = open_dataset(path)
    return {
        "path": str(dataset.path),
        "kind": dataset.kind,
        "fields": [asdict(field) | {"shape": list(field.shape)} for field in dataset.fields],
        "splits": {split: _split(table) for split, table in dataset.splits.items()},
        "ranges": _ranges(dataset),
        **{key: dataset.metadata[key] for key in ("source", "licence", "options", "extra", "notes")},
        "format_version": dataset.metadata["version"],
        "digest": dataset.digest,
        "size_bytes": sum(file.stat().st_size for file in dataset.path.iterdir() if file.is_file()),
    }


def _split(table: Table) -> dict[str, Any]:
    return {
        "groups": len(table.group_names),
        "rows": table.num_rows,
        "rows_per_group": {"min": int(table.counts.min()), "max": int(table.counts.max())},
        "parents": len(table.parent_names),
    }


def _ranges(dataset: Dataset) -> dict[str, list[float]]:
    """Smallest and largest stored value of each field over all splits."""
    found: dict[str, list[float]] = {}
    for ranges in [table.metadata["ranges"] for table in dataset.splits.values()] + [dataset.shared_ranges]:
        for name, (low, high) in ranges.items():
            known = found.get(name, [low, high])
            found[name] = [min(low, known[0]), max(high, known[1])]
    return found
