"""An append-only file of JSON records, one a line, that survives the death of the process writing it."""

import json
import os
from pathlib import Path
from typing import Any

from metadist.errors import InputError


class Journal:
    """Appends records to `path`. A record that a dying process left half-written is cut off at opening, so that a new
    one never glues to it. Raises InputError when an earlier line is damaged, OSError when the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.truncate(path, _whole_records(path)[1])
        self._file = path.open("ab")

    def append(self, record: dict[str, Any], *, sync: bool = False) -> None:
        """Writes one record of plain JSON values (no NaN: ValueError). With `sync` it is on the disk at return."""
        line = json.dumps(record, allow_nan=False, separators=(",", ":"))
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        if sync:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The records in order; none when there is no file. A torn last line is left out, a damaged one elsewhere is an
    InputError that names it.
    """
    return _whole_records(path)[0] if path.exists() else []


def _whole_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records and the number of bytes they take. A line counts once its newline is there."""
    lines = path.read_bytes().splitlines(keepends=True)
    records: list[dict[str, Any]] = []
    size = 0
    for number, line in enumerate(lines, start=1):
        record = _parsed(line)
        if record is None:
            if number == len(lines):
                break
            raise InputError(
                f"Line {number} of {path} is damaged: restore the file from a copy, or delete the lines from there on."
            )
        records.append(record)
        size += len(line)
    return records, size


def _parsed(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
