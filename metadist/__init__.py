"""Distributed meta-training: few-shot learners trained by Ray actors, the same bits on any number of workers.

Shapes are written with these letters: P parameters, T tasks, N ways, K shots, Q queries, n examples, d target values.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metadist.config import Config
    from metadist.core.errors import Diverged, InputError, Interrupted
    from metadist.core.random import Draws
    from metadist.core.task import Examples, Task, TaskId
    from metadist.engine import Engine
    from metadist.learners import MAML, Learner, Reptile
    from metadist.models import Model
    from metadist.run.api import train
    from metadist.run.compare import compare
    from metadist.run.evaluate import evaluate
    from metadist.run.job_file import load_config
    from metadist.run.predictor import load, load_adapted

_HOMES = {
    "config": ("Config",),
    "core.errors": ("Diverged", "InputError", "Interrupted"),
    "core.random": ("Draws",),
    "core.task": ("Examples", "Task", "TaskId"),
    "engine": ("Engine",),
    "learners": ("MAML", "Learner", "Reptile"),
    "models": ("Model",),
    "run.api": ("train",),
    "run.compare": ("compare",),
    "run.evaluate": ("evaluate",),
    "run.job_file": ("load_config",),
    "run.predictor": ("load", "load_adapted"),
}

__all__ = [
    "MAML", "Config", "Diverged", "Draws", "Engine", "Examples", "InputError", "Interrupted", "Learner", "Model",
    "Reptile", "Task", "TaskId", "compare", "evaluate", "load", "load_adapted", "load_config", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import on first use: `metadist --help` loads no torch, a user's own loop no Ray."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
