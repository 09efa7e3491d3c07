"""Distributed meta-training: few-shot learners trained by Ray actors, the same bits on any number of workers.

Shapes are written with these letters: P parameters, T tasks, N ways, K shots, Q queries, n examples, d target values.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metadist.config import Config, load_config
    from metadist.draws import Draws
    from metadist.engine import Engine
    from metadist.errors import Diverged, InputError, Interrupted
    from metadist.fewshot import load
    from metadist.learners import MAML, Learner, Reptile
    from metadist.models import Model
    from metadist.run import evaluate, train
    from metadist.task import Examples, Task, TaskId

_HOMES = {
    "config": ("Config", "load_config"),
    "draws": ("Draws",),
    "engine": ("Engine",),
    "errors": ("Diverged", "InputError", "Interrupted"),
    "fewshot": ("load",),
    "learners": ("MAML", "Learner", "Reptile"),
    "models": ("Model",),
    "run": ("evaluate", "train"),
    "task": ("Examples", "Task", "TaskId"),
}

__all__ = [
    "MAML", "Config", "Diverged", "Draws", "Engine", "Examples", "InputError", "Interrupted", "Learner", "Model",
    "Reptile", "Task", "TaskId", "evaluate", "load", "load_config", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import on first use: `metadist --help` loads no torch, a user's own loop no Ray."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
