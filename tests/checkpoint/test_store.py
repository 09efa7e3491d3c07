import dataclasses
import errno
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from metadist.checkpoint.format import Checkpoint, DamagedCheckpoint, load_checkpoint, theta_sha256
from metadist.checkpoint.store import CheckpointStore
from metadist.core.errors import InputError

FILES = ("weights.safetensors", "trainer.pt", "config.yaml", "meta.json")


def example(step=1200, dtype=np.float32):
    draws = np.random.default_rng(step)
    return Checkpoint(
        step=step,
        weights={
            "z.weight": draws.standard_normal((3, 4)).astype(dtype),
            "a.bias": draws.standard_normal(5).astype(dtype).T,
            "transposed": np.asfortranarray(draws.standard_normal((2, 3)).astype(dtype)),
            "scalar": np.array(1 / 3, dtype=dtype),
            "empty": np.zeros((0, 4), dtype=dtype),
        },
        trainer={"adam": {"m": torch.arange(7, dtype=torch.float64) / 3, "t": step}, "best": 0.1, "none": None},
        config="seed: 0\nname: \u00e9t\u00e9\n",
        metrics={"validation/accuracy": 0.1 + 0.2},
        run={"mlflow_run_id": "abc", "nested": {"digests": ["x", "y"]}},
    )


def assert_same(found, expected):
    assert list(found.weights) == list(expected.weights)
    for name, array in expected.weights.items():
        assert found.weights[name].dtype == array.dtype and found.weights[name].shape == array.shape
        assert found.weights[name].tobytes() == array.tobytes()
        assert found.weights[name].flags.writeable
    assert torch.equal(found.trainer["adam"]["m"], expected.trainer["adam"]["m"])
    assert {**found.trainer, "adam": 0} == {**expected.trainer, "adam": 0}
    for field in ("step", "config", "metrics", "run"):
        assert getattr(found, field) == getattr(expected, field)


@pytest.fixture(params=["path", "uri"])
def location(request, tmp_path):
    return tmp_path / "checkpoints" if request.param == "path" else (tmp_path / "checkpoints").as_uri()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_checkpoint_comes_back_bit_for_bit(location, dtype):
    expected = example(dtype=dtype)
    where = CheckpointStore(location).save(expected)
    assert where.endswith("/step_00001200")
    assert_same(CheckpointStore(location).load(), expected)
    assert_same(load_checkpoint(where), expected)


def test_a_relative_path_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = CheckpointStore("here").save(example())
    assert Path(where).is_absolute()
    assert_same(load_checkpoint("here/step_00001200"), example())


def test_the_last_and_the_best_are_kept(location):
    store = CheckpointStore(location, keep_last=2)
    for step in (1, 2, 3, 4, 5):
        store.save(example(step), best=step == 2)
    assert store.steps() == [2, 4, 5]
    assert store.load("best").step == 2
    assert store.load("latest").step == 5
    assert store.load("step_00000004").step == 4
    store.save(example(6), best=True)
    assert store.steps() == [5, 6]
    assert store.load("best").step == 6


def test_nothing_there_is_an_input_error(location):
    store = CheckpointStore(location)
    assert store.steps() == []
    with pytest.raises(InputError, match="There is no checkpoint in"):
        store.load()
    with pytest.raises(InputError, match="no best checkpoint"):
        store.load("best")
    store.save(example(1))
    with pytest.raises(InputError, match="it has: step_00000001"):
        store.load("step_00000002")


def test_a_step_saved_again_goes_to_a_directory_of_its_own(location, tmp_path):
    """The last of them counts, then the one before it is deleted, unless that was the best."""
    store, root = CheckpointStore(location), tmp_path / "checkpoints"
    again = [dataclasses.replace(example(5), config=f"seed: {number}\n") for number in range(3)]
    store.save(again[0], best=True)
    first = {path: path.read_bytes() for path in (root / "step_00000005").iterdir()}
    for checkpoint in again[1:]:
        store.save(checkpoint)
        assert_same(store.load(), checkpoint)
        assert store.load("best").config == "seed: 0\n"
        assert_same(store.load("step_00000005"), checkpoint)
    assert sorted(os.listdir(root)) == ["step_00000005", "step_00000005_3"]
    assert {path: path.read_bytes() for path in (root / "step_00000005").iterdir()} == first
    (root / "step_00000005_3" / "config.yaml").write_text("damaged")
    assert CheckpointStore(location, say=lambda text: None).load().config == "seed: 0\n"
    store.save(example(6), best=True)
    assert_same(store.load("best"), dataclasses.replace(example(6), run={**example(6).run, "best": True}))
    for step in (7, 8):
        store.save(example(step))
    assert store.steps() == [6, 7, 8] and len(os.listdir(root)) == 3


