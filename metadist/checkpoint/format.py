"""What a checkpoint directory holds, every byte verified at loading, no pickle.

A directory holds `weights.safetensors`, `trainer.pt`, `config.yaml` and, written last as the commit mark, `meta.json`
with the size and sha256 of the others. One to be used, not to be trained further, has no `trainer.pt`.
"""

import hashlib
import io
import json
import os
import pickletools
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from pyarrow import fs as arrow_fs

from metadist.core.errors import InputError
from metadist.core.files import MOST_TEXT_BYTES, reason
from metadist.core.storage import open_location, read

FORMAT_VERSION = 1
MOST_META_BYTES = 1 << 26
WEIGHTS, TRAINER, CONFIG, META = "weights.safetensors", "trainer.pt", "config.yaml", "meta.json"
MOST_BYTES = {WEIGHTS: 1 << 38, CONFIG: MOST_TEXT_BYTES}
MOST_TRAINER_WEIGHTS, MOST_TRAINER_BYTES = 8, 1 << 26  # times the bytes of the weights, and more for the rest

_IN_TRAINER = re.compile(r"torch\._utils _rebuild_tensor_v2|collections OrderedDict|torch \w+Storage")


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on. `step` meta-steps are done; `weights` are named arrays (their order is kept);
    `trainer` holds plain values and tensors (optimizer, counters), or nothing; `config` is the resolved YAML; `run`
    free-form JSON values (digests, the MLflow run id).
    """

    step: int
    weights: dict[str, np.ndarray]
    trainer: dict[str, Any]
    config: str
    metrics: dict[str, float]
    run: dict[str, Any]


class DamagedCheckpoint(InputError):
    """A checkpoint with missing, shortened or changed files. An earlier one may still be good."""


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads one checkpoint directory (a local path or a URI) and verifies every byte.

    Raises InputError that names the file and the remedy: DamagedCheckpoint for missing, shortened or changed files,
    plain InputError for what a later metadist wrote, and for a `trainer.pt` that holds code.
    """
    fs, root = open_location(str(path))
    meta = read_meta(fs, root, path)
    contents: dict[str, bytes] = {}
    for file, expected in meta["files"].items():
        size = _size(fs, root, path, file)
        if size != expected["bytes"]:
            raise _damaged(path, file, f"has {size} bytes instead of {expected['bytes']}")
        most = MOST_BYTES.get(file) or MOST_TRAINER_WEIGHTS * meta["files"][WEIGHTS]["bytes"] + MOST_TRAINER_BYTES
        if size > most:
            raise _foreign(path, f"has {size} bytes in {file}, more than training writes,")
        content = _read(fs, root, path, file)
        if _sha256(content) != expected["sha256"]:
            raise _damaged(path, file, "has changed since it was written (its sha256 differs)")
        contents[file] = content
    return _decode(path, meta, contents)


def theta_sha256(vector: np.ndarray) -> str:
    """A hash of dtype, shape and bytes: equal exactly when two vectors are equal to the bit."""
    digest = hashlib.sha256(f"{vector.dtype.str}{list(vector.shape)}".encode())
    digest.update(np.ascontiguousarray(vector).data)
    return digest.hexdigest()


