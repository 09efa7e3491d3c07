"""What a dataset's header says of its columns."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from metadist.core.errors import InputError


@dataclass(frozen=True)
class Field:
    """One column: an array of `shape` per row, stored as `dtype`.

    `gather` returns uint8 and float fields as float32 `(stored - offset) * scale`; the inverse is
    `value / scale + offset`. Other integers and booleans come out as stored, and ignore both. The values of a `shared`
    field lie in `shared.arrow`, one row per distinct item, and rows point to them.
    """

    name: str
    role: Literal["input", "target"]
    dtype: str
    shape: tuple[int, ...]
    offset: float = 0.0
    scale: float = 1.0
    shared: bool = False

    @property
    def arrow_type(self) -> pa.DataType:
        """How a row is stored. A lone bool takes a byte: Arrow's own are bits, which numpy cannot view."""
        if self.shape:
            return pa.binary(int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize)
        return pa.uint8() if self.dtype == "bool" else pa.from_numpy_dtype(np.dtype(self.dtype))


def damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is damaged or no metadist dataset ({why}); import it again")


def read_fields(path: Path, header: dict[str, Any]) -> tuple[Field, ...]:
    try:
        fields = tuple(Field(**{**field, "shape": tuple(field["shape"])}) for field in header["fields"])
        sound = all(map(_is_sound, fields)) and len({field.name for field in fields}) == len(fields) > 0
    except (KeyError, TypeError, ValueError, OverflowError, pa.ArrowException) as error:
        raise damaged(path, "its header does not describe its fields") from error
    if not sound:
        raise damaged(path, "its header does not describe its fields")
    return fields


def _is_sound(field: Field) -> bool:
    """Whether a header's field is one that the writer could have described."""
    numbers = [isinstance(value, int | float) and math.isfinite(value) for value in (field.offset, field.scale)]
    sizes = [type(size) is int and size > 0 for size in field.shape]
    return (
        isinstance(field.name, str)
        and field.role in ("input", "target")
        and isinstance(field.shared, bool)
        and all(numbers + sizes)
        and field.scale != 0
        and np.dtype(field.dtype).kind in "biuf"
        and np.dtype(field.dtype).name == field.dtype
        and math.prod(field.shape) < 2**31
        and field.arrow_type is not None
    )
