"""Torch's optimizers, whose methods do not import torch's compiler (a second, and 80 MB) to keep it off themselves.

They are used as torch's are, and step by `plain_step`.
"""

import inspect
from typing import Any

import torch

METHODS = "add_param_group", "state_dict", "load_state_dict", "zero_grad"


def _without_compiler(kind: type[torch.optim.Optimizer]) -> Any:
    return type(kind.__name__, (kind,), {name: inspect.unwrap(getattr(kind, name)) for name in METHODS})


SGD, Adam, AdamW = map(_without_compiler, (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW))


@torch.no_grad()
def plain_step(optimizer: torch.optim.Optimizer) -> None:
    """A step without hooks and profiling, which are a third of a small one."""
    inspect.unwrap(type(optimizer).step)(optimizer)
