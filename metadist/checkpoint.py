"""Checkpoints: one directory each, every byte verified at loading, no pickle.

`step_00001200/` holds `weights.safetensors`, `trainer.pt`, `config.yaml` and, written last as the commit mark,
`meta.json` with the size and sha256 of the others. On a local path a directory appears by one rename; at a URI that
pyarrow.fs understands (`file://`, `s3://`, ...) files appear one by one, and what lacks `meta.json` is ignored.
"""

import hashlib
import io
import json
import os
import re
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from pyarrow import fs as arrow_fs

from metadist.errors import InputError

FORMAT_VERSION = 1
_WEIGHTS, _TRAINER, _CONFIG, _META = "weights.safetensors", "trainer.pt", "config.yaml", "meta.json"
_FOLDER = re.compile(r"(?:\.old_)?(step_(\d{8,}))")
_ASIDE, _UNFINISHED = ".old_", ".tmp_"


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on. `step` meta-steps are done; `weights` are named arrays (their order is kept);
    `trainer` holds plain values and tensors (optimizer, counters); `config` is the resolved YAML; `run` free-form JSON
    values (digests, the MLflow run id).
    """

    step: int
    weights: dict[str, np.ndarray]
    trainer: dict[str, Any]
    config: str
    metrics: dict[str, float]
    run: dict[str, Any]


class DamagedCheckpoint(InputError):
    """A checkpoint with missing, shortened or changed files. An earlier one may still be good."""


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


class CheckpointStore:
    """The checkpoints of one run under `location`, a local path or a URI. One process writes; any number may read.

    Keeps the last `keep_last` and the best. `say` is told, in a sentence, of a damaged one that was passed over.
    """

    def __init__(self, location: str | Path, keep_last: int = 3, say: Callable[[str], None] = _to_stderr) -> None:
        if keep_last < 1:
            raise InputError(f"keep_last is {keep_last}: at least 1 checkpoint must be kept.")
        self._location = str(location)
        self._fs, self._root = _open(self._location)
        self._local = "://" not in self._location
        self._keep_last, self._say = keep_last, say

    def save(self, checkpoint: Checkpoint, *, best: bool = False) -> str:
        """Writes it, replacing one of the same step, then deletes those no longer kept; returns its path or URI.

        When this returns, the checkpoint is complete (on a local disk: through power loss). Raises TypeError when
        `trainer` holds anything but plain values and tensors, OSError when the place cannot be written.
        """
        name = _name(checkpoint.step)
        files = _encode(checkpoint)
        self._fs.create_dir(self._root, recursive=True)
        self._settle_leftovers()
        if self._local:
            self._write_renamed(name, files)
        else:
            self._write_marked(name, files)
        if best:
            self._point_best_to(name)
        self._prune(keep=name)
        return _join(self._location, name)

    def load(self, which: str = "latest") -> Checkpoint:
        """ "latest", "best", or a name such as "step_00001200". A damaged latest falls back to the one before it.

        Raises InputError when there is none, or none that is whole.
        """
        folders = self._folders()
        if which == "latest":
            return self._load_latest(folders)
        name = self._best() if which == "best" else which
        if name is None:
            raise InputError(f"There is no best checkpoint in {self._location} yet: use the latest one.")
        found = {_name(step): folder for step, folder in folders.items()}
        if name not in found:
            raise InputError(
                f"There is no checkpoint {name} in {self._location}; it has: {', '.join(found) or 'none'}."
            )
        return load_checkpoint(_join(self._location, found[name]))

    def has_best(self) -> bool:
        """Whether a checkpoint was saved as the best."""
        return self._best() is not None

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        return sorted(self._folders())

    def _load_latest(self, folders: dict[int, str]) -> Checkpoint:
        for step in sorted(folders, reverse=True):
            try:
                return load_checkpoint(_join(self._location, folders[step]))
            except DamagedCheckpoint as error:
                self._say(f"{error} Trying the checkpoint before it.")
        state = "Every checkpoint is damaged" if folders else "There is no checkpoint"
        raise InputError(f"{state} in {self._location}: start a new run, or give the path of another checkpoint.")

    def _folders(self) -> dict[int, str]:
        """Step -> name of its complete directory: the one moved aside, if the process died before the new one came."""
        names = [info.base_name for info in self._list() if info.type == arrow_fs.FileType.Directory]
        names = sorted(name for name in names if _FOLDER.fullmatch(name))
        marks = self._fs.get_file_info([f"{self._root}/{name}/{_META}" for name in names])
        whole = [name for name, mark in zip(names, marks, strict=True) if mark.type == arrow_fs.FileType.File]
        return {int(_FOLDER.fullmatch(name)[2]): name for name in whole}  # pyright: ignore[reportOptionalSubscript]

    def _list(self) -> list[arrow_fs.FileInfo]:
        return self._fs.get_file_info(arrow_fs.FileSelector(self._root, allow_not_found=True))

    def _best(self) -> str | None:
        path = f"{self._root}/best"
        if self._fs.get_file_info(path).type != arrow_fs.FileType.File:
            return None
        return _read(self._fs, path).decode().strip()

    def _point_best_to(self, name: str) -> None:
        target = f"{self._root}/best"
        if not self._local:
            _write(self._fs, target, f"{name}\n".encode())
            return
        temporary = Path(self._root, f"{_UNFINISHED}best")
        _write_synced(temporary, f"{name}\n".encode())
        os.replace(temporary, target)
        _sync_directory(self._root)

    def _write_renamed(self, name: str, files: dict[str, bytes]) -> None:
        root = Path(self._root)
        temporary = root / f"{_UNFINISHED}{name}_{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        for file, content in files.items():
            _write_synced(temporary / file, content)
        _sync_directory(temporary)
        if (root / name).exists():
            os.rename(root / name, root / (_ASIDE + name))
        os.rename(temporary, root / name)
        _sync_directory(root)

    def _write_marked(self, name: str, files: dict[str, bytes]) -> None:
        folder = f"{self._root}/{name}"
        if self._fs.get_file_info(folder).type == arrow_fs.FileType.Directory:
            self._delete(name)
        self._fs.create_dir(folder, recursive=True)
        for file, content in files.items():
            _write(self._fs, f"{folder}/{file}", content)

    def _settle_leftovers(self) -> None:
        """Undoes what a process that died while writing or deleting left behind."""
        whole = set(self._folders().values())
        for info in self._list():
            ours = info.base_name.startswith(_UNFINISHED) or _FOLDER.fullmatch(info.base_name)
            if ours and info.type == arrow_fs.FileType.Directory and info.base_name not in whole:
                self._delete(info.base_name)
        for name in whole:
            if name.startswith(_ASIDE):
                os.rename(f"{self._root}/{name}", f"{self._root}/{name.removeprefix(_ASIDE)}")

    def _prune(self, keep: str) -> None:
        folders = self._folders()
        kept = {_name(step) for step in sorted(folders)[-self._keep_last :]} | {keep, self._best()}
        for info in self._list():
            if _FOLDER.fullmatch(info.base_name) and info.base_name not in kept:
                self._delete(info.base_name)

    def _delete(self, name: str) -> None:
        """The commit mark first, so that a half-deleted directory is no checkpoint."""
        mark = f"{self._root}/{name}/{_META}"
        if self._fs.get_file_info(mark).type == arrow_fs.FileType.File:
            self._fs.delete_file(mark)
        self._fs.delete_dir(f"{self._root}/{name}")


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads one checkpoint directory (a local path or a URI) and verifies every byte.

    Raises InputError that names the file and the remedy: DamagedCheckpoint for missing, shortened or changed files,
    plain InputError for what a later metadist wrote, and for a `trainer.pt` that holds code.
    """
    fs, root = _open(str(path))
    meta = _read_meta(fs, root, path)
    contents: dict[str, bytes] = {}
    for file, expected in meta["files"].items():
        if fs.get_file_info(f"{root}/{file}").type != arrow_fs.FileType.File:
            raise _damaged(path, file, "is missing")
        content = _read(fs, f"{root}/{file}")
        if len(content) != expected["bytes"]:
            raise _damaged(path, file, f"has {len(content)} bytes instead of {expected['bytes']}")
        if _sha256(content) != expected["sha256"]:
            raise _damaged(path, file, "has changed since it was written (its sha256 differs)")
        contents[file] = content
    return _decode(path, meta, contents)


