import errno
import os
import threading

import pytest

from metadist.checkpoint.journal import Journal, read_journal
from metadist.core.errors import StorageFailed
from metadist.core.files import JsonLines, read_json_lines, replace_text
from metadist.tracking.jsonl import JsonlTracker, read_metrics


@pytest.fixture
def nearly_full(monkeypatch):
    """A disk on which so many more bytes fit; None: as many as there are. The last write takes a part."""
    room: dict[str, int | None] = {"bytes": None}
    write = os.write

    def limited(descriptor, data):
        if room["bytes"] is None:
            return write(descriptor, data)
        if room["bytes"] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(descriptor, bytes(data)[: room["bytes"]])
        room["bytes"] -= written
        return written

    monkeypatch.setattr(os, "write", limited)
    return room


def test_a_full_disk_is_one_sentence_and_leaves_no_part_of_a_record(tmp_path, nearly_full):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append({"step": 0, "tasks": 4})
        for room in range(20):
            nearly_full["bytes"] = room
            with pytest.raises(StorageFailed, match=r"journal\.jsonl cannot be written \(No space left on device\)"):
                journal.append({"step": 1, "tasks": 4})
            assert read_journal(path) == [{"step": 0, "tasks": 4}]
        nearly_full["bytes"] = None
        journal.append({"step": 1, "tasks": 4})
    assert [record["step"] for record in read_journal(path)] == [0, 1]


def test_metrics_on_a_full_disk_likewise(tmp_path, nearly_full):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    nearly_full["bytes"] = 7
    with pytest.raises(StorageFailed, match=r"metrics\.jsonl cannot be written .*--resume auto"):
        tracker.metrics({"a": 1.0}, step=1)
    nearly_full["bytes"] = None
    tracker.metrics({"a": 2.0}, step=2)
    tracker.finish("FINISHED")
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2]


def test_lines_of_several_threads_do_not_mix(tmp_path):
    lines = JsonLines(tmp_path / "f")
    threads = [
        threading.Thread(target=lambda n=n: [lines.append({"n": f"{n}" * 50}, sync=i == 5) for i in range(50)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines.close()
    found = [record["n"] for record in read_json_lines(tmp_path / "f")]
    assert sorted(found) == sorted(f"{n}" * 50 for n in range(4) for _ in range(50))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    replace_text(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(StorageFailed, match=r"results\.json.*No space left"):
        patch.setattr(os, "replace", full)
        replace_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]
    with pytest.raises(StorageFailed, match="Not a directory"):
        replace_text(path / "inside", "new")
