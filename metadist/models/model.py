"""Any `nn.Module` as a pure function of named weights."""

from collections.abc import Mapping
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from metadist.errors import InputError
from metadist.models.layers import BatchNorm, Dropout

HEAD = "head."
DROPOUT = "key of dropout"
NORMS = (BatchNorm, _NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
KEYS_APART = 1_000_003  # between the keys of two layers, so that those of two inner steps do not meet


class Model:
    """A module whose trainable parameters are passed in: `model(weights, *inputs) -> outputs`.

    `parameters` are the initial values of what is trained, tied parameters once; `constants` are frozen parameters and
    buffers, which are the same for every task and travel in the checkpoint. The module is held in training mode:
    normalisation uses the batch at hand, so its results are transductive. Dropout acts where the weights hold a
    DROPOUT key, an int64 scalar, and is a function of that; the module's own dropout layers are replaced for it.
    """

    def __init__(self, module: nn.Module):
        refuse_state(module)
        self.module, self._dropouts = with_keyed_dropout(module.train())
        self.parameters: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in module.named_parameters() if parameter.requires_grad
        }
        frozen = {name: value.detach() for name, value in module.named_parameters() if not value.requires_grad}
        self.constants: dict[str, Tensor] = frozen | {name: value.detach() for name, value in module.named_buffers()}
        self._places = _places(module)
        self._batch_norms = {path: layer for path, layer in module.named_modules() if isinstance(layer, BatchNorm)}
        self._versions = {name: value._version for name, value in self.constants.items()}
        if not self.parameters:
            raise InputError("the model has no trainable parameter: leave requires_grad on for what is to be learned")

    def __call__(self, weights: Mapping[str, Tensor], *inputs: Tensor) -> Any:
        """weights {name: [*shape]}, inputs [n, ...] each -> outputs [n, ...]."""
        return self._call(self.module, self._places, weights, inputs)

    @property
    def has_dropout(self) -> bool:
        """Whether its outputs depend on a DROPOUT key."""
        return bool(self._dropouts)

    @property
    def recurrent(self) -> str | None:
        """The name of a recurrent layer, if there is one: vmap cannot batch it, cuDNN not differentiate it twice."""
        kinds = nn.RNNBase | nn.RNNCellBase
        return next((path for path, layer in self.module.named_modules() if isinstance(layer, kinds)), None)

    @property
    def norm_parameters(self) -> list[str]:
        """Names of the trainable parameters of normalisation layers."""
        layers = [path for path, layer in self.module.named_modules() if isinstance(layer, NORMS)]
        names = {self._places[place] for place in self._places if place.rpartition(".")[0] in layers}
        return [name for name in self.parameters if name in names]

    @property
    def running_names(self) -> list[tuple[str, str]]:
        """What weights may hold for each of our batch normalisation layers, to be used in place of the batch's own:
        a mean and a variance, [channels] each."""
        return [(f"{path}.running_mean", f"{path}.running_var") for path in self._batch_norms]

    def observe(self, weights: Mapping[str, Tensor], *inputs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """Outputs, and the means and variances of this batch under `running_names`."""
        for layer in self._batch_norms.values():
            layer.noted = []
        try:
            outputs = self(weights, *inputs)
            pairs = [zip(*(layer.noted or []), strict=True) for layer in self._batch_norms.values()]
            means = [[torch.stack(values).mean(dim=0) for values in pair] for pair in pairs]  # of a layer used twice
        finally:
            for layer in self._batch_norms.values():
                layer.noted = None
        named = zip(self.running_names, means, strict=True)
        return outputs, {name: value for names, own in named for name, value in zip(names, own, strict=True)}

    @property
    def splits(self) -> bool:
        """Whether the module has a method `features` and a layer `head`, which share no weights."""
        has_features = isinstance(getattr(type(self.module), "features", None), FunctionType)
        has_head = isinstance(getattr(self.module, "head", None), nn.Module)
        tied = any(place.startswith(HEAD) != name.startswith(HEAD) for place, name in self._places.items())
        return has_features and has_head and not tied

    def features(self, weights: Mapping[str, Tensor], *inputs: Tensor) -> Any:
        """weights (the head's are not needed), inputs [n, ...] each -> what `head` takes, [n, ...]."""
        places = {f"module.{place}": name for place, name in self._places.items()}
        return self._call(_Features(self.module), places, weights, inputs)

    def head(self, weights: Mapping[str, Tensor], features: Tensor) -> Any:
        """weights (the head's suffice), features [n, ...] -> outputs [n, ...]."""
        places = {place.removeprefix(HEAD): name for place, name in self._places.items() if place.startswith(HEAD)}
        assert isinstance(self.module.head, nn.Module)
        return self._call(self.module.head, places, weights, (features,))

    def _call(
        self, module: nn.Module, places: Mapping[str, str], weights: Mapping[str, Tensor], inputs: tuple[Tensor, ...]
    ) -> Any:
        given = {**self.constants, **weights}
        placed = {place: given[name] for place, name in places.items() if name in given}
        key = weights.get(DROPOUT)
        for number, layer in enumerate(self._dropouts):
            layer.key = None if key is None else key + number * KEYS_APART
        for names, layer in zip(self.running_names, self._batch_norms.values(), strict=True):
            layer.running = (weights[names[0]], weights[names[1]]) if names[0] in weights else None
        outputs = functional_call(module, placed, inputs, tie_weights=False)
        for name, value in self.constants.items():
            if value._version != self._versions[name]:
                raise InputError(
                    f"the model changed its buffer {name!r} in forward, which tasks would leak through: "
                    "keep no state between calls, or compute it anew in each"
                )
        return outputs

    def load_constants(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take frozen weights and buffers from a checkpoint or the driver. Raises InputError where one is absent."""
        absent = [name for name in self.constants if name not in arrays]
        if absent:
            raise InputError(f"the weights lack {absent[0]!r}, which the model needs")
        self.constants = {
            name: torch.from_numpy(np.array(arrays[name])).to(self.constants[name]) for name in self.constants
        }
        self._versions = {name: value._version for name, value in self.constants.items()}

    def to(self, device: torch.device, dtype: torch.dtype) -> "Model":
        """Move the constants (and their floating point type) to where tasks are computed."""
        self.module.to(device)
        self.constants = {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in self.constants.items()
        }
        self._versions = {name: value._version for name, value in self.constants.items()}
        return self


class _Features(nn.Module):
    """A module's method `features` as a module."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return self.module.features(*inputs)  # pyright: ignore[reportCallIssue]


def with_keyed_dropout(module: nn.Module) -> tuple[nn.Module, list[Dropout]]:
    """The module with its dropout layers replaced, in place, by ones whose masks are a function of a key; and these."""
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.modules.dropout._DropoutNd):
                setattr(parent, name, Dropout(layer.p, whole=not isinstance(layer, nn.Dropout)))
    return module, [layer for layer in module.modules() if isinstance(layer, Dropout) and layer.p > 0]


def _places(module: nn.Module) -> dict[str, str]:
    """Each place of a parameter or buffer -> its name, which tied ones share. A layer used under two names has one
    place: torch's own `tie_weights` sets it twice and does not restore it (pytorch#164759)."""
    names: dict[int, str] = {}
    places: dict[str, str] = {}
    for path, layer in module.named_modules():
        for own in (layer.named_parameters, layer.named_buffers):
            for name, tensor in own(recurse=False, remove_duplicate=False):
                place = f"{path}.{name}" if path else name
                places[place] = names.setdefault(id(tensor), place)
    return places


def refuse_state(module: nn.Module) -> None:
    """Raise InputError for a layer that is not a pure function of its weights and inputs."""
    for name, layer in module.named_modules():
        kind = type(layer).__name__
        if isinstance(layer, _NormBase) and layer.track_running_stats:
            raise InputError(
                f"layer {name!r} ({kind}) keeps running statistics, which tasks would leak through: "
                "build it with track_running_stats=False, or use GroupNorm or LayerNorm"
            )
        keyed = isinstance(layer, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d) and layer.p < 1
        if isinstance(layer, nn.modules.dropout._DropoutNd) and not keyed:
            raise InputError(
                f"layer {name!r} ({kind}) cannot draw from a task's key: use nn.Dropout with p below 1, or take it out"
            )
        if isinstance(layer, nn.RNNBase | nn.MultiheadAttention) and layer.dropout > 0:
            raise InputError(f"layer {name!r} ({kind}) uses dropout from a global generator: set its dropout to 0")
