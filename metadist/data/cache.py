"""Built-in families, built once per machine."""

import hashlib
import inspect
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from metadist.core.errors import InputError, did_you_mean
from metadist.core.files import cache_root
from metadist.data import glyphs, importers, splits, table, writer
from metadist.data.progress import RowProgress
from metadist.data.table import FORMAT_VERSION


def cached(family: str, options: Mapping[str, Any] | None = None, quiet: bool = False) -> Path:
    """The directory of a built-in family ("digits", "letters", "sinusoid"), built first where it is not there yet.

    It lies in $METADIST_CACHE, else ~/.cache/metadist, named by family, options (those of the importer), format
    version, the importer's code and what it reads of other packages: a changed importer, or other fonts, build anew.
    Processes may race: each builds aside, one rename wins, the others discard theirs. Progress goes to stderr where it
    takes more than a second, unless `quiet`. Raises InputError on an unknown family or option.
    """
    options = options or {}
    defaults = {name: _defaults(getattr(importers, name)) for name in importers.__all__}
    families = [name for name, known in defaults.items() if "source" not in known]
    if family not in families:
        hint = did_you_mean(family, families)
        raise InputError(f"{family!r} is no built-in data set, take {' or '.join(families)}{hint}")
    build, known = getattr(importers, family), defaults[family]
    for name in options:
        if name not in known:
            raise InputError(f"{family} has no option {name!r}; it has {', '.join(known)}{did_you_mean(name, known)}")
        if isinstance(known[name], int | str) and type(options[name]) is not type(known[name]):
            raise InputError(f"{family}: {name}={options[name]!r} should be a {type(known[name]).__name__}")
    chosen = {**known, **options}
    content = json.dumps([FORMAT_VERSION, chosen, _version(build)], sort_keys=True)
    place = f"{family}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    root = cache_root()
    final, aside = root / place, root / f".{place}.{secrets.token_hex(4)}"
    if final.is_dir():
        return final
    root.mkdir(parents=True, exist_ok=True)
    progress = None if quiet else RowProgress(f"making the built-in data {family}, once", after_s=1)
    build(aside, **chosen, progress=progress)
    try:
        os.rename(aside, final)
    except OSError:
        if not final.is_dir():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def _defaults(build: Callable[..., Path]) -> dict[str, Any]:
    parameters = inspect.signature(build).parameters
    return {name: p.default for name, p in parameters.items() if name not in ("out", "overwrite", "progress")}


def _version(build: Callable[..., Path]) -> str:
    """Stands for what decides what an importer writes: the code (its own module, drawing, draws and splits, the writer)
    and the files of other packages that it reads, its module's `carried_files()`."""
    own = inspect.getmodule(build)
    content = hashlib.sha256()
    for module in (own, glyphs, splits, writer, table):
        content.update(inspect.getsource(module).encode() if module else b"")
    for file in getattr(own, "carried_files", list)():
        content.update(file.read_bytes())
    return content.hexdigest()
