"""Calling what a job names with what a job says, each checked before."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from metadist.core.errors import InputError, did_you_mean
from metadist.core.files import finite, reason
from metadist.core.redaction import is_redacted


def resolve(name: str, known: Iterable[str] = ()) -> Any:
    """The object that `module:attribute` names, modules of the current directory included. Raises InputError, which
    lists the built-in names where the name is of no such form."""
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or module_name.startswith("."):
        hint = did_you_mean(name.lower(), known) or f"; known: {', '.join(known)}"
        raise InputError(f"{name!r} is neither built in nor of the form module:attribute{hint}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        where = f"modules are looked for in {Path.cwd()} and the environment"
        raise InputError(f"{name}: {error}; {where}: run from the module's folder, or set PYTHONPATH to it") from None
    except AttributeError:
        raise InputError(f"{name}: module {module_name} has no {attribute!r}") from None
    except Exception as error:  # whatever a user's module does at import
        raise InputError(f"{name}: importing it ends in {type(error).__name__}: {reason(error)}") from error


def call(what: str, function: Callable[..., Any], options: Mapping[str, Any], hidden: tuple[str, ...] = ()) -> Any:
    """function(**options), each option checked against its annotation; mistakes are InputErrors in one sentence."""
    if not callable(function):
        raise InputError(f"{what} is a {type(function).__name__}, which cannot be called")
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        raise InputError(f"{what} does not say what options it has: wrap it in a function of your own") from None
    known = [name for name in parameters if name not in hidden]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = get_type_hints(function.__init__ if isinstance(function, type) else function)
    checked = {}
    for name, value in options.items():
        if isinstance(value, str) and is_redacted(value):
            raise InputError(f"{what}: {name} was saved without its secret: give that setting again")
        if name not in parameters and not open_ended:
            hint = did_you_mean(name, known) or f"; it has {', '.join(known) or 'none'}"
            raise InputError(f"{what} has no option {name!r}{hint}")
        checked[name] = value if name in hidden else _convert(what, name, value, hints.get(name))
    named = [(n, p) for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    missing = [n for n, p in named if p.default is p.empty and n not in checked]
    if missing:
        raise InputError(f"{what} needs the option {missing[0]!r}")
    try:
        return function(**checked)
    except InputError:
        raise
    except (ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise InputError(f"{what}: {reason(error)}") from error


def _convert(what: str, name: str, value: Any, hint: Any) -> Any:
    if finite(value) != value:
        raise InputError(f"{what}: {name}={value!r}: input should be a finite number")
    if hint is None:
        return value
    try:
        converted = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise InputError(f"{what}: {name}={value!r}: {message[0].lower()}{message[1:]}") from None
    if isinstance(value, bool) and not isinstance(converted, bool):
        raise InputError(f"{what}: {name}={value!r}: input should be a number, not true or false")
    return converted
