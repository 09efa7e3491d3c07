"""From files and `key=value` overrides to a `Config`, with every mistake reported at once and in words."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, get_args

from pydantic import BaseModel, ValidationError

from metadist.config.schema import LEARNER_OPTIONS, Config, Open, Place
from metadist.config.yaml import dump_yaml, parse_yaml
from metadist.core.errors import InputError, did_you_mean
from metadist.core.files import read_file, reason
from metadist.core.redaction import redacted_settings, to_stderr

COMMAND_LINE = "the command line"
_DATA = ("data.path", "data.family", "data.source")
_NAMES = ("learner.name", "model.name", *_DATA)
_NO_PLAIN_TEXT = ("'", '"')
_NULL = ("", "~", "null", "Null", "NULL")


def load_config(
    files: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = to_stderr,
    unfit: Callable[[Mapping[str, Any], Collection[str]], Mapping[str, str]] | None = None,
) -> Config:
    """Files from left to right (mappings merge, lists replace), then overrides such as `learner.inner_lr=0.1`.

    One of data.path, data.family and data.source takes the place of another that an earlier file names. `unfit` finds,
    in settings not yet checked and for some of learner.name, model.name and those three, options that do not fit what
    is named: each with the name's setting. One that was given before the name is left out. `say` takes a sentence on
    each of these. Raises InputError that lists every unknown key (with the nearest known one) and every bad value, each
    with the file or override it came from.
    """
    tree, origin = _gathered(files, overrides)
    layers = [*map(str, files), COMMAND_LINE]
    _replace_data(tree, origin, layers, say)
    late = [name for name in _NAMES if _layer(origin, layers, name) > 0]
    if unfit and late:
        _leave_out(unfit(tree, late), tree, origin, layers, say)
    return _validated(tree, origin)


def given_settings(files: Sequence[str | Path], overrides: Sequence[str]) -> set[str]:
    """The dotted keys that files and overrides set."""
    return set(_gathered(files, overrides)[1])


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Job files and overrides of a command line: `key=value`, `--key=value` and `--key value` are all overrides."""
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


