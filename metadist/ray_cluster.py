"""Joining a Ray cluster, or starting one on this machine."""

import logging
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import ray
from ray.exceptions import RayError

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


def disconnect() -> None:
    """Leave the cluster; one that `connect` started ends."""
    ray.shutdown()
