"""The model, loss and learner that a job names, built-in or the user's own `module:attribute`, with options checked."""

import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_type_hints

import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch.nn.parameter import is_lazy

from metadist.config.schema import LearnerConfig, ModelConfig
from metadist.core.errors import InputError, did_you_mean
from metadist.core.files import finite, reason
from metadist.core.redaction import is_redacted
from metadist.data import importers
from metadist.data.shapes import Shapes
from metadist.learners import INNER_OPTIMIZERS, LEARNERS, Learner
from metadist.models import MODELS, Model
from metadist.models.losses import LOSSES, Loss
from metadist.run.initial_weights import load_weights


def find_modules_here() -> None:
    """Have modules of the current directory be found, as `python -m` does and an installed command does not."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def resolve(name: str, known: Iterable[str] = (), setting: str = "") -> Any:
    """The object that `module:attribute` names, modules of the current directory included. Raises InputError, which
    names the `setting`, and lists the built-in names, where the name is of no such form."""
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or module_name.startswith("."):
        known = list(known)
        hint = did_you_mean(name.lower(), known) or (f"; known: {', '.join(known)}" if known else "")
        what = f"{setting}={name}" if setting else repr(name)
        raise InputError(f"{what} is neither built in nor of the form module:attribute{hint}")
    find_modules_here()
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


def model_name(settings: ModelConfig, shapes: Shapes) -> str:
    """The name of the model: `auto` goes by the inputs."""
    if settings.name != "auto":
        return settings.name
    inputs = shapes.model_inputs
    image = len(inputs) == 1 and len(inputs[0]) == 3 and min(inputs[0][1:]) >= 8
    return "bag" if shapes.tokens else "conv4" if image else "mlp"


def make_model(settings: ModelConfig, seed: int, shapes: Shapes) -> Model:
    """The model with initial weights drawn from the run's seed (or read from `model.weights`)."""
    name, options = model_name(settings, shapes), settings.options
    torch.manual_seed(seed)
    if name in MODELS:
        known = {"input_shapes": shapes.model_inputs, "outputs": shapes.outputs}
        if name in ("bag", "encoder") and shapes.vocabulary_size:
            known["vocabulary_size"] = shapes.vocabulary_size
        if name == "mlp" and shapes.vocabularies:
            known["vocabularies"] = shapes.vocabularies
        module = call(f"model {name}", MODELS[name], {**known, **options}, hidden=tuple(known))
    else:
        found = resolve(name, MODELS, "model.name")
        if isinstance(found, type) and not issubclass(found, torch.nn.Module):
            raise InputError(f"model.name={name} is no torch.nn.Module class, nor a function that returns one")
        module = call(name, found, options)
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"model.name={name} gave a {type(module).__name__}; it must give a torch.nn.Module")
    _materialise(module, shapes)
    note = load_weights(module, settings) if settings.weights else ""
    return Model(module, note)


def _materialise(module: torch.nn.Module, shapes: Shapes) -> None:
    """Give lazy layers their weights, drawn from the run's seed, by one call on examples of zeros."""
    if any(map(is_lazy, [*module.parameters(), *module.buffers()])):
        known = () if shapes.observations else shapes.dtypes
        dtypes = known or ["float32"] * len(shapes.model_inputs)
        examples = [torch.from_numpy(np.zeros((2, *s), d)) for s, d in zip(shapes.model_inputs, dtypes, strict=True)]
        with torch.no_grad():
            module(*examples)


def make_loss(name: str, classification: bool) -> Loss:
    """The loss of that name; `auto` is cross-entropy for whole-number targets, else the mean squared error."""
    suited = "cross_entropy" if classification else "mse"
    if name not in ("auto", *LOSSES):
        return cast(Loss, resolve(name, LOSSES, "loss"))
    if name not in ("auto", suited):
        kind = "classes" if classification else "values"
        raise InputError(f"loss={name} does not suit tasks whose targets are {kind}: take {suited}, or auto")
    return LOSSES[suited]


def make_learner(settings: LearnerConfig, model: Model, loss: Loss, changes: Mapping[str, Any]) -> Learner:
    """The learner with its options; `changes` are options that evaluation replaces. Raises InputError."""
    name = settings.name
    kind, preset = _learner(name)
    for option, value in settings.options.items():
        if isinstance(preset.get(option), bool) and value != preset[option]:
            raise InputError(f"learner {name} is the one with {option}={preset[option]}: leave it out, or name another")
    if not (isinstance(kind, type) and issubclass(kind, Learner)):
        raise InputError(f"learner.name={name} is not a metadist.Learner class")
    refused = [f"learner.{option}" for option in kind.refused if option in settings.options]
    refused += [f"evaluation.{option}" for option in kind.refused if option in changes]
    if refused:
        why = kind.refused[refused[0].partition(".")[2]]
        remedy = " ".join(f"{key}=null" for key in refused)
        raise InputError(
            f"learner {name} takes no {', '.join(refused)}, {why}: leave out, or, where a job has it, {remedy}"
        )
    options = {"model": model, "loss": loss, **preset, **settings.options}
    options |= {name: make_part(name, options[name]) for name in PARTS if name in options}
    hidden = ("model", "loss", *PARTS, *kind.refused)
    learner = cast(Learner, call(f"learner {name}", kind, options, hidden))
    try:
        return replace(learner, **changes)
    except ValueError as error:
        raise InputError(f"evaluation: learner {name}: {error}") from None


