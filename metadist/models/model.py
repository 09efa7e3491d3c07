"""Any `nn.Module` as a pure function of named weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm as OldWeightNorm

from metadist.core.errors import InputError
from metadist.models.layers import BatchNorm, Dropout, WeightNorm, normed_weight

HEAD = "head."
DROPOUT = "key of dropout"
NORMS = (BatchNorm, _NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
RECOMPUTED = "metadist: the model has hooks on saved tensors"
KEYS_APART = 1_000_003  # between the keys of two layers, so that those of two inner steps do not meet


class Model:
    """A module whose trainable parameters are passed in: `model(weights, *inputs) -> outputs`.

    `parameters` are the initial values of what is trained, tied parameters once; `constants` are frozen parameters and
    buffers, which are the same for every task and travel in the checkpoint. The module is held in training mode:
    normalisation uses the batch at hand, so its results are transductive. Dropout acts where the weights hold a
    DROPOUT key, an int64 scalar, and is a function of that; the module's own dropout layers are replaced for it.

    Args:
        module: any network that is a pure function of its weights and inputs. It is changed: put in training mode,
            dropout and weight norms replaced.
        note: for the user, before a run, on where the initial weights come from.

    Raises:
        InputError: for a layer with state, chance or weights that cannot be meta-learned; it is named, with the remedy.

    Example:
        >>> import torch
        >>> from metadist import Model
        >>> model = Model(torch.nn.Linear(3, 2))
        >>> {name: tuple(value.shape) for name, value in model.parameters.items()}
        {'weight': (2, 3), 'bias': (2,)}
        >>> model({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, torch.ones(1, 3))
        tensor([[3., 3.]])
    """

    def __init__(self, module: nn.Module, note: str = ""):
        self.note = note
        refuse_state(module)
        replace_weight_norms(module)
        self.module, self._dropouts = with_keyed_dropout(module.train())
        self.parameters: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in module.named_parameters() if parameter.requires_grad
        }
        frozen = {name: value.detach() for name, value in module.named_parameters() if not value.requires_grad}
        self.constants: dict[str, Tensor] = frozen | {name: value.detach() for name, value in module.named_buffers()}
        self._places = _places(module)
        self._held: dict[str, Tensor] | None = None
        self.recomputes = ""
        """The layer that was seen to have activations computed again on the way back, in words; "" where none was."""
        self._batch_norms = {path: layer for path, layer in module.named_modules() if isinstance(layer, BatchNorm)}
        if not self.parameters:
            raise InputError("the model has no trainable parameter: leave requires_grad on for what is to be learned")

    def __call__(self, weights: Mapping[str, Tensor], *inputs: Tensor) -> Any:
        """weights {name: [*shape]}, inputs [n, ...] each -> outputs [n, ...]."""
        return self._call(self.module, self._places, weights, inputs)

    @property
    def has_dropout(self) -> bool:
        """Whether its outputs depend on a DROPOUT key."""
        return bool(self._dropouts)

    @cached_property
    def recurrent(self) -> str | None:
        """The name of a recurrent layer, if there is one: vmap cannot batch it, cuDNN not differentiate it twice."""
        kinds = nn.RNNBase | nn.RNNCellBase
        return next((path for path, layer in self.module.named_modules() if isinstance(layer, kinds)), None)

    @property
    def norm_parameters(self) -> list[str]:
        """Names of the trainable parameters of normalisation layers."""
        layers = [path for path, layer in self.module.named_modules() if isinstance(layer, NORMS)]
        names = {own.name for place, own in self._places.items() if place.rpartition(".")[0] in layers}
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
        tied = any(place.startswith(HEAD) != own.name.startswith(HEAD) for place, own in self._places.items())
        return has_features and has_head and not tied

    def features(self, weights: Mapping[str, Tensor], *inputs: Tensor) -> Any:
        """weights (the head's are not needed), inputs [n, ...] each -> what `head` takes, [n, ...]."""
        return self._call(self.module.features, self._places, weights, inputs)  # pyright: ignore[reportArgumentType]

    def head(self, weights: Mapping[str, Tensor], features: Tensor) -> Any:
        """weights (the head's suffice), features [n, ...] -> outputs [n, ...]."""
        places = {place: own for place, own in self._places.items() if place.startswith(HEAD)}
        assert isinstance(self.module.head, nn.Module)
        return self._call(self.module.head, places, weights, (features,))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Leave weights in the module between calls, so that what is computed again on the way back (activation
        checkpointing) finds those of the last call; at the end the module has its own again."""
        self._held = {}
        try:
            yield
        finally:
            self._restore(self._held)
            self._held = None

    def _call(
        self,
        module: Callable[..., Any],
        places: Mapping[str, "_Place"],
        weights: Mapping[str, Tensor],
        inputs: tuple[Tensor, ...],
    ) -> Any:
        given = {**self.constants, **weights}
        placed = {place: given[own.name] for place, own in places.items() if own.name in given}
        key = weights.get(DROPOUT)
        for number, layer in enumerate(self._dropouts):
            layer.key = None if key is None else key + number * KEYS_APART
        for names, layer in zip(self.running_names, self._batch_norms.values(), strict=True):
            layer.running = (weights[names[0]], weights[names[1]]) if names[0] in weights else None
        versions = {place: _version(value) for place, value in placed.items()}
        before = {} if self._held is None else self._held
        try:
            for place, value in placed.items():
                own = places[place]
                before.setdefault(place, own.tensors[own.key])
                own.tensors[own.key] = value
            outputs = self._watched(module, inputs)
            self._refuse_changes(placed, versions)
        finally:
            if self._held is None:
                self._restore(before)
        return outputs

    def _watched(self, module: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
        """module(*inputs), noting in `recomputes` whether it has hooks on what autograd saves."""
        hooks: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
        apart = hooks._saved_tensors_hooks_get_disabled_error_message()  # torch.func's own
        if self.recomputes or apart:
            return module(*inputs)
        try:
            with torch.autograd.graph.disable_saved_tensors_hooks(RECOMPUTED):
                return module(*inputs)
        except RuntimeError as error:
            if RECOMPUTED not in str(error):
                raise
            self.recomputes = layer_of(error, self.module)
        return module(*inputs)

    def _restore(self, before: Mapping[str, Tensor]) -> None:
        for place, value in before.items():
            self._places[place].tensors[self._places[place].key] = value

    def _refuse_changes(self, placed: Mapping[str, Tensor], versions: Mapping[str, int]) -> None:
        """Raise InputError where forward changed a weight or buffer, or put another in its place."""
        for place, value in placed.items():
            own, changed = self._places[place], _version(value) != versions[place]
            if changed or own.tensors.get(own.key) is not value:
                kind = "buffer" if own.name in self.constants else "weight"
                raise InputError(
                    f"the model {'changed' if changed else 'assigned'} its {kind} {place!r} in forward, which tasks "
                    "would leak through: keep no state between calls, compute it anew in each"
                )

    def load_constants(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take frozen weights and buffers from a checkpoint or the driver. Raises InputError where one is absent."""
        absent = [name for name in self.constants if name not in arrays]
        if absent:
            raise InputError(f"the weights lack {absent[0]!r}, which the model needs")
        self.constants = {  # in the memory formats that the model's have, of which an array may have lost its own
            name: torch.empty_like(own).copy_(torch.from_numpy(np.array(arrays[name])))
            for name, own in self.constants.items()
        }

    def to(self, device: torch.device, dtype: torch.dtype) -> "Model":
        """Move the constants (and their floating point type) to where tasks are computed."""
        self.module.to(device)
        self.constants = {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in self.constants.items()
        }
        return self


def layer_of(error: BaseException, module: nn.Module) -> str:
    """ "layer 'x' (Kind)", the innermost one in the error's traceback, else "the model or loss"."""
    names = {id(layer): (name, type(layer).__name__) for name, layer in module.named_modules()}
    found, trace = "the model or loss", error.__traceback__
    while trace is not None:
        own = names.get(id(trace.tb_frame.f_locals.get("self")))
        if own is not None:
            found = f"layer {own[0]!r} ({own[1]})" if own[0] else f"the model ({own[1]})"
        trace = trace.tb_next
    return found


def with_keyed_dropout(module: nn.Module) -> tuple[nn.Module, list[Dropout]]:
    """The module with its dropout layers replaced, in place, by ones whose masks are a function of a key; and these."""
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.modules.dropout._DropoutNd):
                setattr(parent, name, Dropout(layer.p, whole=not isinstance(layer, nn.Dropout)))
    return module, [layer for layer in module.modules() if isinstance(layer, Dropout) and layer.p > 0]


class _Place(NamedTuple):
    """A parameter or buffer of a module: its name, which tied ones share, and the layer's own dictionary that it is in
    under a key."""

    name: str
    tensors: dict[str, Any]
    key: str


def _places(module: nn.Module) -> dict[str, _Place]:
    """Each path of a parameter or buffer. A layer used under two names has one: torch's own `tie_weights` sets it twice
    and does not restore it (pytorch#164759)."""
    names: dict[int, str] = {}
    places: dict[str, _Place] = {}
    for path, layer in module.named_modules():
        for tensors in (layer._parameters, layer._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    place = f"{path}.{key}" if path else key
                    places[place] = _Place(names.setdefault(id(tensor), place), tensors, key)
    return places


def _version(tensor: Tensor) -> int:
    """Goes up with every change in place; 0 where torch does not count (inference mode)."""
    return 0 if tensor.is_inference() else tensor._version


def replace_weight_norms(module: nn.Module) -> None:
    """Put, in place, weight norms that are differentiated twice as they should be where torch's are: the second
    derivatives of `torch._weight_norm` are wrong by a few per cent (torch 2.13)."""
    for layer in module.modules():
        if isinstance(layer, parametrize.ParametrizationList):
            for number, kind in enumerate(layer):
                if isinstance(kind, _WeightNorm):
                    layer[number] = WeightNorm(kind.dim)
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, OldWeightNorm):
                hook.compute_weight = partial(_weight_of, hook)  # pyright: ignore[reportAttributeAccessIssue]


def _weight_of(norm: OldWeightNorm, layer: nn.Module) -> Tensor:
    return normed_weight(getattr(layer, norm.name + "_v"), getattr(layer, norm.name + "_g"), norm.dim)


def refuse_state(module: nn.Module) -> None:
    """Raise InputError for a layer that is not a pure function of its weights and inputs, or has weights that are no
    real numbers."""
    for name, tensor in module.named_parameters():
        if is_lazy(tensor):
            layer = name.rpartition(".")[0]
            raise InputError(
                f"layer {layer!r} is lazy, it has no weights before its first call: call the module once on examples"
            )
        if tensor.is_complex():
            raise InputError(
                f"weight {name!r} is complex, theta holds real numbers: make it of two real tensors, such as by "
                "torch.view_as_complex in forward"
            )
    for name, layer in module.named_modules():
        kind = type(layer).__name__
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.max_norm is not None:
            raise InputError(
                f"layer {name!r} ({kind}) shortens its weights in forward, which no derivative sees: leave max_norm "
                "out, or scale what the layer gives"
            )
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
