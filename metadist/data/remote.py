"""Datasets and weights at a URI, fetched once per machine into its cache, every byte verified."""

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs
from safetensors import SafetensorError, safe_open

from metadist.core.errors import InputError
from metadist.core.files import bare, cache_root, is_uri, reason, replace_text
from metadist.core.redaction import to_stderr
from metadist.core.storage import BLOCK_BYTES, listed, open_location, reaching, read
from metadist.core.task import SPLITS
from metadist.data.table import KEY, SHARED, Dataset, digest_of_all, open_dataset, read_header
from metadist.data.writer import VOCABULARY

Say = Callable[[str], None]
_VERIFIED = ".verified"
_SAY_BEFORE_BYTES = 1 << 28


def fetched_dataset(uri: str, name: str | None = None, say: Say = to_stderr) -> Path:
    """The folder in this machine's cache with the dataset at a URI, fetched first where it is not there.

    Its name is made of the dataset's digest and headers: a dataset that has changed is another folder. Processes may
    race: one fetches, the others wait. `say` takes a line where it is fetched.

    Args:
        uri: the directory, such as `s3://bucket/digits?region=eu-west-1`.
        name: the folder's name in another machine's cache, so that both have the same; where this one has it too, the
            URI is not asked.

    Raises:
        InputError: nothing can be read there, or no dataset, or one that does not match its digests, or that of
            another name; too little disk.
    """
    what = f"data.path={uri}"
    if name is not None and _is_verified(cache_root() / name):
        return cache_root() / name
    sizes = {info.base_name: info.size or 0 for info in listed(what, uri) if info.type == fs.FileType.File}
    sizes = {
        file: sizes[file] for file in (*(f"{split}.arrow" for split in SPLITS), SHARED, VOCABULARY) if file in sizes
    }
    with reaching(what):
        files, root = open_location(uri)
        found = _name(what, files, root, sizes)
    if name not in (None, found):
        raise InputError(
            f"{what} is no longer the dataset that the run began with: put that back, or start another run"
        )
    return _kept(found, what, files, {file: (f"{root}/{file}", sizes[file]) for file in sizes}, _verify_dataset, say)


def dataset_at(place: str, name: str | None = None) -> Dataset:
    """The dataset in a folder, or at a URI, from where it is fetched; `name`: see `fetched_dataset`. Raises InputError
    where there is none."""
    if is_uri(place):
        return open_dataset(fetched_dataset(place, name))
    if not Path(place).is_dir():
        raise InputError(
            f"there is no data in {place}: make it with `metadist data ... --out {shlex.quote(place)}` "
            "(see `metadist data --help`), or set data.path to where it is"
        )
    return open_dataset(place)