def encode(checkpoint: Checkpoint) -> dict[str, bytes]:
    """File name -> content, the commit mark last."""
    weights = {name: np.asarray(array, order="C") for name, array in checkpoint.weights.items()}
    files = {
        WEIGHTS: safetensors.numpy.save(weights),
        **({TRAINER: _encode_trainer(checkpoint.trainer)} if checkpoint.trainer else {}),
        CONFIG: checkpoint.config.encode(),
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
    return files | {META: json.dumps(meta, indent=2).encode()}


def _encode_trainer(trainer: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(trainer, buffer)
    try:
        torch.load(io.BytesIO(buffer.getvalue()), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        why = str(error).splitlines()[0]
        raise TypeError(f"The trainer state may hold only plain values and tensors ({why})") from error
    return buffer.getvalue()


def _decode(path: str | Path, meta: dict[str, Any], contents: dict[str, bytes]) -> Checkpoint:
    try:
        stored = safetensors.numpy.load(contents[WEIGHTS])
        weights = {name: stored[name].copy() for name in meta["weights"]}
        config = contents[CONFIG].decode()
    except Exception as error:  # noqa: BLE001 - the hashes are right: whoever made this knew them
        raise _foreign(
            path, f"holds weights or a configuration that cannot be read ({type(error).__name__})"
        ) from error
    if TRAINER not in contents:
        return Checkpoint(meta["step"], weights, {}, config, meta["metrics"], meta["run"])
    try:
        _check_size(contents[TRAINER])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that it does not load anyway
            trainer = torch.load(io.BytesIO(contents[TRAINER]), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises whatever comes up; it runs nothing in the file
        raise _foreign(path, f"holds something other than plain values and tensors in {TRAINER}") from error
    if not isinstance(trainer, dict):
        raise _foreign(path, f"has no settings in {TRAINER}")
    return Checkpoint(meta["step"], weights, trainer, config, meta["metrics"], meta["run"])


def _check_size(content: bytes) -> None:
    """Raises ValueError where loading would make more of a trainer's file than it holds, or anything but plain values
    and tensors: torch would build a `bytearray` of any size."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > len(content):
            raise ValueError("it is compressed, and written so by no training")
        (program,) = (entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl")
        for operation, argument, _ in pickletools.genops(archive.read(program)):
            if operation.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4", "OBJ", "NEWOBJ", "NEWOBJ_EX"):
                raise ValueError(f"it makes objects ({operation.name})")
            if operation.name == "GLOBAL" and not _IN_TRAINER.fullmatch(str(argument)):
                raise ValueError(f"it names {argument}")


def read_meta(fs: arrow_fs.FileSystem, root: str, path: str | Path) -> dict[str, Any]:
    """What `meta.json` in the directory `root` says, verified; `path` is its name in errors."""
    if (size := _size(fs, root, path, META)) > MOST_META_BYTES:
        raise _damaged(path, META, f"has {size} bytes, more than any description of a checkpoint")
    content = _read(fs, root, path, META)
    try:
        meta = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, META, f"is not JSON ({error})") from error
    if not isinstance(meta, dict) or type(meta.get("format")) is not int or meta["format"] < 1:
        raise _damaged(path, META, "does not describe a checkpoint")
    if meta["format"] > FORMAT_VERSION:
        raise InputError(
            f"The checkpoint {path} has format {meta['format']}, this metadist reads up to {FORMAT_VERSION}: "
            "install the metadist that wrote it, or a later one."
        )
    if meta.get("sha256") != _meta_sha256(meta):
        raise _damaged(path, META, "has changed since it was written (its sha256 differs)")
    if not _describes(meta):
        raise _damaged(path, META, "does not describe a checkpoint")
    return meta


def _describes(meta: dict[str, Any]) -> bool:
    """Whether every entry is there and of its type, and no file but our own is named."""
    files, weights, metrics = meta.get("files"), meta.get("weights"), meta.get("metrics")
    return (
        type(meta.get("step")) is int
        and 0 <= meta["step"] <= 10**12
        and isinstance(files, dict)
        and set(files) | {TRAINER} == {WEIGHTS, TRAINER, CONFIG}
        and all(isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry) for entry in files.values())
        and isinstance(weights, list)
        and all(isinstance(name, str) for name in weights)
        and isinstance(metrics, dict)
        and isinstance(meta.get("run"), dict)
    )


def _size(fs: arrow_fs.FileSystem, root: str, path: str | Path, file: str) -> int:
    found = fs.get_file_info(f"{root}/{file}")
    if found.type != arrow_fs.FileType.File:
        absent = found.type == arrow_fs.FileType.NotFound
        raise _damaged(path, file, "is missing" if absent else "is no regular file")
    return found.size or 0


def _read(fs: arrow_fs.FileSystem, root: str, path: str | Path, file: str) -> bytes:
    try:
        return read(fs, f"{root}/{file}")
    except OSError as error:
        raise _damaged(path, file, f"cannot be read ({reason(error)})") from error


def _meta_sha256(meta: dict[str, Any]) -> str:
    described = {key: value for key, value in meta.items() if key != "sha256"}
    return _sha256(json.dumps(described, sort_keys=True).encode())


def _damaged(path: str | Path, file: str, what: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{file} in the checkpoint {path} {what}: delete that directory and use another one.")


def _foreign(path: str | Path, what: str) -> InputError:
    return InputError(f"The checkpoint {path} {what} and was not loaded: use a checkpoint from a source you trust.")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_directory(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
