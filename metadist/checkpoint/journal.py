"""An append-only file of JSON records, one a line, that survives the death of the process writing it."""

import json
from pathlib import Path
from typing import Any

from metadist.core.errors import InputError
from metadist.core.files import MOST_LINES_BYTES, LineFile, read_file
from metadist.core.redaction import redacted

MOST_TASKS = 10**12


class Journal:
    """Appends records to `path`; any thread may. A record that a dying process left half-written is cut off at opening,
    so that a new one never glues to it. Raises InputError when an earlier line is damaged, StorageFailed when the file
    cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._lines = LineFile(path, _whole_records(path)[1] if path.exists() else 0)

    def append(self, record: dict[str, Any], *, sync: bool = False) -> None:
        """Writes one record of plain JSON values (no NaN: ValueError). With `sync` it is on the disk at return."""
        self._lines.append(json.dumps(redacted(record), allow_nan=False, separators=(",", ":")), sync=sync)

    def close(self) -> None:
        self._lines.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The records in order; none when there is no file. A torn last line is left out, a damaged one elsewhere is an
    InputError that names it.
    """
    return _whole_records(path)[0] if path.exists() else []


def planned_batches(records: list[dict[str, Any]]) -> dict[int, int]:
    """Tasks of each meta-step that was dealt; of one dealt again, as the last record says."""
    planned = {}
    for record in records:
        if "step" in record and "tasks" in record:
            step, tasks = record["step"], record["tasks"]
            if type(step) is not int or type(tasks) is not int or step < 0 or not 1 <= tasks <= MOST_TASKS:
                raise InputError(f"the journal says {step!r} has {tasks!r} tasks: restore the file from a copy")
            planned[step] = tasks
    return planned


def journalled_hashes(records: list[dict[str, Any]]) -> dict[int, str]:
    """The hash of theta after each number of meta-steps at which it was saved."""
    found = {}
    for record in records:
        if "done" in record:
            done, hashed = record["done"], record.get("theta_sha256")
            if type(done) is not int or done < 0 or not isinstance(hashed, str):
                raise InputError(f"the journal has {hashed!r} as theta's hash at {done!r}: restore it from a copy")
            found[done] = hashed
    return found


def _whole_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records and the number of bytes they take. A line counts once its newline is there."""
    lines = read_file(path, MOST_LINES_BYTES).splitlines(keepends=True)
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
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
