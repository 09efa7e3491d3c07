"""Checkpoints beside the training, on stores that are slow, full or gone."""

import errno
import os
import threading
import time

import numpy as np
import pytest

from metadist.checkpoint import saver as saving
from metadist.checkpoint.format import Checkpoint, theta_sha256
from metadist.checkpoint.journal import Journal, read_journal
from metadist.checkpoint.saver import Saver
from metadist.checkpoint.store import CheckpointStore
from metadist.core.errors import StorageFailed


def snapshot(step: int) -> tuple[Checkpoint, np.ndarray]:
    theta = np.full(5, step, np.float32)
    return Checkpoint(step, {"w": theta}, {"step": step}, "seed: 0\n", {}, {"run_dir": "here"}), theta


class Disk:
    """Makes fsync, which every file of a checkpoint goes through, fail or wait."""

    def __init__(self, monkeypatch) -> None:
        self.full = False
        self.free = threading.Event()
        self.free.set()
        self.calls = 0
        sync = os.fsync

        def synced(descriptor: int) -> None:
            self.calls += 1
            self.free.wait()
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(saving, "PAUSE_S", 0.01)


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


class Saving:
    def __init__(self, folder) -> None:
        self.folder, self.said = folder, []
        self.journal = Journal(folder / "journal.jsonl")
        self.saver = Saver(CheckpointStore(folder / "checkpoints", keep_last=9), self.journal, self.said.append)

    def save(self, step: int, best: bool = False) -> None:
        self.saver.save(*snapshot(step), best=best)

    def done(self) -> list[int]:
        return [record["done"] for record in read_journal(self.folder / "journal.jsonl")]


@pytest.fixture
def own(tmp_path, disk):
    made = Saving(tmp_path)
    yield made
    made.saver.close()
    made.journal.close()


def test_the_hash_is_journalled_after_the_checkpoint_is_complete(own, tmp_path, disk):
    disk.free.clear()
    own.save(1, best=True)
    while not disk.calls:
        time.sleep(0.001)
    assert own.done() == [] and own.saver.store.steps() == []
    disk.free.set()
    own.saver.flush()
    (record,) = read_journal(tmp_path / "journal.jsonl")
    assert 0 <= time.time() - record.pop("time") < 60
    assert record == {"done": 1, "theta_sha256": theta_sha256(snapshot(1)[1])}
    loaded = own.saver.store.load("best")
    assert loaded.run == {"run_dir": "here", "theta_sha256": theta_sha256(snapshot(1)[1]), "best": True}


def test_a_slow_store_delays_no_step_and_keeps_the_best(own, tmp_path, disk):
    disk.free.clear()
    own.save(1)
    while not disk.calls:
        time.sleep(0.001)
    began = time.monotonic()
    for step in range(2, 102):
        own.save(step, best=step == 50)
    assert time.monotonic() - began < 0.5
    disk.free.set()
    own.saver.flush()
    assert own.saver.store.steps() == own.done() == [1, 50, 101]
    assert own.saver.store.load("best").step == 50
    assert len(own.said) == 1 and "step 2 was passed over for that of step 3" in own.said[0]


def test_a_failure_is_told_and_tried_again_and_a_success_resets_the_count(own, tmp_path, disk):
    for step in (1, 3, 5):
        for attempt in (step, step + 1):
            disk.full = attempt == step
            own.save(attempt, best=attempt == step)
            while disk.full and len(own.said) < (step + 1) // 2:
                time.sleep(0.001)
        own.saver.flush()
    assert own.done() == own.saver.store.steps() == [1, 2, 3, 4, 5, 6]
    assert own.saver.store.load("best").step == 5
    assert len(own.said) == 3
    assert all("(No space left on device), failure 1 of 3 in a row" in text for text in own.said)
    assert not [name for name in os.listdir(tmp_path / "checkpoints") if name.startswith(".tmp")]


def test_after_three_failures_in_a_row_the_run_ends_with_a_sentence(own, tmp_path, disk):
    own.save(1)
    own.saver.flush()
    disk.full = True
    own.save(2)
    with pytest.raises(StorageFailed, match=r"step 2 .*No space left.* in a row: make room in .*checkpoints"):
        own.saver.flush()
    with pytest.raises(StorageFailed):
        own.save(3)
    assert len(own.said) == 2
    assert own.saver.store.load().step == 1 and own.done() == [1]


def test_leaving_waits_for_what_is_being_written(own, tmp_path, disk):
    disk.free.clear()
    own.save(1)
    threading.Timer(0.1, disk.free.set).start()
    own.saver.close()
    assert own.done() == [1]


def test_a_mistake_of_ours_is_not_taken_for_a_full_disk(own, tmp_path, disk):
    checkpoint, theta = snapshot(1)
    checkpoint.trainer["array"] = theta
    own.saver.save(checkpoint, theta, best=False)
    with pytest.raises(TypeError, match="plain values"):
        own.saver.flush()
    own.saver.close()
