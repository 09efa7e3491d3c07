"""What the bits of a run depend on, and whether a run may be continued under another configuration."""

import hashlib
import json
from importlib import metadata
from typing import Any

import torch

from metadist.config import Config
from metadist.config.build import aggregation, chunk_size, open_data, worker_device
from metadist.engine import Engine
from metadist.errors import InputError

FREE = {"run_dir", "num_workers", "max_time_s", "fleet", "evaluation", "checkpoint", "tracking", "meta_steps"}
"""Settings that may change when a run is continued. Of these, the schedule alone depends on meta_steps, by intent."""


def run_identity(config: Config, engine: Engine) -> dict[str, Any]:
    """Within one identity theta is the same to the bit, whatever the number of workers. Plain JSON values."""
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in FREE}
    settings["data"].pop("path")  # where the data lies is not what it holds
    dataset = open_data(config)
    return {
        "settings": settings,
        "data_digest": dataset.digest if dataset else None,
        "engine": engine.kind,
        "chunk_size": chunk_size(config, engine),
        "aggregate": aggregation(config, engine),
        "threads": config.fleet.threads_per_worker,
        "metadist": metadata.version("metadist"),
        "torch": torch.__version__,
        "device": engine.fingerprint() if worker_device(config) == "cpu" else "GPU",
    }


def digest(identity: dict[str, Any]) -> str:
    """A short name for an identity (16 hex digits)."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def check_continues(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Raise InputError where the run would become another one; otherwise what makes it no longer bit-identical."""
    changed = _differences(before["settings"], now["settings"])
    if before["data_digest"] != now["data_digest"]:
        changed.append(f"the data (digest {before['data_digest']} -> {now['data_digest']})")
    if changed:
        raise InputError(
            f"this is not the run in the checkpoint; changed: {'; '.join(changed)}: "
            "change it back, or start another run with its own run_dir"
        )
    return [f"{key} {before[key]} -> {now[key]}" for key in now if key != "settings" and before.get(key) != now[key]]


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [d for key in keys for d in _differences(before.get(key), now.get(key), f"{path}.{key}".strip("."))]
    return [] if before == now else [f"{path} {before!r} -> {now!r}"]
