"""Arrow columns as names and as numpy arrays."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from metadist.core.errors import InputError
from metadist.data.importers.names import clean, note_cleaned
from metadist.data.notes import Notes, shown

pc: Any = pyarrow.compute  # its functions are made at run time, which type checkers do not see


def strings(
    batch: pa.RecordBatch, column: str, source: Path, notes: Notes | None = None
) -> tuple[list[str], np.ndarray, int]:
    """A column as names and codes: distinct names, int64 [n] into them, and how many rows have no name ("").

    Names are cleaned of spaces around them and other Unicode forms, and whole-number floats lose their ".0": both are
    noted.
    """
    values = batch.column(column)
    if pa.types.is_floating(values.type):
        values = _whole(values, column, source, notes)
    if pa.types.is_nested(values.type):
        raise InputError(f"column {column!r} of {source} is {values.type}, not names; give it text or integers")
    try:
        encoded = pc.fill_null(values.cast(pa.string()), "").dictionary_encode()
        raw = encoded.dictionary.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"column {column!r} of {source} ({values.type}) holds no names; give it UTF-8 text") from error
    known = {name: number for number, name in enumerate(dict.fromkeys(map(clean, raw)))}
    codes = encoded.indices.to_numpy().astype(np.int64)
    if notes is not None and len(codes):
        counts = np.bincount(codes, minlength=len(raw)).tolist()
        for name, count in zip(raw, counts, strict=True):
            if clean(name) != name and clean(name):
                note_cleaned(f"values of column {shown(column)!r}", name, notes, count)
    codes = np.array([known[clean(name)] for name in raw], dtype=np.int64)[codes]
    return list(known), codes, int((codes == known[""]).sum()) if "" in known else 0


def _whole(values: pa.Array, column: str, source: Path, notes: Notes | None) -> pa.Array:
    """Whole-number floats, as tables with gaps have them, as integers; NaN is null."""
    present = values.drop_null().to_numpy(zero_copy_only=False).astype(np.float64)
    present = present[~np.isnan(present)]
    if not np.all((present == np.floor(present)) & (np.abs(present) <= 2**53)):
        example = present[(present != np.floor(present)) | (np.abs(present) > 2**53)][0]
        raise InputError(
            f"column {column!r} of {source} is {values.type}, not names ({example} for example); give it text or "
            "whole numbers"
        )
    if notes is not None and len(present):
        why, example = f"column {shown(column)!r} is {values.type}", f"{present[0]} as {int(present[0])}"
        notes.add("whole-number floats read as names", why, example, "write them as integers or text", len(present))
    numbers = values.cast(pa.float64())
    return pc.if_else(pc.is_nan(numbers), pa.scalar(None, pa.float64()), numbers).cast(pa.int64())


def numbers(batch: pa.RecordBatch, column: str, source: Path, example: str = "") -> tuple[np.ndarray, np.ndarray]:
    """A column of numbers or of equally long lists of numbers: values and which are present (neither null nor NaN),
    [n] or [n, width]. Absent values are 0."""
    values = batch.column(column)
    kind = values.type
    if not is_list(kind):
        return _scalars(values, column, source, example)
    present = values.is_valid().to_numpy(zero_copy_only=False)
    lists = values.drop_null()
    width = kind.list_size if pa.types.is_fixed_size_list(kind) else None
    if width is None:
        lengths = pc.list_value_length(lists).unique().to_pylist()
        if len(lengths) > 1 or lengths == [0]:
            raise InputError(f"column {column!r} of {source} has lists of several lengths; make them equally long")
        width = lengths[0] if lengths else 0
    flat, inner = _scalars(lists.flatten(), column, source, example)
    out = np.zeros((len(values), width), dtype=flat.dtype)
    known = np.zeros((len(values), width), dtype=bool)
    if width:
        out[present], known[present] = flat.reshape(-1, width), inner.reshape(-1, width)
    return out, known


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)


def _scalars(values: pa.Array, column: str, source: Path, example: str) -> tuple[np.ndarray, np.ndarray]:
    kind = values.type
    if pa.types.is_null(kind):
        return np.zeros(len(values), np.float32), np.zeros(len(values), bool)
    if not (pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        told = f" ({shown(example)!r} for example)" if example else ""
        raise InputError(f"column {column!r} of {source} is {kind}, not numbers{told}; encode it as numbers first")
    if pa.types.is_uint64(kind):
        values = _signed(values, column, source)
        kind = values.type
    present = values.is_valid().to_numpy(zero_copy_only=False)
    data = np.zeros(len(values), dtype=kind.to_pandas_dtype())
    data[present] = values.drop_null().to_numpy(zero_copy_only=False)
    if data.dtype.kind == "f":
        present = present & ~np.isnan(data)
        data[~present] = 0
    return data, present


def _signed(values: pa.Array, column: str, source: Path) -> pa.Array:
    """Models take no uint64."""
    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise InputError(
            f"column {column!r} of {source} has numbers above {2**63 - 1}; write them as floats"
        ) from error