def _name(what: str, files: fs.FileSystem, root: str, sizes: Mapping[str, int]) -> str:
    """Of the folder in the cache, from headers, which lie at the end of the files."""
    digests: dict[str, str] = {}
    others = hashlib.sha256(json.dumps(sizes).encode())
    for file in sizes:
        if file == VOCABULARY:
            others.update(read(files, f"{root}/{file}"))
            continue
        try:
            with files.open_input_file(f"{root}/{file}") as stream, pa.ipc.open_file(stream) as reader:
                header = (reader.schema.metadata or {})[KEY]
            digests[file.removesuffix(".arrow")] = read_header(f"{file} of {what}", header)["digest"]
        except (KeyError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{file} of {what} is damaged or no metadist dataset: upload it again") from error
        others.update(header)
    if not digests.keys() & set(SPLITS):
        raise InputError(
            f"{what} holds no train.arrow, validation.arrow or test.arrow: correct the path, or upload there what "
            "`metadist data` has written"
        )
    return f"data-{digest_of_all(digests)}-{others.hexdigest()[:8]}"


def _verify_dataset(folder: Path) -> None:
    Dataset(folder).verify()


def fetched_weights(uri: str, say: Say = to_stderr) -> Path:
    """The file in this machine's cache with the weights (safetensors) at a URI; as `fetched_dataset`. A file counts as
    changed by its size, time or ETag."""
    what = f"model.weights={uri}"
    parent, mark, options = uri.partition("?")
    file = parent.rpartition("/")[2]
    listed(what, f"{parent.rpartition('/')[0]}{mark}{options}")
    with reaching(what):
        files, path = open_location(uri)
        found = files.get_file_info(path)
        if found.type != fs.FileType.File:
            raise InputError(f"{what} is not there, or no file: correct the path")
        with files.open_input_stream(path) as stream:
            stamp = [bare(uri), found.size, found.mtime_ns, str(stream.metadata().get("ETag"))]
    name = f"weights-{hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:32]}"

    def verify(folder: Path) -> None:
        try:
            with safe_open(folder / file, "numpy"):
                pass
        except SafetensorError as error:
            raise InputError(f"it is no safetensors file ({reason(error)})") from error

    return _kept(name, what, files, {file: (path, found.size or 0)}, verify, say) / file


def _kept(
    name: str, what: str, files: fs.FileSystem, wanted: Mapping[str, tuple[str, int]], verify: Callable[[Path], None],
    say: Say,
) -> Path:  # fmt: skip
    """The folder of that name in the cache, with the files `wanted` (name -> place and bytes), each of them as it was
    when it was fetched and `verify` had read it."""
    final = cache_root() / name
    if _is_verified(final):
        return final
    with _alone(final, what, say):
        if _is_verified(final):
            return final
        if final.exists():
            if _is_as_fetched(final):
                return final
            say(f"{final}, the copy of {what} in the cache, is damaged: it is removed and fetched again")
            shutil.rmtree(final)
        aside = final.with_name(f".{name}.partial")
        if aside.exists():
            say(f"{aside}, which a fetch that was cut off has left, is removed")
            shutil.rmtree(aside)
        try:
            _fetch(aside, what, files, wanted, verify, say)
            os.rename(aside, final)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return final


@contextmanager
def _alone(final: Path, what: str, say: Say) -> Iterator[None]:
    """One process at a time, of all that use this cache; a lock ends with the process that has it."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = final.with_name(f".{final.name}.lock").open("a")
    except OSError as error:
        raise InputError(
            f"the cache {final.parent} cannot be written to ({reason(error)}): set METADIST_CACHE to a folder that can"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process fetches {what}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(
    aside: Path, what: str, files: fs.FileSystem, wanted: Mapping[str, tuple[str, int]],
    verify: Callable[[Path], None], say: Say,
) -> None:  # fmt: skip
    need, free, began = sum(size for _, size in wanted.values()), shutil.disk_usage(aside.parent).free, time.monotonic()
    if need > free:
        raise InputError(
            f"{what} has {need / 1e9:.2f} GB and the cache {aside.parent} {free / 1e9:.2f} GB free: make room, or set "
            "METADIST_CACHE to a folder on another disk"
        )
    if need > _SAY_BEFORE_BYTES:
        say(f"fetching {need / 1e9:.2f} GB from {what} into {aside.parent}")
    aside.mkdir()
    hashes = {}
    for file, (place, size) in wanted.items():
        with reaching(what):
            hashes[file] = _copy(files, place, aside / file)
        if (aside / file).stat().st_size != size:
            raise InputError(f"{file} of {what} changed while it was fetched: give the same command again")
    try:
        verify(aside)
    except InputError as error:
        raise InputError(f"{what} was fetched and is not used ({reason(error)}): upload it again") from error
    _note_verified(aside, hashes)
    spent = time.monotonic() - began
    say(f"fetched {need} bytes from {what} into {aside.parent} in {spent:.1f} s; every file is verified")


def _copy(files: fs.FileSystem, place: str, target: Path) -> str:
    """Copies a file; its sha256."""
    content = hashlib.sha256()
    with files.open_input_stream(place) as stream, target.open("wb") as file:
        while block := stream.read(BLOCK_BYTES):
            content.update(block)
            file.write(block)
    return content.hexdigest()


def _note_verified(folder: Path, hashes: Mapping[str, str]) -> None:
    """Each file's sha256, and how it looks: as long as that stays, it need not be read again to be known."""
    noted = {file: {"sha256": hashes[file], "looks": _looks(folder / file)} for file in hashes}
    replace_text(folder / _VERIFIED, json.dumps(noted))


def _looks(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _noted(folder: Path) -> dict[str, Any]:
    """What `_note_verified` wrote; {} where nothing can be read."""
    try:
        noted = json.loads((folder / _VERIFIED).read_text())
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _is_verified(folder: Path) -> bool:
    """Whether the files are there and look as they did when they were verified."""
    noted = _noted(folder)
    return bool(noted) and all(
        (folder / file).exists() and _looks(folder / file) == noted[file]["looks"] for file in noted
    )


def _is_as_fetched(folder: Path) -> bool:
    """Whether the files are what was fetched, to the byte, though they look otherwise: touched, moved, restored."""
    noted = _noted(folder)
    for file, entry in noted.items():
        path = folder / file
        if not path.exists() or _copy(fs.LocalFileSystem(), str(path), Path(os.devnull)) != entry["sha256"]:
            return False
    if noted:
        _note_verified(folder, {file: entry["sha256"] for file, entry in noted.items()})
    return bool(noted)
