"""Whole runs on disks that fill up and with journals that are torn, gone or ahead: the same theta in the end."""

import errno
import os
import re
import time
from pathlib import Path

import pytest

from metadist.checkpoint import saver as saving
from metadist.checkpoint.journal import read_journal
from metadist.checkpoint.store import CheckpointStore
from metadist.config import Config, load_config
from metadist.core.errors import InputError, StorageFailed
from metadist.run.api import train

JOB = [
    "data.family=digits", "task.ways=3", "task.shots=2", "task.queries=3", "model.name=mlp", "model.hidden=[8]",
    "tasks_per_worker=2", "num_workers=2", "meta_steps=12", "evaluation.every=3", "evaluation.tasks=3",
    "evaluation.test_tasks=3", "evaluation.baselines=[]", "checkpoint.every=2", "fleet.backend=local",
    "tracking.mlflow=false",
]  # fmt: skip


def job(run_dir: Path, *overrides: str) -> Config:
    return load_config([], [*JOB, f"run_dir={run_dir}", *overrides])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    return train(job(tmp_path_factory.mktemp("undisturbed") / "run"), quiet=True)


def finish(run_dir: Path, undisturbed: dict, resume: str = "auto") -> None:
    told = train(job(run_dir), resume=resume, quiet=True)
    kept = ("theta_sha256", "evaluated_step", "evaluated_theta_sha256")
    assert [told[key] for key in kept] == [undisturbed[key] for key in kept]


def break_writes(monkeypatch: pytest.MonkeyPatch, name: str, after: int, code: int = errno.ENOSPC) -> None:
    """From its `after`-th write on, files whose path holds `name` take nothing more."""
    write, sync, count = os.write, os.fsync, [0]

    def refused(descriptor: int) -> bool:
        hit = name in os.readlink(f"/proc/self/fd/{descriptor}")
        count[0] += hit
        return hit and count[0] > after

    def failing(real):
        def call(descriptor, *rest):
            if refused(descriptor):
                raise OSError(code, os.strerror(code))
            return real(descriptor, *rest)

        return call

    monkeypatch.setattr(os, "write", failing(write))
    monkeypatch.setattr(os, "fsync", failing(sync))
    monkeypatch.setattr(saving, "PAUSE_S", 0.0)


@pytest.mark.parametrize(
    ("name", "after", "said"),
    [
        ("journal.jsonl", 0, r"journal\.jsonl .*No space left on device"),
        ("metrics.jsonl", 2, r"metrics\.jsonl"),
        ("weights.safetensors", 0, r"checkpoint of step \d+ .*No space left on device"),
        ("meta.json", 2, r"checkpoint of step \d+ .*No space left on device"),
    ],
)
def test_a_full_disk_ends_the_run_in_one_sentence_and_a_resume_loses_nothing(
    tmp_path, monkeypatch, undisturbed, name, after, said
):
    with monkeypatch.context() as patch, pytest.raises(StorageFailed, match=said) as raised:
        break_writes(patch, name, after)
        train(job(tmp_path / "run"), quiet=True)
    assert "\n" not in str(raised.value)
    finish(tmp_path / "run", undisturbed)


def test_a_passing_failure_is_told_and_changes_nothing(tmp_path, monkeypatch, undisturbed, capsys):
    failed = []
    sync = os.fsync

    def once(descriptor):
        if ".tmp_step_" in os.readlink(f"/proc/self/fd/{descriptor}") and not failed:
            failed.append(1)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", once)
        finish(tmp_path / "run", undisturbed)
    said = r"checkpoint of step \d+ .*Input/output error.* 1 of 3"
    assert failed and re.search(said, capsys.readouterr().err)


def test_results_that_cannot_be_written_are_one_sentence(tmp_path, monkeypatch, undisturbed):
    replaced = os.replace

    def full(source, target):
        if str(target).endswith("results.json"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        replaced(source, target)

    with monkeypatch.context() as patch, pytest.raises(StorageFailed, match="results.json .*Read-only"):
        patch.setattr(os, "replace", full)
        train(job(tmp_path / "run"), quiet=True)
    finish(tmp_path / "run", undisturbed)


def test_a_directory_that_cannot_be_written_to_is_refused_at_once(tmp_path, monkeypatch):
    opened = os.open

    def read_only(path, flags, *rest, **named):
        if flags & os.O_CREAT and str(tmp_path) in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *rest, **named)

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(InputError, match="Read-only"):
        train(job(tmp_path / "run"), quiet=True)


def test_a_slow_store_does_not_delay_steps(tmp_path, monkeypatch, undisturbed):
    sync = os.fsync

    def slow(descriptor):
        if ".tmp_step" in os.readlink(f"/proc/self/fd/{descriptor}"):
            time.sleep(0.1)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    finish(tmp_path / "run", undisturbed)
    records = read_journal(tmp_path / "run" / "journal.jsonl")
    last_dealt = max(number for number, record in enumerate(records) if "tasks" in record)
    first_done = min(number for number, record in enumerate(records) if "done" in record)
    assert first_done > 4 and records[last_dealt]["step"] == 11
    assert [record["done"] for record in records if "done" in record][-1] == 12


@pytest.mark.parametrize("change", [
    pytest.param(lambda data: data[:-7], id="torn"),
    pytest.param(lambda data: b"", id="empty"),
    pytest.param(lambda data: None, id="missing"),
    pytest.param(lambda data: data + b"\0" * 50, id="zeros after a power failure"),
    pytest.param(lambda data: data + b'{"step":6,"target":9,"tasks":18}\n{"st', id="ahead of the checkpoint"),
])  # fmt: skip
def test_a_run_resumes_whatever_became_of_its_journal(tmp_path, undisturbed, change):
    run_dir = tmp_path / "run"
    train(job(run_dir, "meta_steps=6"), quiet=True)
    journal = run_dir / "journal.jsonl"
    changed = change(journal.read_bytes())
    journal.unlink()
    if changed is not None:
        journal.write_bytes(changed)
    if changed and b'"tasks":18' in changed:
        train(job(run_dir), resume="auto", quiet=True)
        dealt = {record["step"]: record["tasks"] for record in read_journal(journal) if "tasks" in record}
        assert dealt[6] == 18 and dealt[7] == 4
        return
    finish(run_dir, undisturbed)


def test_a_run_that_ended_with_its_best_step_goes_on_from_it(tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    best = undisturbed["evaluated_step"]
    train(job(run_dir, f"meta_steps={best}", "checkpoint.keep_last=20"), quiet=True)
    finish(run_dir, undisturbed)
    assert CheckpointStore(run_dir / "checkpoints").load("best").step == best