def theta_sha256(vector: np.ndarray) -> str:
    """A hash of dtype, shape and bytes: equal exactly when two vectors are equal to the bit."""
    digest = hashlib.sha256(f"{vector.dtype.str}{list(vector.shape)}".encode())
    digest.update(np.ascontiguousarray(vector).data)
    return digest.hexdigest()


def _encode(checkpoint: Checkpoint) -> dict[str, bytes]:
    """File name -> content, the commit mark last."""
    weights = {name: np.asarray(array, order="C") for name, array in checkpoint.weights.items()}
    files = {
        _WEIGHTS: safetensors.numpy.save(weights),
        _TRAINER: _encode_trainer(checkpoint.trainer),
        _CONFIG: checkpoint.config.encode(),
    }
    meta: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "step": checkpoint.step,
        "metrics": {name: float(value) for name, value in checkpoint.metrics.items()},
        "weights": list(weights),
        "run": json.loads(json.dumps(checkpoint.run)),
        "files": {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()},
    }
    meta["sha256"] = _meta_sha256(meta)
    return files | {_META: json.dumps(meta, indent=2).encode()}


def _encode_trainer(trainer: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(trainer, buffer)
    try:
        torch.load(io.BytesIO(buffer.getvalue()), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise TypeError(f"The trainer state may hold only plain values and tensors ({reason})") from error
    return buffer.getvalue()


def _decode(path: str | Path, meta: dict[str, Any], contents: dict[str, bytes]) -> Checkpoint:
    stored = safetensors.numpy.load(contents[_WEIGHTS])
    try:
        trainer = torch.load(io.BytesIO(contents[_TRAINER]), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise InputError(
            f"{_TRAINER} in {path} holds something other than plain values and tensors and was not loaded: "
            "use a checkpoint from a source you trust."
        ) from error
    return Checkpoint(
        step=meta["step"],
        weights={name: stored[name].copy() for name in meta["weights"]},
        trainer=trainer,
        config=contents[_CONFIG].decode(),
        metrics=meta["metrics"],
        run=meta["run"],
    )


def _read_meta(fs: arrow_fs.FileSystem, root: str, path: str | Path) -> dict[str, Any]:
    if fs.get_file_info(f"{root}/{_META}").type != arrow_fs.FileType.File:
        raise _damaged(path, _META, "is missing")
    try:
        meta = json.loads(_read(fs, f"{root}/{_META}"))
    except ValueError as error:
        raise _damaged(path, _META, f"is not JSON ({error})") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("format"), int):
        raise _damaged(path, _META, "does not describe a checkpoint")
    if meta["format"] > FORMAT_VERSION:
        raise InputError(
            f"The checkpoint {path} has format {meta['format']}, this metadist reads up to {FORMAT_VERSION}: "
            "install the metadist that wrote it, or a later one."
        )
    if meta.get("sha256") != _meta_sha256(meta):
        raise _damaged(path, _META, "has changed since it was written (its sha256 differs)")
    return meta


def _meta_sha256(meta: dict[str, Any]) -> str:
    described = {key: value for key, value in meta.items() if key != "sha256"}
    return _sha256(json.dumps(described, sort_keys=True).encode())


def _damaged(path: str | Path, file: str, what: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{file} in the checkpoint {path} {what}: delete that directory and use another one.")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _open(location: str) -> tuple[arrow_fs.FileSystem, str]:
    """The file system and the path in it."""
    if "://" not in location:
        return arrow_fs.LocalFileSystem(), os.path.abspath(location)
    try:
        fs, root = arrow_fs.FileSystem.from_uri(location)
    except ValueError as error:
        raise InputError(f"{location} is no place that checkpoints can be in ({error}): give a path or URI.") from error
    return fs, root.rstrip("/")


def _join(location: str, name: str) -> str:
    """The place `name` under a path, or under a URI that may end in options (`s3://bucket/runs?region=...`)."""
    if "://" not in location:
        return os.path.join(os.path.abspath(location), name)
    base, mark, options = location.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{options}"


def _read(fs: arrow_fs.FileSystem, path: str) -> bytes:
    with fs.open_input_stream(path) as stream:
        return stream.read()


def _write(fs: arrow_fs.FileSystem, path: str, content: bytes) -> None:
    with fs.open_output_stream(path) as stream:
        stream.write(content)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_directory(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
