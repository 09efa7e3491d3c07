"""Any `nn.Module` as a pure function of named weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from metadist.errors import InputError


class Model:
    """A module whose trainable parameters are passed in: `model(weights, *inputs) -> outputs`.

    `parameters` are the initial values of what is trained, tied parameters once; `constants` are frozen parameters and
    buffers, which are the same for every task and travel in the checkpoint. The module is held in training mode:
    normalisation uses the batch at hand, so its results are transductive.
    """

    def __init__(self, module: nn.Module):
        refuse_state(module)
        self.module = module.train()
        self.parameters: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in module.named_parameters() if parameter.requires_grad
        }
        frozen = {name: value.detach() for name, value in module.named_parameters() if not value.requires_grad}
        self.constants: dict[str, Tensor] = frozen | {name: value.detach() for name, value in module.named_buffers()}
        if not self.parameters:
            raise InputError("the model has no trainable parameter: leave requires_grad on for what is to be learned")

    def __call__(self, weights: Mapping[str, Tensor], *inputs: Tensor) -> Any:
        """weights {name: [*shape]}, inputs [n, ...] each -> outputs [n, ...]."""
        return functional_call(self.module, {**self.constants, **weights}, inputs)

    def load_constants(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take frozen weights and buffers from a checkpoint or from the driver."""
        self.constants = {
            name: torch.from_numpy(np.array(arrays[name])).to(self.constants[name]) for name in self.constants
        }

    def to(self, device: torch.device, dtype: torch.dtype) -> "Model":
        """Move the constants (and their floating point type) to where tasks are computed."""
        self.module.to(device)
        self.constants = {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in self.constants.items()
        }
        return self


def refuse_state(module: nn.Module) -> None:
    """Raise InputError for a layer that is not a pure function of its weights and inputs."""
    for name, layer in module.named_modules():
        kind = type(layer).__name__
        if isinstance(layer, _BatchNorm | nn.InstanceNorm1d | nn.InstanceNorm2d) and layer.track_running_stats:
            raise InputError(
                f"layer {name!r} ({kind}) keeps running statistics, which tasks would leak through: "
                "build it with track_running_stats=False, or use GroupNorm or LayerNorm"
            )
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            raise InputError(
                f"layer {name!r} ({kind}) draws from a global generator, so a run could not be repeated: set its p to 0"
            )
        if isinstance(layer, nn.RNNBase) and layer.dropout > 0:
            raise InputError(f"layer {name!r} ({kind}) uses dropout from a global generator: set its dropout to 0")
