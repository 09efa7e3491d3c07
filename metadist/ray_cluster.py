"""Joining a Ray cluster, or starting one on this machine."""

import hashlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from metadist.errors import InputError


def connect(address: str | None, cpus: float, say: Callable[[str], None]) -> bool:
    """Join the cluster at `address` or RAY_ADDRESS, or start one here with at least `cpus` CPUs; True if this call did.

    A cluster started here counts as many CPUs as the workers ask for, even where that is more than there are.
    """
    if ray.is_initialized():
        return False
    before = signal.getsignal(signal.SIGTERM)
    _init(address or os.environ.get("RAY_ADDRESS"), cpus, say)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # ray.init sets one that exits with another code
    return True


def _init(address: str | None, cpus: float, say: Callable[[str], None]) -> None:
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # pages about what the fleet says in a line
    if address:
        if "RAY_AUTH_MODE" not in os.environ and (Path.home() / ".ray" / "auth_token").exists():
            os.environ["RAY_AUTH_MODE"] = "token"
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RayError, RuntimeError, ValueError) as error:
            raise InputError(f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}") from None
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    here = os.cpu_count() or 1
    if cpus > here:
        say(f"the workers ask for {cpus:g} CPUs and this machine has {here}: they will share them")
    cpus = max(here, math.ceil(cpus))
    ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def check_gpus(per_worker: float, started: bool, say: Callable[[str], None]) -> None:
    """Raises InputError where no worker could ever have its GPUs; a cluster joined may still get nodes that have."""
    there = ray.cluster_resources().get("GPU", 0)
    if per_worker <= there:
        return
    told = f"fleet.gpus_per_worker={per_worker:g}, but there are {there:g} GPUs"
    if started:
        raise InputError(f"{told} on this machine: set it to 0, or give fleet.address of a cluster that has them")
    say(f"{told} in the cluster now: waiting until a node has them")


def disconnect() -> None:
    """Leave the cluster; one that `connect` started ends."""
    ray.shutdown()


class Writer:
    """Stands for the one driver that may write checkpoints in a place; it ends with that driver."""

    def __init__(self, holder: str) -> None:
        self._holder = holder

    def holder(self) -> str:
        """Which driver that is."""
        return self._holder


def claim(place: str, holder: str, patience_s: float = 10.0) -> Any:
    """The right to write checkpoints in a place that no lock file can guard, against other drivers of this cluster, for
    as long as what is returned is kept. Raises InputError that names the one that has it; one that was just killed
    has `patience_s` to be noticed."""
    name = f"writer-{hashlib.sha256(place.encode()).hexdigest()[:16]}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)  # it dies as the driver
    options = {"name": name, "namespace": "metadist", "num_cpus": 0, "max_restarts": 0, "scheduling_strategy": here}
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return ray.remote(Writer).options(**options).remote(holder)
        except ValueError:
            if time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            other = _holder(name)
            raise InputError(
                f"{place} is in use by another driver{other}: wait until it ends, stop it, or set checkpoint.location"
            ) from None


def _holder(name: str) -> str:
    try:
        return f" ({ray.get(ray.get_actor(name, 'metadist').holder.remote(), timeout=5)})"
    except (ValueError, RayError):
        return ""
