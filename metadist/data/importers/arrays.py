"""Where a column of a Parquet, Arrow or CSV file becomes a numpy array: of numbers, or of names and codes."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from metadist.core.errors import InputError
from metadist.data.importers.names import clean, note_cleaned
from metadist.data.notes import Notes, shown

pc: Any = pyarrow.compute  # its functions are made at run time, which type checkers do not see
types: Any = pa.types
_LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)


def numbers(batch: pa.RecordBatch, column: str, source: Path | str, example: str = "") -> tuple[np.ndarray, np.ndarray]:
    """A column of numbers or of equally long lists of numbers: values and which are present (neither null nor NaN),
    [n] or [n, width]. Absent values are 0. Raises InputError for other types, with an `example` of their values."""
    values = batch.column(column)
    if not isinstance(values.type, _LISTS):
        return _scalars(values, column, source, example)
    present = values.is_valid().to_numpy(zero_copy_only=False)
    lists = values.drop_null()
    if types.is_fixed_size_list(values.type):
        width = values.type.list_size
    else:
        lengths = pc.list_value_length(lists).unique().to_pylist()
        if len(lengths) > 1 or lengths == [0]:
            raise InputError(f"column {column!r} of {source} has lists of several lengths; make them equally long")
        width = lengths[0] if lengths else 0
    flat, inner = _scalars(lists.flatten(), column, source, example)
    out, known = (np.zeros((len(values), width), dtype) for dtype in (flat.dtype, bool))
    if width:
        out[present], known[present] = flat.reshape(-1, width), inner.reshape(-1, width)
    return out, known


def _is_numeral(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _scalars(values: pa.Array, column: str, source: Path | str, example: str) -> tuple[np.ndarray, np.ndarray]:
    kind = values.type
    if types.is_null(kind):
        return np.zeros(len(values), np.float32), np.zeros(len(values), bool)
    if not is_number(kind):
        if types.is_string(kind) or types.is_large_string(kind):
            example = next((text for text in values.drop_null().to_pylist() if not _is_numeral(text)), example)
        such = f" ({shown(example)!r} for example)" if example else ""
        raise InputError(f"column {column!r} of {source} is {kind}, not numbers{such}; encode it as numbers first")
    if types.is_uint64(kind):  # models take none
        try:
            values = values.cast(pa.int64())
        except pa.ArrowInvalid as error:
            why = f"column {column!r} of {source} has numbers above {2**63 - 1}"
            raise InputError(f"{why}; write them as floats") from error
    present = values.is_valid().to_numpy(zero_copy_only=False)
    data = np.zeros(len(values), dtype=values.type.to_pandas_dtype())
    data[present] = values.drop_null().to_numpy(zero_copy_only=False)
    if data.dtype.kind == "f":
        present = present & ~np.isnan(data)
        data[~present] = 0
    return data, present


def instants(batch: pa.RecordBatch, column: str, source: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """A column of times as numbers that order them, and which are there, [n] each: numbers as they are, times and dates
    as microseconds, texts as ISO 8601 writes them. Raises InputError for what cannot be ordered."""
    values = batch.column(column)
    try:
        if types.is_string(values.type):
            texts = pc.utf8_trim_whitespace(values)
            texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
            zoned = pc.any(pc.match_substring_regex(texts, r"(Z|[+-]\d\d:?\d\d)$")).as_py()
            values = texts.cast(pa.timestamp("us", "UTC" if zoned else None))
        if types.is_timestamp(values.type) or types.is_date(values.type):
            values = values.cast(pa.timestamp("us", getattr(values.type, "tz", None)), safe=False).cast(pa.int64())
        elif types.is_time(values.type) or types.is_duration(values.type):
            values = values.cast(pa.int64() if values.type.bit_width == 64 else pa.int32())
    except pa.ArrowException as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise InputError(
            f"column {column!r} of {source} holds no times ({why}); write numbers, or times like 2024-05-31 or "
            "2024-05-31T12:30:00"
        ) from error
    return _scalars(values, column, source, "")


def strings(
    batch: pa.RecordBatch, column: str, source: Path | str, notes: Notes | None = None
) -> tuple[list[str], np.ndarray]:
    """A column as names and codes: distinct names ("" where there is none), and int64 [n] into them.

    Names are cleaned of spaces around them and other Unicode forms, and whole-number floats lose their ".0": both are
    noted.
    """
    values = batch.column(column)
    if types.is_floating(values.type):
        values = _whole(values, column, source, notes)
    if types.is_nested(values.type):
        raise InputError(f"column {column!r} of {source} is {values.type}, not names; give it text or integers")
    try:
        encoded = pc.fill_null(values.cast(pa.string()), "").dictionary_encode()
        raw = encoded.dictionary.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"column {column!r} of {source} ({values.type}) holds no names; give it UTF-8 text") from error
    known = {name: number for number, name in enumerate(dict.fromkeys(map(clean, raw)))}
    codes = encoded.indices.to_numpy().astype(np.int64)
    if notes is not None and len(codes):
        for name, count in zip(raw, np.bincount(codes, minlength=len(raw)).tolist(), strict=True):
            if clean(name) != name and clean(name):
                note_cleaned(f"values of column {shown(column)!r}", name, notes, count)
    return list(known), np.array([known[clean(name)] for name in raw], dtype=np.int64)[codes]


def _whole(values: pa.Array, column: str, source: Path | str, notes: Notes | None) -> pa.Array:
    """Whole-number floats, as tables with gaps have them, as integers; NaN is null."""
    present = values.drop_null().to_numpy(zero_copy_only=False).astype(np.float64)
    present = present[~np.isnan(present)]
    fractions = present[(present != np.floor(present)) | (np.abs(present) > 2**53)]
    if len(fractions):
        raise InputError(
            f"column {column!r} of {source} is {values.type}, not names ({fractions[0]} for example); give it text or "
            "whole numbers"
        )
    if notes is not None and len(present):
        why, example = f"column {shown(column)!r} is {values.type}", f"{present[0]} as {int(present[0])}"
        notes.add("whole-number floats read as names", why, example, "write them as integers or text", len(present))
    floats = values.cast(pa.float64())
    return pc.if_else(pc.is_nan(floats), pa.scalar(None, pa.float64()), floats).cast(pa.int64())


def plain(values: pa.Array) -> pa.Array:
    """An array without dictionaries, views and extension types."""
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if types.is_run_end_encoded(values.type):
        values = pc.run_end_decode(values)
    if types.is_list_view(values.type) or types.is_large_list_view(values.type):  # whose cast of a slice is wrong
        lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy()
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        values = pa.ListArray.from_arrays(pa.array(offsets), pc.list_flatten(values), mask=values.is_null())
    kind = plain_type(values.type)
    return values if kind == values.type else values.cast(kind, safe=False)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """What `plain` makes of a type: decimals become int64 where they are whole and fit, else float64."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_decimal(kind):
        return pa.int64() if kind.scale == 0 and kind.precision <= 18 else pa.float64()
    if isinstance(kind, _LISTS):
        return pa.list_(plain_type(kind.value_type), kind.list_size if types.is_fixed_size_list(kind) else -1)
    return kind


def common_type(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both, or None: null gives way, integers widen, integer and float are float."""
    if one == two or types.is_null(two):
        return one
    if types.is_null(one):
        return two
    if isinstance(one, _LISTS) and isinstance(two, _LISTS):
        inner = common_type(one.value_type, two.value_type)
        return None if inner is None else pa.list_(inner)
    if not (is_number(one) and is_number(two)):
        return None
    if types.is_floating(one) and types.is_floating(two):
        return max(one, two, key=lambda kind: kind.bit_width)
    return pa.float64() if types.is_floating(one) or types.is_floating(two) else pa.int64()


def is_number(kind: pa.DataType) -> bool:
    """Whether values of a type can be an input as they are."""
    return types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)
