"""Checkpoints after a death at every operation and byte of a save, damage anywhere, and places that refuse."""

import dataclasses
import errno
import hashlib
import io
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from metadist.checkpoint.format import Checkpoint, DamagedCheckpoint, load_checkpoint
from metadist.checkpoint.store import CheckpointStore
from metadist.core.errors import InputError

FILES = ("weights.safetensors", "trainer.pt", "config.yaml", "meta.json")  # in the order in which they are written
CHANGES = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")


def example(step: int, config: str = "seed: 0\n") -> Checkpoint:
    weights = {"w": np.arange(step, step + 6, dtype=np.float32).reshape(2, 3), "b": np.zeros(0, np.float32)}
    return Checkpoint(step, weights, {"m": torch.arange(3.0), "t": step}, config, {"loss": 0.5}, {"run_dir": "x"})


def same(one: Checkpoint, other: Checkpoint) -> bool:
    arrays = [one.weights[name].tobytes() == array.tobytes() for name, array in other.weights.items()]
    plain = [getattr(one, name) == getattr(other, name) for name in ("step", "config", "metrics", "run")]
    return all(arrays + plain) and list(one.weights) == list(other.weights) and str(one.trainer) == str(other.trainer)


def as_best(checkpoint: Checkpoint) -> Checkpoint:
    return dataclasses.replace(checkpoint, run={**checkpoint.run, "best": True})


class Killed(BaseException):
    """The process ends here: nothing catches it."""


class Death:
    """Kills the writing process at its n-th operation on the disk; a write then leaves a part of its bytes, the
    deletion of a directory a part of its files."""

    def __init__(self, part: float) -> None:
        self.left, self.part = -1, part

    def comes(self) -> bool:
        self.left -= 1
        return self.left == 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in CHANGES:
            monkeypatch.setattr(os, name, self._dying(getattr(os, name)))
        real = io.open
        monkeypatch.setattr(
            io, "open", lambda file, mode="r", *rest: Torn(real(file, mode, *rest), self) if mode == "wb"
            else real(file, mode, *rest),
        )  # fmt: skip

    def _dying(self, change):
        def changed(*arguments, **named):
            if self.comes():
                raise Killed
            return change(*arguments, **named)

        return changed


class Torn:
    """A file or stream whose writing may be the last thing that happens."""

    def __init__(self, stream, death: Death) -> None:
        self._stream, self._death = stream, death

    def write(self, content: bytes) -> None:
        if self._death.comes():
            self._stream.write(content[: int(len(content) * self._death.part)])
            self._stream.close()
            raise Killed
        self._stream.write(content)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


class DyingFileSystem:
    """A file system of pyarrow whose operations may be the last thing that happens."""

    def __init__(self, fs, death: Death) -> None:
        self._fs, self._death = fs, death

    def __getattr__(self, name: str):
        found = getattr(self._fs, name)
        return self._death._dying(found) if name in ("create_dir", "delete_file", "copy_file") else found

    def open_output_stream(self, path: str):
        return Torn(self._fs.open_output_stream(path), self._death)

    def delete_dir(self, path: str) -> None:
        if self._death.comes():
            names = sorted(os.listdir(path))
            for name in names[: int(len(names) * self._death.part)]:
                Path(path, name).unlink()
            raise Killed
        self._fs.delete_dir(path)


SAVES = {
    "a later step": (example(2), False),
    "a later step that is the best": (example(2), True),
    "the same step again": (example(1, "seed: 1\n"), False),
}


@pytest.mark.parametrize("part", [0.0, 0.4, 0.99])
@pytest.mark.parametrize("what", SAVES)
@pytest.mark.parametrize("kind", ["path", "uri"])
def test_death_at_any_operation_leaves_the_old_or_the_new_one(tmp_path, monkeypatch, kind, what, part):
    before, (after, best) = example(1), SAVES[what]
    died, number = True, 0
    while died:
        number += 1
        root = tmp_path / f"{number}"
        location = root if kind == "path" else root.as_uri()
        CheckpointStore(location, keep_last=1).save(before, best=True)
        store, death = CheckpointStore(location, keep_last=1), Death(part)
        store._fs = DyingFileSystem(store._fs, death)  # pyright: ignore[reportAttributeAccessIssue]
        death.left = number
        with monkeypatch.context() as patch:
            death.install(patch)
            try:
                store.save(after, best=best)
                died = False
            except Killed:
                pass
        marked = [folder for folder in root.glob("*step_*") if (folder / FILES[-1]).exists()]
        assert all(set(FILES) <= set(os.listdir(folder)) for folder in marked)  # the commit mark comes last, goes first
        found = CheckpointStore(location).load("latest")
        assert any(same(found, each) for each in (before, after, as_best(before), as_best(after)))
        reader = CheckpointStore(location)
        chosen = reader.load("best" if reader.has_best() else "latest")
        assert same(chosen, as_best(before)) or same(chosen, as_best(after))
        CheckpointStore(location, keep_last=1).save(example(3), best=True)
        assert os.listdir(root) == ["step_00000003"]
    assert number > 6


