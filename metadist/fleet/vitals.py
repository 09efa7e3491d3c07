"""How busy the machines of a run are, under the names that MLflow's page of system metrics knows."""

import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress

import psutil
import torch

from metadist.core.messages import ChunkReport

EVERY_S = 10.0
_MEGABYTE = 1e6


class Vitals:
    """This machine, looked at no more often than every ten seconds, for the first time ten seconds from now."""

    def __init__(self) -> None:
        self._looked_at, self._latest = time.monotonic(), dict[str, float]()
        self._busy, self._all = _cpu_seconds()
        self._received, self._sent = _network()

    def sample(self) -> Mapping[str, float]:
        """The latest look at it; empty before the first."""
        if time.monotonic() - self._looked_at >= EVERY_S:
            self._looked_at, self._latest = time.monotonic(), {**self._machine(), **_gpus()}
        return self._latest

    def _machine(self) -> dict[str, float]:
        (busy, total), memory, (received, sent) = _cpu_seconds(), psutil.virtual_memory(), _network()
        share = (busy - self._busy) / max(total - self._all, 1e-9)
        self._busy, self._all = busy, total
        return {
            "cpu_utilization_percentage": round(100 * share, 1),
            "system_memory_usage_megabytes": round(memory.used / _MEGABYTE),
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": psutil.disk_usage("/").percent,
            "network_receive_megabytes": round((received - self._received) / _MEGABYTE, 1),
            "network_transmit_megabytes": round((sent - self._sent) / _MEGABYTE, 1),
        }


class Machines:
    """The machines of a run, the driver's too, as its metrics `system/<host>/...`."""

    def __init__(self) -> None:
        self._own, self._told_at = Vitals(), dict[str, float]()

    def metrics(self, reports: Iterable[ChunkReport]) -> dict[str, float]:
        """What the latest reports say of each machine of which nothing was said for ten seconds."""
        found: dict[str, dict[str, float]] = {socket.gethostname(): dict(self._own.sample())}
        for report in reports:
            found.setdefault(report.worker.rpartition(":")[0], {}).update(report.system)
        now, values = time.monotonic(), dict[str, float]()
        for host, sample in found.items():
            if sample and now - self._told_at.get(host, -EVERY_S) >= EVERY_S:
                self._told_at[host] = now
                values |= {f"system/{host}/{name}": value for name, value in sample.items()}
        return values


def _cpu_seconds() -> tuple[float, float]:
    """Busy, and altogether, of all cores since the machine began."""
    times = psutil.cpu_times()
    total = sum(times) - getattr(times, "guest", 0) - getattr(times, "guest_nice", 0)  # which are in user and nice
    return total - times.idle - getattr(times, "iowait", 0), total


def _network() -> tuple[float, float]:
    """Bytes received and sent; 0 where the machine has no network."""
    counters = psutil.net_io_counters()
    return (counters.bytes_recv, counters.bytes_sent) if counters else (0, 0)


def _gpus() -> dict[str, float]:
    """Of those that this process computes on, by their number on the machine."""
    if not torch.cuda.is_initialized():
        return {}
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.isdecimal()]
    values = {}
    for own in range(torch.cuda.device_count()):
        number = visible[own] if own < len(visible) else own
        free, total = torch.cuda.mem_get_info(own)
        values[f"gpu_{number}_memory_usage_megabytes"] = round((total - free) / _MEGABYTE)
        values[f"gpu_{number}_memory_usage_percentage"] = round(100 * (1 - free / total), 1)
        with suppress(Exception):  # of NVML: not installed, or without this figure, as for a slice of a GPU (MIG)
            values[f"gpu_{number}_utilization_percentage"] = float(torch.cuda.utilization(own))
    return values
