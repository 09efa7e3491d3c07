"""Initial weights from a safetensors file, of a run of one's own or of others, whose names may differ."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from metadist.config.schema import ModelConfig
from metadist.core.errors import InputError, did_you_mean
from metadist.core.files import is_uri
from metadist.data.remote import fetched_weights

FEW = 3
Names = Mapping[str, str | None]


def load_weights(module: nn.Module, settings: ModelConfig) -> str:
    """Copy the weights of the file `model.weights` into a module's parameters and buffers of the same names, or of
    those that `model.weight_names` gives them.

    Returns:
        A sentence with counts, where names of the file are not used or the module's not filled; else "".

    Raises:
        InputError: where the file cannot be read, a shape or type differs, a rename does not fit file or model, two
            names become one, nothing is filled, or of an encoder's frozen base only a part.
    """
    what = f"model.weights={settings.weights}"
    tensors = _read(what, settings.weights or "")
    own = module.state_dict(keep_vars=True)
    places = dict(module.named_buffers()) | own
    chosen = renamed(list(tensors), settings.weight_names, list(places))
    used = {theirs: ours for theirs, ours in chosen.items() if ours in places}
    if not used:
        known = f"it has {_few(list(tensors))} and the model {_few(list(own))}"
        raise InputError(f"{what} does not fit the model, none of its names is the model's: {known}; map names by "
                         "model.weight_names={theirs: ours}")  # fmt: skip
    for theirs, ours in used.items():
        _copy(what, theirs, tensors[theirs], ours, places[ours])
    filled = {id(places[ours]) for ours in used.values()}
    absent = [name for name, tensor in own.items() if id(tensor) not in filled]
    base = [name for name in absent if settings.name == "encoder" and not own[name].requires_grad]
    if base:
        raise InputError(f"{what} fills only a part of the frozen base, where {_few(base)} would stay random: take a "
                         "file that has them, or map names by model.weight_names={theirs: ours}")  # fmt: skip
    return _sentence(what, len(used), [theirs for theirs in tensors if theirs not in used], absent)


def renamed(theirs: Sequence[str], names: Names, ours: Sequence[str]) -> dict[str, str | None]:
    """Each name of a file -> what it is called here, None where it is left out. `names`: the file's name, or a pattern
    with `*` -> ours, in which each `*` stands for what it stood for there; the first that matches counts.

    Example:
        >>> renamed(["block.0.w", "block.1.w", "b"], {"block.*.w": "layers.*.weight", "b": None}, ["layers.0.weight"])
        {'block.0.w': 'layers.0.weight', 'block.1.w': 'layers.1.weight', 'b': None}
    """
    patterns = {pattern: re.compile("(.*)".join(map(re.escape, pattern.split("*")))) for pattern in names}
    for pattern, compiled in patterns.items():
        target = names[pattern]
        if not any(map(compiled.fullmatch, theirs)):
            hint = did_you_mean(pattern, theirs) or f"; it has {_few(theirs)}"
            raise InputError(f"model.weight_names: no name in the file is {pattern!r}{hint}")
        if target is not None and "*" not in target and target not in ours:
            hint = did_you_mean(target, ours) or f"; it has {_few(ours)}"
            raise InputError(f"model.weight_names: the model has no {target!r}{hint}")
    found: dict[str, str | None] = {}
    for name in theirs:
        matches = ((pattern, compiled.fullmatch(name)) for pattern, compiled in patterns.items())
        pattern, match = next((pair for pair in matches if pair[1]), ("", None))
        target = names[pattern] if match else name
        found[name] = _filled(pattern, target, match.groups()) if match and target is not None else target
    given = Counter(target for target in found.values() if target in ours)
    for target, count in given.items():
        if count > 1:
            both = [name for name in theirs if found[name] == target]
            raise InputError(f"model.weight_names: {_few(both)} of the file all become {target!r}: leave all but one "
                             "out, by null")  # fmt: skip
    return found


def _filled(pattern: str, target: str, groups: Sequence[str]) -> str:
    first, *rest = target.split("*")
    if len(rest) > len(groups):
        raise InputError(f"model.weight_names: {target!r} has more * than {pattern!r}, which it stands for")
    return first + "".join(group + part for group, part in zip(groups, rest, strict=False))


def _read(what: str, path: str) -> dict[str, Tensor]:
    file = fetched_weights(path) if is_uri(path) else Path(path)
    if not file.is_file():
        raise InputError(f"{what} is not a safetensors file that can be read (no regular file)")
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{what} is not a safetensors file that can be read ({error})") from None


def _copy(what: str, theirs: str, value: Tensor, ours: str, place: Tensor) -> None:
    if value.shape != place.shape or value.is_floating_point() != place.is_floating_point():
        kinds = [f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in (value, place)]
        raise InputError(
            f"{what} does not fit the model: {theirs!r} is {kinds[0]} there and {ours!r} {kinds[1]} in the model; "
            f"change the model's options, or leave it out by model.weight_names={{{theirs}: null}}"
        )
    with torch.no_grad():
        place.copy_(value)


def _sentence(what: str, filled: int, unused: Sequence[str], absent: Sequence[str]) -> str:
    if not unused and not absent:
        return ""
    parts = [f"{what} fills {filled} of the model's names"]
    if absent:
        parts.append(f"{len(absent)} keep their own initial values ({_few(absent)})")
    if unused:
        parts.append(f"{len(unused)} names of the file are not used ({_few(unused)})")
    return ", ".join(parts)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")
