"""How busy a machine is, against figures worked out by hand and against the kernel's own."""

import os
import socket
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from metadist.core.messages import Chunk, ChunkReport
from metadist.fleet import vitals
from metadist.fleet.vitals import Machines, Vitals

Times = namedtuple("Times", "user nice system idle iowait irq softirq steal guest guest_nice")


@pytest.fixture
def clock(monkeypatch):
    seconds = [100.0]
    monkeypatch.setattr(vitals.time, "monotonic", lambda: seconds[0])
    return seconds


def report(worker, **system):
    return ChunkReport(Chunk("train", 0, 0, 1), None, None, {}, worker, {}, system)  # pyright: ignore[reportArgumentType]


def test_a_machine_is_described_by_what_changed_since_the_last_look(clock, monkeypatch):
    times = [Times(10, 0, 5, 80, 5, 0, 0, 0, 4, 0), Times(16, 1, 7, 90, 6, 0, 0, 0, 9, 0)]
    network = [SimpleNamespace(bytes_recv=5e6, bytes_sent=1e6), SimpleNamespace(bytes_recv=7.5e6, bytes_sent=1.25e6)]
    monkeypatch.setattr(psutil, "cpu_times", lambda: times.pop(0))
    monkeypatch.setattr(psutil, "net_io_counters", lambda: network.pop(0))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(used=2.5e9, percent=31.2))
    monkeypatch.setattr(psutil, "disk_usage", lambda path: SimpleNamespace(percent=77.0))
    own = Vitals()
    clock[0] += 9.9
    assert own.sample() == {}
    clock[0] += 0.1
    assert own.sample() == {
        # of 20 seconds of the cores, 10 idle and 1 waiting for the disk, guests being in `user` already
        "cpu_utilization_percentage": 45.0, "system_memory_usage_megabytes": 2500,
        "system_memory_usage_percentage": 31.2, "disk_usage_percentage": 77.0,
        "network_receive_megabytes": 2.5, "network_transmit_megabytes": 0.2,
    }  # fmt: skip
    clock[0] += 9.9
    assert own.sample()["cpu_utilization_percentage"] == 45.0  # the same look


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat, which Linux has")
def test_the_cores_times_are_the_kernels():
    busy, total = vitals._cpu_seconds()
    user, nice, system, idle, iowait, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    theirs = user + nice + system + irq + softirq + steal
    ticks, cores = os.sysconf("SC_CLK_TCK"), os.cpu_count() or 1
    assert busy == pytest.approx(theirs / ticks, abs=2 * cores)
    assert total == pytest.approx((theirs + idle + iowait) / ticks, abs=2 * cores)


@pytest.fixture
def gpu(monkeypatch):
    """The second of two GPUs that this process sees, with 20 of its 80 GB taken."""

    def memory(device):
        assert device == 1  # of the other, that would make a context
        return 60_000_000_000, 80_000_000_000

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 90 + device)
    return monkeypatch


@pytest.mark.parametrize(
    ("visible", "name"), [("3,6", "gpu_6"), ("3, 6", "gpu_6"), ("", "gpu_1"), ("GPU-a,GPU-b", "gpu_GPU-b")]
)
def test_a_gpu_has_its_number_on_the_machine(gpu, visible, name):
    gpu.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert vitals._gpus() == {
        f"{name}_memory_usage_megabytes": 20_000, f"{name}_memory_usage_percentage": 25.0,
        f"{name}_utilization_percentage": 91.0,
    }  # fmt: skip


@pytest.mark.parametrize("error", [ModuleNotFoundError("nvidia-ml-py"), RuntimeError("driver"), Exception("MIG")])
def test_a_gpu_of_which_nvml_tells_no_utilization_ends_no_worker(gpu, error):
    def refuse(device):
        raise error

    gpu.setattr(torch.cuda, "utilization", refuse)
    gpu.setenv("CUDA_VISIBLE_DEVICES", "3,6")
    assert list(vitals._gpus()) == ["gpu_6_memory_usage_megabytes", "gpu_6_memory_usage_percentage"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_that_is_there_has_memory_in_use():
    taken = torch.ones(100_000_000, device="cuda")  # 400 MB
    (used,) = [value for name, value in vitals._gpus().items() if name.endswith("memory_usage_megabytes")]
    assert used >= 400 and taken[0] == 1


def test_each_machine_is_told_of_every_ten_seconds(clock, monkeypatch):
    monkeypatch.setattr(Vitals, "_machine", lambda self: {"cpu_utilization_percentage": 5.0})
    monkeypatch.setattr(vitals, "_gpus", dict)
    machines, own = Machines(), f"system/{socket.gethostname()}/cpu_utilization_percentage"
    first = report("far:1", gpu_0=1.0), report("far:2", gpu_1=2.0), report("new:1")
    assert machines.metrics(first) == {"system/far/gpu_0": 1.0, "system/far/gpu_1": 2.0}
    clock[0] += 9.0
    assert machines.metrics([report("far:1", gpu_0=3.0)]) == {}
    clock[0] += 1.0
    assert machines.metrics([report("far:1", gpu_0=4.0)]) == {"system/far/gpu_0": 4.0, own: 5.0}
