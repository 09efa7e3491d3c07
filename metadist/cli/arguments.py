"""What people type: job files and settings in, commands to type next out."""

import shlex
from collections.abc import Sequence
from pathlib import Path


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Job files and overrides: `key=value`, `--key=value` and `--key value` are all overrides."""
    files: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("--") and "=" not in argument:
            overrides.append(f"{argument}={next(rest, '')}")
        elif "=" in argument:
            overrides.append(argument)
        else:
            files.append(argument)
    return files, overrides


def quoted(path: str | Path) -> str:
    """A path as it is typed into a shell, from the current directory where it lies in it."""
    path = Path(path)
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))
