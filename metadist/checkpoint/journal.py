"""The journal of a run, `journal.jsonl`: what it is judged by, the batches it planned, theta's hash at checkpoints."""

from pathlib import Path
from typing import Any

from metadist.core.errors import InputError
from metadist.core.files import JsonLines, read_json_lines
from metadist.core.measure import Measure
from metadist.core.redaction import redacted

MOST_TASKS = 10**12


class Journal(JsonLines):
    """Appends records to a file that survives the death of the process writing it; any thread may."""

    def append(self, record: dict[str, Any], *, sync: bool = False) -> None:
        super().append(redacted(record), sync=sync)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The records in order; none when there is no file. Raises InputError where one before the last is damaged."""
    return read_json_lines(path)


def planned_batches(records: list[dict[str, Any]]) -> dict[int, int]:
    """Meta-step -> number of its tasks; of a step planned again, as the last record says."""
    planned = {}
    for record in records:
        if "step" in record and "tasks" in record:
            step, tasks = record["step"], record["tasks"]
            if type(step) is not int or type(tasks) is not int or step < 0 or not 1 <= tasks <= MOST_TASKS:
                raise InputError(f"the journal says {step!r} has {tasks!r} tasks: restore the file from a copy")
            planned[step] = tasks
    return planned


def journalled_hashes(records: list[dict[str, Any]]) -> dict[int, str]:
    """Number of meta-steps done -> the hash of theta in the checkpoint saved then."""
    found = {}
    for record in records:
        if "done" in record:
            done, hashed = record["done"], record.get("theta_sha256")
            if type(done) is not int or done < 0 or not isinstance(hashed, str):
                raise InputError(f"the journal has {hashed!r} as theta's hash at {done!r}: restore it from a copy")
            found[done] = hashed
    return found


def journalled_measure(records: list[dict[str, Any]]) -> Measure | None:
    """What the run is judged by, as its last try says; None of a run from before that was journalled. Raises
    InputError."""
    said = [record["measure"] for record in records if "measure" in record]
    try:
        return Measure.parse(said[-1]) if said else None
    except ValueError as error:
        raise InputError(f"the journal is damaged ({error}): restore the file from a copy") from None
