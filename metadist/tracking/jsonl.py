"""`metrics.jsonl`: every number of a run, one JSON object a line. What the other trackers show is copied from here."""

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metadist.core.errors import InputError
from metadist.core.files import JsonLines, read_json_lines
from metadist.tracking import Status, Tracker

BATCH_BYTES = 1 << 15  # about 1000 values
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class JsonlTracker(Tracker):
    """Appends `{"step": ..., "time": ..., name: value, ...}` lines to `path`, flushed one by one.

    `time` is in seconds since 1970. JSON has no non-finite numbers: they are written as "nan", "inf", "-inf".
    Settings, tags and files are not kept here: they lie beside this file in the run directory. After a resume the steps
    since the checkpoint appear a second time. Raises StorageFailed when the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        numbers = {name: _written(float(value)) for name, value in values.items()}
        self._lines.append({"step": step, "time": round(time.time(), 3), **numbers})

    def finish(self, status: Status) -> None:
        self._lines.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file in the order written, non-finite values as floats again.

    A torn last line (its process died while writing) is left out; a damaged line elsewhere is an InputError.
    """
    if not path.exists():
        raise InputError(f"There is no {path}: give a run directory in which training has begun.")
    return [numbers(row) for row in read_json_lines(path)]


def line_batches(path: Path, offset: int) -> Iterator[tuple[list[bytes], int]]:
    """The whole lines of a metrics file from a byte on, some at a time, each time with the byte at which they end."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        while lines := file.readlines(BATCH_BYTES):
            whole = [line for line in lines if line.endswith(b"\n")]
            offset += sum(map(len, whole))
            yield whole, offset
            if len(whole) < len(lines):  # the rest is being written
                return


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """A line of the file as it was before it was written: with numbers that are not finite."""
    return {name: _NON_FINITE.get(value, value) if isinstance(value, str) else value for name, value in row.items()}


def _written(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
