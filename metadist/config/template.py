"""A job file to begin with."""

from collections.abc import Iterator

from pydantic import BaseModel

from metadist.config.schema import Config

SHOWN: dict[str, dict[str, str]] = {
    "": {"seed": "0", "num_workers": "2", "meta_steps": "200", "meta_batch_size": "16", "meta_lr": "0.001"},
    "data": {"family": "digits"},
    "task": {"ways": "3", "shots": "5", "queries": "10"},
    "model": {"name": "auto"},
    "learner": {"name": "maml", "inner_lr": "0.1", "inner_steps": "1"},
    "evaluation": {"every": "50", "tasks": "100"},
}


def new_job() -> str:
    """YAML of a small run on the built-in digits, the settings people turn first, each with its meaning."""
    return "\n".join(["# metadist train THIS_FILE.yaml; `metadist config schema` has every setting", *_lines()]) + "\n"


def _lines() -> Iterator[str]:
    for section, settings in SHOWN.items():
        kind = Config.model_fields[section].annotation if section else Config
        assert isinstance(kind, type) and issubclass(kind, BaseModel)
        if section:
            yield f"{section}:"
        for key, value in settings.items():
            field = kind.model_fields.get(key)
            note = f"  # {field.description}" if field and field.description else ""
            yield f"{'  ' if section else ''}{key}: {value}{note}"
