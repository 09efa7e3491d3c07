"""Data and weights at a URI: fetched once, verified, never stale."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs
from safetensors.numpy import load_file, save_file

from metadist.core.errors import InputError
from metadist.core.storage import open_location
from metadist.data import open_dataset
from metadist.data.remote import fetched_dataset, fetched_weights
from tests.data.example import write_example


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path) -> Path:
    write_example(tmp_path / "the data é")
    return tmp_path / "the data é"


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("where", ["file", "s3"])
def test_a_dataset_is_fetched_once_and_is_what_it_was(request, cache, source, where):
    uri = source.as_uri()
    if where == "s3":
        uri = request.getfixturevalue("s3")("data/example é")
        files, root = open_location(uri)
        fs.copy_files(str(source), root, fs.LocalFileSystem(), files)
    said = []
    path = fetched_dataset(uri, say=said.append)
    assert path.parent == cache and open_dataset(path).digest == open_dataset(source).digest
    for name in ("train.arrow", "validation.arrow", "test.arrow"):
        assert (path / name).read_bytes() == (source / name).read_bytes()
    size = sum(file.stat().st_size for file in source.iterdir())
    assert len(said) == 1 and str(size) in said[0] and "hunter2" not in said[0]
    assert fetched_dataset(uri, say=said.append) == path and len(said) == 1
    shutil.rmtree(source)
    assert fetched_dataset("file:///nowhere", path.name, say=said.append) == path  # nobody is asked


def test_a_dataset_that_changes_is_another(cache, source):
    first = fetched_dataset(source.as_uri())
    kept = open_dataset(first).digest
    changed = source.with_name("changed")
    write_example(changed, block=3)
    shutil.copy(source / "train.arrow", changed / "test.arrow")
    shutil.rmtree(source)
    changed.rename(source)
    second = fetched_dataset(source.as_uri())
    assert second != first and open_dataset(second).digest == open_dataset(source).digest != kept
    with pytest.raises(InputError, match=r"data\.path"):
        fetched_dataset(source.as_uri(), "data-of-the-driver")


START = """
import sys, time
from metadist.data.remote import fetched_dataset
time.sleep(max(0, float(sys.argv[2]) - time.time()))
print(fetched_dataset(sys.argv[1]))
"""


def test_two_processes_fetch_once(cache, source):
    command = [sys.executable, "-c", START, source.as_uri(), str(time.time() + 3)]
    both = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    ended = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    assert len({out for out, _ in ended}) == 1
    assert sum(err.count("fetched ") for _, err in ended) == 1
    assert len(folders(cache)) == 1


KILLED = """
import os, signal, sys
from metadist.data import remote
copy = remote._copy
def die_in_the_second(files, place, target):
    if target.name == "validation.arrow":
        target.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return copy(files, place, target)
remote._copy = die_in_the_second
remote.fetched_dataset(sys.argv[1])
"""


def test_a_killed_fetch_leaves_nothing_that_counts(cache, source):
    done = subprocess.run([sys.executable, "-c", KILLED, source.as_uri()], timeout=120)
    assert done.returncode == -signal.SIGKILL
    (left,) = folders(cache)
    said = []
    path = fetched_dataset(source.as_uri(), say=said.append)
    assert folders(cache) == [path.name] and left in said[0] and "fetched" in said[1]
    open_dataset(path, verify=True)


@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_damaged_copy_in_the_cache_is_noticed(cache, source, damage):
    path = fetched_dataset(source.as_uri())
    file = path / "train.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.unlink() if damage == "missing" else file.write_bytes(content if damage == "changed" else content[:-9])
    said = []
    assert fetched_dataset(source.as_uri(), say=said.append) == path
    assert "damaged" in said[0] and "fetched" in said[1]
    open_dataset(path, verify=True)


def test_a_copy_that_was_only_touched_is_not_fetched_again(cache, source):
    path = fetched_dataset(source.as_uri())
    os.utime(path / "train.arrow")
    said = []
    assert fetched_dataset(source.as_uri(), say=said.append) == path and said == []


def test_damage_at_the_source_is_refused_by_name(cache, source):
    content = bytearray((source / "train.arrow").read_bytes())
    prices = open_dataset(source).splits["train"].column("price").tobytes()
    content[content.index(prices)] ^= 1
    (source / "train.arrow").write_bytes(content)
    with pytest.raises(InputError, match=r"data\.path=file.*train\.arrow"):
        fetched_dataset(source.as_uri())
    assert folders(cache) == []


def test_what_is_no_dataset_is_refused(tmp_path, cache, source):
    with pytest.raises(InputError, match=r"data\.path=file.*train\.arrow"):
        fetched_dataset((tmp_path / "nowhere").as_uri())
    (source / "test.arrow").write_bytes(b"no arrow")
    with pytest.raises(InputError, match=r"test\.arrow"):
        fetched_dataset(source.as_uri())


def test_a_disk_too_small_is_told_before_anything_is_fetched(cache, source, monkeypatch):
    free = shutil.disk_usage(source)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(InputError, match="METADIST_CACHE"):
        fetched_dataset(source.as_uri())
    assert folders(cache) == []


def test_a_cache_that_cannot_be_written_to_is_told(source, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="METADIST_CACHE"):
        fetched_dataset(source.as_uri())


def test_weights_are_fetched_once_and_anew_when_they_change(tmp_path, cache):
    file = tmp_path / "w é.safetensors"
    for value in (1.0, 2.0):
        save_file({"w": np.full(3, value, np.float32)}, file)
        os.utime(file, (value, value))
        said = []
        path = fetched_weights(file.as_uri(), say=said.append)
        assert fetched_weights(file.as_uri(), say=said.append) == path and len(said) == 1
        assert load_file(path)["w"].tolist() == [value] * 3
    file.write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"model\.weights"):
        fetched_weights(file.as_uri())
    with pytest.raises(InputError, match=r"model\.weights"):
        fetched_weights((tmp_path / "none").as_uri())