def _learner(name: str) -> tuple[Any, Mapping[str, Any]]:
    """The class of that name, and the options that the name sets."""
    kind, preset, _ = LEARNERS[name] if name in LEARNERS else (resolve(name, LEARNERS, "learner.name"), {}, "")
    return kind, preset


def unfit_options(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    """The options, in settings not yet checked, that the learner, model or data of `names` (learner.name, data.path,
    ...) does not take: each with the setting that names what it is for. Of one that cannot be found none: it is refused
    where it is made."""
    unfit: dict[str, str] = {}
    finders = {"learner": _unfit_for_learner, "model": _unfit_for_model, "data": _unfit_for_data}
    for section in sorted({name.partition(".")[0] for name in names}):
        with suppress(InputError):
            unfit |= finders[section](settings)
    return unfit


def _unfit_for_learner(settings: Mapping[str, Any]) -> dict[str, str]:
    options = _options(settings, "learner")
    kind, preset = _learner(str(options.pop("name", "maml")))
    if not (isinstance(kind, type) and issubclass(kind, Learner)):
        return {}
    unfit = [f"learner.{name}" for name in options if name in kind.refused or not _takes(kind, name)]
    unfit += [f"learner.{n}" for n, v in options.items() if isinstance(preset.get(n), bool) and v != preset[n]]
    refused = {*kind.refused, *(["inner_lr"] if kind.learned_rates else [])}
    inner = {"inner_lr", "inner_steps"} & _options(settings, "evaluation").keys()
    return dict.fromkeys([*unfit, *(f"evaluation.{name}" for name in sorted(inner & refused))], "learner.name")


def _unfit_for_model(settings: Mapping[str, Any]) -> dict[str, str]:
    options = _options(settings, "model")
    for own in ("weights", "weight_names"):
        options.pop(own, None)
    name = str(options.pop("name", "auto"))
    if name == "auto":
        return {}
    kind = MODELS[name] if name in MODELS else resolve(name, MODELS)
    return dict.fromkeys([f"model.{option}" for option in options if not _takes(kind, option)], "model.name")


def _unfit_for_data(settings: Mapping[str, Any]) -> dict[str, str]:
    data = _options(settings, "data")
    options = data.get("options", {})
    if not isinstance(options, Mapping):
        return {}
    if "path" in data:
        return dict.fromkeys([f"data.options.{option}" for option in options], "data.path")
    name, known = "data.family", getattr(importers, str(data.get("family")), None)
    if "source" in data:
        name, known = "data.source", resolve(str(data["source"]))
    return {f"data.options.{option}": name for option in options if known and not _takes(known, option)}


def _options(settings: Mapping[str, Any], section: str) -> dict[str, Any]:
    given = settings.get(section)
    return {key: value for key, value in given.items() if value is not None} if isinstance(given, Mapping) else {}


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function, or a class that is called, has a parameter of that name, or takes any."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return True
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def make_part(option: str, setting: Any) -> Any:
    """What an option of `PARTS` names: a built-in name or `module:callable`, or a mapping of `name` and options, of
    which none can be called `name`.

    Raises InputError.
    """
    known, methods, rule = PARTS[option]
    what = option.replace("_", " ")
    options = {"name": setting} if isinstance(setting, str) else dict(setting) if isinstance(setting, Mapping) else {}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise InputError(f"learner.{option}={setting!r} must be a name, or a mapping with one")
    if name in known:
        return call(f"{what} {name}", known[name], options)
    rule = f"it must be a class with methods {rule}, see metadist/README.md"
    try:
        made = call(f"{what} {name}", resolve(name, known), options)
    except InputError as error:
        raise InputError(f"{error}; {rule}" if ":" in name else str(error)) from None
    if not all(callable(getattr(made, method, None)) for method in methods):
        raise InputError(f"{what} {name} gave a {type(made).__name__}: {rule}")
    return made


PARTS: dict[str, tuple[Mapping[str, Callable[..., Any]], tuple[str, str], str]] = {
    "inner_optimizer": (
        INNER_OPTIMIZERS, ("begin", "step"), "begin(weight) and step(weight, gradient, slots, rate, k)"
    ),
    "environment": (
        {}, ("reset", "step"), "reset(parameters, key, trajectories) and step(parameters, state, actions)"
    ),
}  # fmt: skip
"""Options of learners that name an object: the built-in ones, the methods it must have, and these in words."""