@pytest.mark.parametrize("file", FILES)
def test_a_save_cut_off_at_any_byte_leaves_the_one_before(tmp_path, file):
    """As an object store without renames leaves it: the files before are whole, this one is not, the rest is absent."""
    store = CheckpointStore(tmp_path.as_uri())
    store.save(example(1))
    folder = Path(CheckpointStore(tmp_path).save(example(2)))
    whole = (folder / file).read_bytes()
    for later in FILES[FILES.index(file) + 1 :]:
        (folder / later).unlink()
    for size in {*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 1}:
        (folder / file).write_bytes(whole[:size])
        said: list[str] = []
        assert CheckpointStore(tmp_path, say=said.append).load("latest").step == 1
        assert len(said) == 1 and ("damaged" in said[0] or "no meta.json in it" in said[0] or "meta.json" in said[0])


def test_damage_anywhere_gives_equal_data_or_the_one_before_with_a_warning(tmp_path):
    draw = random.Random(0)
    store = CheckpointStore(tmp_path)
    store.save(example(1))
    folder = Path(store.save(example(2)))
    for case in range(400):
        path = folder / FILES[case % 4]
        whole = path.read_bytes()
        damaged = bytearray(whole[: draw.randrange(len(whole))] if case % 3 == 0 else whole)
        for _ in range(draw.choice([1, 1, 8]) if damaged else 0):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        said: list[str] = []
        found = CheckpointStore(tmp_path, say=said.append).load("latest")
        assert same(found, example(2)) if found.step == 2 else same(found, example(1)) and len(said) == 1
        path.write_bytes(whole)


def test_a_damaged_best_falls_back_to_the_best_before_it_then_to_the_latest(tmp_path):
    said: list[str] = []
    store = CheckpointStore(tmp_path, say=said.append)
    folders = [Path(store.save(example(step), best=step < 3)) for step in (1, 2, 3)]
    assert store.load("best").step == 2 and not said
    for folder, step in zip((folders[1], folders[0]), (1, 3), strict=True):
        (folder / "weights.safetensors").write_bytes(b"")
        said.clear()
        assert store.load("best").step == step
        assert all("weights.safetensors" in text for text in said) and len(said) == (1 if step == 1 else 2)
    shutil.rmtree(folders[1])
    with pytest.raises(InputError):
        store.load("step_00000002")


def test_a_pointer_to_the_best_that_is_damaged_names_no_other(tmp_path):
    """Of an earlier metadist."""
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        store.save(example(step), best=step == 1)
    pointer = f"step_00000001 {hashlib.sha256(b'step_00000001').hexdigest()[:8]}\n".encode()
    for place in range(len(pointer)):
        for changed in (pointer[:place] + bytes([pointer[place] ^ 1]) + pointer[place + 1 :], pointer[:place]):
            (tmp_path / "best").write_bytes(changed)
            assert store.load("best").step == 1


def test_damaged_later_ones_do_not_push_out_what_is_saved_now(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2, say=lambda text: None)
    for step in (10, 20, 30):
        store.save(example(step))
    for step in (20, 30):
        (tmp_path / f"step_{step:08d}" / "config.yaml").write_bytes(b"")
    for step in (11, 12):
        store.save(example(step))
    assert store.load("latest").step == 12
    assert [step for step in store.steps() if step < 20] == [11, 12]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_place_that_refuses_is_an_os_error_and_what_was_there_stays(tmp_path, monkeypatch, code):
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(example(1), best=True)
    for name in ("fsync", "mkdir", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_, **__: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
            with pytest.raises(OSError) as raised:
                store.save(example(2), best=True)
        assert raised.value.errno == code
        assert sorted(os.listdir(tmp_path))[-1] == "step_00000001"
        assert same(store.load("best"), as_best(example(1)))
    store.save(example(2))
    assert store.load("latest").step == 2


def test_an_unreadable_file_falls_back_too(tmp_path):
    store = CheckpointStore(tmp_path, say=lambda text: None)
    store.save(example(1))
    folder = Path(store.save(example(2)))
    for name in FILES[:3]:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).mkdir()
        assert store.load("latest").step == 1
        (folder / name).rmdir()
        (folder / name).write_bytes(content)
    assert same(store.load("latest"), example(2))
    with pytest.raises(DamagedCheckpoint):
        load_checkpoint(folder / "weights.safetensors")


def test_saving_leaves_the_snapshot_as_it_was(tmp_path):
    given = example(1)
    kept = dataclasses.replace(given, weights={name: array.copy() for name, array in given.weights.items()})
    CheckpointStore(tmp_path).save(given)
    assert same(given, kept)
