"""`metrics.jsonl`: every number of a run, one JSON object a line. What the other trackers show is copied from here."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metadist.core.errors import InputError
from metadist.core.files import MOST_LINES_BYTES, LineFile, read_file
from metadist.tracking import Status

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class JsonlTracker:
    """Appends `{"step": ..., "time": ..., name: value, ...}` lines to `path`, flushed one by one.

    `time` is in seconds since 1970. JSON has no non-finite numbers: they are written as "nan", "inf", "-inf".
    Settings, tags and files are not kept here: they lie beside this file in the run directory. After a resume the steps
    since the checkpoint appear a second time. Raises StorageFailed when the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._lines = LineFile(path, read_file(path, MOST_LINES_BYTES).rfind(b"\n") + 1 if path.exists() else 0)

    def params(self, values: dict[str, str]) -> None:
        pass

    def tags(self, values: dict[str, str]) -> None:
        pass

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        numbers = {name: _written(float(value)) for name, value in values.items()}
        self._lines.append(json.dumps({"step": step, "time": round(time.time(), 3), **numbers}, allow_nan=False))

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        pass

    def artifact(self, path: Path, folder: str = "") -> None:
        pass

    def finish(self, status: Status) -> None:
        self._lines.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file in the order written, non-finite values as floats again.

    A torn last line (its process died while writing) is left out; a damaged line elsewhere is an InputError.
    """
    if not path.exists():
        raise InputError(f"There is no {path}: give a run directory in which training has begun.")
    lines = read_file(path, MOST_LINES_BYTES).split(b"\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({name: _NON_FINITE.get(value, value) for name, value in row.items()})
        except (ValueError, RecursionError, AttributeError, TypeError) as error:
            raise InputError(f"Line {number} of {path} is damaged ({error}): delete that line.") from error
    return rows


def _written(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
