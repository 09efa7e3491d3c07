"""How busy a machine is, where something of it cannot be found out."""

import pytest
import torch

from metadist.fleet import vitals
from metadist.fleet.vitals import Vitals


@pytest.mark.parametrize("error", [ModuleNotFoundError("nvidia-ml-py"), RuntimeError("NVML: Not Supported")])
def test_a_gpu_without_a_figure_for_its_use_costs_that_figure_alone(monkeypatch, error):
    def utilization(device: int) -> int:
        raise error

    monkeypatch.setattr(vitals, "EVERY_S", 0.0)
    for name, found in {"is_initialized": True, "device_count": 1, "mem_get_info": (3e9, 4e9)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, found=found: found)
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    sample = Vitals().sample()
    gpu = {name: value for name, value in sample.items() if name.startswith("gpu_")}
    assert gpu == {"gpu_2_memory_usage_megabytes": 1000, "gpu_2_memory_usage_percentage": 25.0}
    assert 0 < sample["system_memory_usage_percentage"] <= 100