def _gathered(files: Sequence[str | Path], overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """All settings as one tree, and where each came from."""
    tree: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for file in files:
        _merge(tree, _read(Path(file)), origin, str(file))
    for text in overrides:
        _merge(tree, _override(text), origin, COMMAND_LINE)
    return tree, origin


def _layer(origin: Mapping[str, str], layers: Sequence[str], key: str) -> int:
    """Where a setting, or the last of what it holds, was given: the place in `layers`; -1 for nowhere."""
    found = (layers.index(source) for name, source in origin.items() if name == key or name.startswith(key + "."))
    return max(found, default=-1)


def _replace_data(
    tree: dict[str, Any], origin: dict[str, str], layers: Sequence[str], say: Callable[[str], None]
) -> None:
    """Of path, family and source keep the one that was given last."""
    given = [name for name in _DATA if _value(tree, name) is not None]
    latest = max((_layer(origin, layers, name) for name in given), default=-1)
    kept, *others = [name for name in given if _layer(origin, layers, name) == latest] or [""]
    if others or not kept:
        return
    for name in set(given) - {kept}:
        before = f"{name}={_value(tree, name)} ({origin[name]})"
        say(f"{kept}={_value(tree, kept)} ({origin[kept]}) takes the place of {before}")
        _delete(tree, name)


def _leave_out(
    unfit: Mapping[str, str],
    tree: dict[str, Any],
    origin: dict[str, str],
    layers: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """Leave out options that do not fit and were given before what they should fit."""
    found: dict[tuple[str, str], list[str]] = {}
    for option, name in unfit.items():
        given = _layer(origin, layers, option)
        if given < _layer(origin, layers, name):
            found.setdefault((name, layers[given]), []).append(f"{option}={_value(tree, option)}")
            _delete(tree, option)
    for (name, source), options in found.items():
        say(f"left out for {name}={_value(tree, name)} ({origin[name]}): {', '.join(options)} ({source})")


def _value(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _delete(tree: dict[str, Any], key: str) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree[section]
    del tree[name]


def parse_config(text: str, where: str) -> Config:
    """A configuration that metadist has written (`dump_config`), as part of a checkpoint say, which `where` names.
    Raises InputError like `load_config`."""
    tree = _mapping(text, where)
    return _validated(tree, dict.fromkeys(tree, where))


def _validated(tree: dict[str, Any], origin: dict[str, str]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(details, origin) for details in error.errors()]
        raise InputError("\n".join(problems)) from None


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back as the same configuration, but for secrets, which are taken out."""
    return dump_yaml(shown(config))


def shown(config: Config) -> dict[str, Any]:
    """The settings as plain values that may be written and sent: without the secrets in them."""
    return redacted_settings(config.model_dump(mode="json"))


def _read(file: Path) -> dict[str, Any]:
    try:
        text = read_file(file).decode()
    except FileNotFoundError:
        hint = did_you_mean(file.name, (other.name for other in file.parent.glob("*.yaml")))
        raise InputError(f"there is no job file {file}{hint or ': `metadist config new` writes one'}") from None
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not a YAML file: {reason(error)}") from None
    return _mapping(text, str(file))


def _mapping(text: str, where: str) -> dict[str, Any]:
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise InputError(f"{where} is not a YAML file that can be used: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{where} should hold `key: value` lines, but holds {type(tree).__name__}")
    return tree


def _override(text: str) -> dict[str, Any]:
    key, equals, value = text.removeprefix("--").partition("=")
    if not equals or not key:
        raise InputError(f"{text!r} is not of the form key=value, such as learner.inner_lr=0.1")
    key = key.replace("-", "_") if text.startswith("--") else key
    try:
        tree: Any = parse_yaml(value)
    except ValueError:
        tree = value
    if _takes_text(key) and not isinstance(tree, list | dict) and not value.lstrip().startswith(_NO_PLAIN_TEXT):
        tree = value.strip() if value.strip() not in _NULL else None  # as typed, whatever YAML makes of 007 or on
    for part in reversed(key.split(".")):
        tree = {part: tree}
    assert isinstance(tree, dict)  # there is a key
    return tree


def _takes_text(key: str) -> bool:
    """Whether the setting holds a text, and nothing else but null."""
    model: Any = Config
    *sections, name = key.split(".")
    for section in sections:
        field = model.model_fields.get(section)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return False
        model = field.annotation
    return name in model.model_fields and model.model_fields[name].annotation in (str, Optional[str], Optional[Place])  # noqa: UP045


_WHOLE = ("evaluation.metrics", "evaluation.figures")
"""Mappings that are given as a whole, since their order counts: whoever gives one, replaces it."""


def _merge(into: dict[str, Any], tree: dict[str, Any], origin: dict[str, str], source: str, path: str = "") -> None:
    for key, value in tree.items():
        here = f"{path}{key}"
        if here in _WHOLE and not any(origin.get(f"{here}.{name}") == source for name in into.get(key) or ()):
            into.pop(key, None)  # what another source says of it is not added to
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, origin, source, here + ".")
        elif isinstance(value, dict) and value:
            into[key] = {}
            _merge(into[key], value, origin, source, here + ".")
        else:
            into[key] = value
            origin[here] = source


def _problem(details: Any, origin: dict[str, str]) -> str:
    path = ".".join(str(part) for part in details["loc"])
    within = (s for key, s in origin.items() if key.startswith(path + ".") or path.startswith(key + "."))
    source = origin.get(path) or next(within, None)
    where = f" (in {source})" if source else ""
    if details["type"] == "extra_forbidden":
        known = [*(f"learner.{name}" for name in LEARNER_OPTIONS), *known_keys(Config)]
        return f"{path} is not a setting{where}{_nearest_or_siblings(path, known)}"
    if details["type"] == "missing":
        return f"{path} is missing: `metadist config schema` says what it takes"
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "value_error":
        return f"{message}{where}"
    quotes = ", in quotes" if details["type"] == "string_type" and isinstance(details["input"], int | float) else ""
    return f"{path}={details['input']!r}{where}: {message[0].lower()}{message[1:]}{quotes}"


def _nearest_or_siblings(key: str, known: Sequence[str]) -> str:
    section, _, name = key.rpartition(".")
    of_that_name = next((other for other in known if other.rpartition(".")[2] == name), key)
    siblings = [other for other in known if other.rpartition(".")[0] == section]
    if beside := did_you_mean(name, (other.rpartition(".")[2] for other in siblings if section)):
        return beside.replace("mean ", f"mean {section}.")
    near = did_you_mean(of_that_name, (other for other in known if not key.startswith(other + ".")))
    return near or f"; known: {', '.join(siblings or known)}"


def known_keys(model: type[BaseModel], path: str = "") -> list[str]:
    """Every dotted key of a model, sections before their contents."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(path + name)
        for kind in [field.annotation, *get_args(field.annotation)]:
            if isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not Open:
                keys += known_keys(kind, f"{path}{name}.")
    return keys
