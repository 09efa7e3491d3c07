"""A job file to begin with."""

from typing import Any

from pydantic import BaseModel

from metadist.config.schema import Config
from metadist.config.yaml import commented

SHOWN: dict[str, Any] = {
    "seed": 0,
    "num_workers": 2,
    "meta_steps": 200,
    "meta_batch_size": 16,
    "meta_lr": 0.001,
    "data": {"family": "digits"},
    "task": {"ways": 3, "shots": 5, "queries": 10},
    "model": {"name": "auto"},
    "learner": {"name": "maml", "inner_lr": 0.1, "inner_steps": 1},
    "evaluation": {"every": 50, "tasks": 100},
}


def new_job() -> str:
    """YAML of a small run on the built-in digits, the settings people turn first, each with its meaning."""
    head = "# metadist train THIS_FILE.yaml; `metadist config schema` has every setting\n"
    sections = [key for key, value in SHOWN.items() if isinstance(value, dict)]
    keys = [*SHOWN, *(f"{section}.{key}" for section in sections for key in SHOWN[section])]
    return head + commented(SHOWN, {key: meaning(key) for key in keys})


def meaning(key: str) -> str:
    """What the schema says of a setting, by its dotted key; nothing of an option."""
    section, _, name = key.rpartition(".")
    kind = Config.model_fields[section].annotation if section else Config
    assert isinstance(kind, type) and issubclass(kind, BaseModel)
    field = kind.model_fields.get(name)
    return field.description or "" if field else ""
