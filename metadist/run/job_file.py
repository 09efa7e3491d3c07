"""A job from its files and from what was typed behind them, where the learner, model or data typed is another one."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from metadist.config import Config, split_arguments
from metadist.config import load_config as load_settings
from metadist.core.redaction import to_stderr

__all__ = ["load_config", "split_arguments"]


def load_config(
    files: Sequence[str | Path] | str | Path = (), overrides: Sequence[str] = (), say: Callable[[str], None] = to_stderr
) -> Config:
    """A job: files from left to right, then overrides.

    What a later one says takes the place of what an earlier one says: data.path that of data.family, and with another
    learner, model or data the earlier options that it does not take are left out.

    Args:
        files: YAML files, or one; mappings merge, lists replace.
        overrides: `key=value`, such as `learner.inner_lr=0.1`.
        say: takes a sentence on whatever is replaced or left out; by default it is printed to stderr.

    Raises InputError that lists every unknown key (with the nearest known one) and every bad value, each with the file
    or override it came from.

    Example:
        >>> load_config(["jobs/digits.yaml"], ["meta_lr=0.01"]).meta_lr
        0.01
    """
    return load_settings([files] if isinstance(files, str | Path) else files, overrides, say, _unfit)


def _unfit(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    from metadist.run.plugins import unfit_options  # with torch, which most jobs do not need to be read

    return unfit_options(settings, names)
