"""How named tensors lie in the flat vector that crosses the wire."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metadist.core.errors import InputError


@dataclass(frozen=True)
class Layout:
    """Names and shapes, in the order in which they follow one another in a vector of `size` = P elements.

    formats: of each tensor the memory format that it has in the model, which `unflatten` gives it on the CPU: there a
    convolution of channels-last images copies weights of another format in each of its calls.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    formats: tuple[torch.memory_format, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Layout":
        """Raises InputError where there are none."""
        if not tensors:
            raise InputError(
                "there is nothing to meta-learn: the model has no trainable parameters, or none before the head, which "
                "this learner makes from the support set; give the model a hidden layer, or take another learner"
            )
        shapes = tuple(tuple(tensor.shape) for tensor in tensors.values())
        return cls(tuple(tensors), shapes, tuple(map(_memory_format, tensors.values())))

    @property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        return sum(self.sizes)

    def trailing(self, names: Sequence[str]) -> int:
        """How many elements these have, which must be the last names of the layout."""
        cut = len(self.names) - len(names)
        if list(names) != list(self.names[cut:]):
            raise InputError(f"a learner's statistics {list(names)} must be the last of its layout")
        return sum(self.sizes[cut:])

    def name_at(self, place: int) -> str:
        """The name of the tensor that holds an element of the vector."""
        return self.names[int(np.searchsorted(np.cumsum(self.sizes), place, side="right"))]

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """{name: [*shape]} -> [P]."""
        return torch.cat([tensors[name].reshape(-1) for name in self.names])

    def flatten_rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """{name: [T, *shape]} -> [T, P]."""
        return torch.cat([tensors[name].reshape(len(tensors[name]), -1) for name in self.names], dim=1)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """[P] -> {name: [*shape]}, each a copy of its own: slices of one differentiable vector are far slower."""
        parts = zip(self.names, self.shapes, self.formats, vector.split(self.sizes), strict=True)
        plain = vector.device.type != "cpu"
        return {
            name: piece.reshape(shape).clone(memory_format=torch.contiguous_format if plain else own)
            for name, shape, own, piece in parts
        }

    def named_arrays(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """[P] -> {name: [*shape]} as numpy views, for a checkpoint."""
        pieces = np.split(vector, np.cumsum(self.sizes)[:-1])
        return {name: piece.reshape(shape) for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)}

    def vector(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The inverse of `named_arrays`. Raises InputError when a name is absent or has another shape."""
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in arrays or arrays[name].shape != shape:
                found = arrays[name].shape if name in arrays else "nothing"
                raise InputError(f"the weights hold {found} for {name!r}; the model needs shape {shape}")
            if arrays[name].dtype.kind != "f":
                raise InputError(f"the weights hold {arrays[name].dtype} for {name!r}; the model needs floating point")
        return np.concatenate([arrays[name].reshape(-1) for name in self.names])


def _memory_format(tensor: Tensor) -> torch.memory_format:
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if channels_last is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=channels_last):
        return torch.contiguous_format
    return channels_last