def test_a_best_that_cannot_be_read_for_a_moment_is_not_deleted(location, tmp_path):
    store = CheckpointStore(location, keep_last=1)
    store.save(example(1))
    store.save(example(2), best=True)
    real = store._fs

    class Failing:
        def open_input_stream(self, path):
            if path.endswith("step_00000002/meta.json"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real.open_input_stream(path)

        def __getattr__(self, name):
            return getattr(real, name)

    store._fs = Failing()  # pyright: ignore[reportAttributeAccessIssue]
    store.save(example(3))
    assert CheckpointStore(location).steps() == [2, 3]
    assert CheckpointStore(location).load("best").step == 2


def test_directories_of_an_earlier_metadist_are_read(location, tmp_path):
    """It kept the best by the name in a file, with or without a proof, and moved a step aside to write it anew."""
    store, root = CheckpointStore(location, keep_last=1), tmp_path / "checkpoints"
    store.save(example(1))
    for pointer in ("step_00000001\n", f"step_00000001 {hashlib.sha256(b'step_00000001').hexdigest()[:8]}\n"):
        (root / "best").write_text(pointer)
        assert store.has_best()
        assert_same(store.load("best"), example(1))
    store.save(example(2))
    assert store.steps() == [1, 2] and store.load("best").step == 1
    (root / "best").write_text("step_00000002 ffffffff\n")
    assert not store.has_best()
    (root / "step_00000002").rename(root / ".old_step_00000002")
    assert store.steps() == [1, 2]
    assert_same(store.load(), example(2))
    store.save(example(3), best=True)
    assert sorted(os.listdir(root)) == ["best", "step_00000003"]


@pytest.mark.parametrize("name", FILES)
def test_truncation_is_noticed_wherever_it_happens(tmp_path, name):
    path = Path(CheckpointStore(tmp_path).save(example())) / name
    whole = path.read_bytes()
    for size in (0, 1, 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedCheckpoint, match=name):
            load_checkpoint(path.parent)
    path.write_bytes(whole + b" ")
    if name != "meta.json":
        with pytest.raises(DamagedCheckpoint, match=name):
            load_checkpoint(path.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, name):
    path = Path(CheckpointStore(tmp_path).save(example())) / name
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match=f"{name} in the checkpoint .* is missing"):
        load_checkpoint(path.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed(tmp_path, name):
    path = Path(CheckpointStore(tmp_path).save(example())) / name
    whole = path.read_bytes()
    inside = [whole.index(b"1200")] if name == "meta.json" else [0, len(whole) // 3, len(whole) - 1]
    for place in inside:
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(DamagedCheckpoint, match=name):
            load_checkpoint(path.parent)


def edit_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


@pytest.mark.parametrize("change", [{"step": 7}, {"metrics": {"validation/accuracy": 1.0}}, {"files": {}}])
def test_an_edited_meta_is_noticed(tmp_path, change):
    folder = Path(CheckpointStore(tmp_path).save(example()))
    edit_meta(folder, **change)
    with pytest.raises(DamagedCheckpoint, match="meta.json"):
        load_checkpoint(folder)


def test_a_later_format_is_refused_and_not_skipped(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(example(1))
    edit_meta(Path(store.save(example(2))), format=99)
    with pytest.raises(InputError, match="format 99.*install"):
        store.load()


def test_a_damaged_latest_falls_back_with_a_sentence(location, tmp_path):
    said = []
    store = CheckpointStore(location, say=said.append)
    store.save(example(1))
    (Path(tmp_path, "checkpoints", Path(store.save(example(2))).name) / "trainer.pt").write_bytes(b"")
    assert store.load().step == 1
    assert len(said) == 1 and "step_00000002" in said[0] and "trainer.pt" in said[0]
    (tmp_path / "checkpoints" / "step_00000001" / "config.yaml").unlink()
    with pytest.raises(InputError, match="Every checkpoint is damaged"):
        store.load()
    with pytest.raises(DamagedCheckpoint):
        store.load("step_00000002")


def test_a_directory_without_the_commit_mark_does_not_count(location, tmp_path):
    store = CheckpointStore(location)
    store.save(example(1))
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "step_00000001", root / "step_00000002", ignore=shutil.ignore_patterns("meta.json"))
    assert store.steps() == [1]
    assert store.load().step == 1
    store.save(example(3))
    assert store.steps() == [1, 3]
    assert not (root / "step_00000002").exists()


def test_what_a_killed_process_left_is_cleaned_up(tmp_path):
    store = CheckpointStore(tmp_path)
    folder = Path(store.save(example(1)))
    for count, name in enumerate(FILES):
        unfinished = tmp_path / f".tmp_step_00000002_{count}"
        unfinished.mkdir()
        shutil.copy(folder / name, unfinished)
    assert store.steps() == [1]
    store.save(example(3))
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000003"]


class Attack:
    def __reduce__(self):
        return (open, ("attacked", "w"))


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_code_in_the_trainer_state_is_refused_and_not_run(tmp_path, monkeypatch, write):
    from metadist.checkpoint import format as module

    monkeypatch.chdir(tmp_path)
    store = CheckpointStore(tmp_path / "checkpoints")
    write({"adam": Attack()}, tmp_path / "evil.pt")
    evil = (tmp_path / "evil.pt").read_bytes()
    monkeypatch.setattr(module, "_encode_trainer", lambda _: evil)
    folder = store.save(example())
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="something other than plain values"):
        load_checkpoint(folder)
    with pytest.raises(InputError, match="something other than plain values"):
        store.load()
    assert not Path("attacked").exists()


def test_trainer_state_that_could_not_be_loaded_is_not_saved(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(TypeError, match="plain values and tensors"):
        store.save(dataclasses.replace(example(), trainer={"m": np.zeros(3)}))
    assert store.steps() == []


def test_a_place_that_is_none_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="ftp://nowhere"):
        CheckpointStore("ftp://nowhere/x")
    with pytest.raises(InputError, match="meta.json"):
        load_checkpoint(tmp_path / "nothing")


def test_theta_sha256_tells_bits_dtypes_and_shapes_apart():
    theta = np.arange(6, dtype=np.float32)
    same = np.arange(12, dtype=np.float32)[:6]
    strided = np.repeat(theta, 2)[::2]
    others = [theta.astype(np.float64), theta.reshape(2, 3), np.where(theta == 0, -0.0, theta).astype(np.float32)]
    assert theta_sha256(theta) == theta_sha256(same) == theta_sha256(strided)
    assert len({theta_sha256(other) for other in [theta, *others]}) == 4
    assert len(theta_sha256(np.zeros(0))) == 64
