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
from metadist.data import fields, splits, table, writer
from metadist.data.importers.digits import digits
from metadist.data.importers.sinusoid import sinusoid
from metadist.data.table import FORMAT_VERSION

FAMILIES: dict[str, Callable[..., Path]] = {"digits": digits, "sinusoid": sinusoid}


def cached(family: str, options: Mapping[str, Any] | None = None) -> Path:
    """The directory of a built-in family ("digits", "sinusoid"), built first where it is not there yet.

    It lies in $METADIST_CACHE, else ~/.cache/metadist, named by family, options (those of the importer), format version
    and the importer's code: a changed importer builds anew. Processes may race: each builds aside, one rename wins, the
    others discard theirs. Raises InputError on an unknown family or option.
    """
    if family not in FAMILIES:
        raise InputError(
            f"{family!r} is no built-in data set, take {' or '.join(FAMILIES)}{did_you_mean(family, FAMILIES)}"
        )
    build = FAMILIES[family]
    known = {name: parameter.default for name, parameter in inspect.signature(build).parameters.items()}
    for name in ("out", "overwrite", "progress"):
        known.pop(name)
    options = options or {}
    for name in options:
        if name not in known:
            raise InputError(f"{family} has no option {name!r}; it has {', '.join(known)}{did_you_mean(name, known)}")
        if isinstance(known[name], int | str) and type(options[name]) is not type(known[name]):
            raise InputError(f"{family}: {name}={options[name]!r} should be a {type(known[name]).__name__}")
    chosen = {**known, **options}
    key = hashlib.sha256(json.dumps([FORMAT_VERSION, chosen, _version(build)], sort_keys=True).encode()).hexdigest()[
        :16
    ]
    root = Path(os.environ.get("METADIST_CACHE") or Path.home() / ".cache" / "metadist")
    final = root / f"{family}-{key}"
    if final.is_dir():
        return final
    root.mkdir(parents=True, exist_ok=True)
    own = root / f".{family}-{key}.{secrets.token_hex(4)}"
    build(own, **chosen)
    try:
        os.rename(own, final)
    except OSError:
        if not final.is_dir():
            raise
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return final


def _version(build: Callable[..., Path]) -> str:
    """Stands for the code that decides what an importer writes: its own module, the draws and splits, the writer."""
    modules = (inspect.getmodule(build), splits, writer, table, fields)
    return hashlib.sha256("".join(inspect.getsource(module) for module in modules if module).encode()).hexdigest()
