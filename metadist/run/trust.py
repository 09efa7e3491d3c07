"""What a saved configuration names outside metadist, which nobody follows who does not trust where it came from.

A job file that its user names may name any code. A run or a checkpoint may come from anywhere: what it names is
followed only where the user typed it himself or said that he trusts it, and then only what is of the seam that it
stands for.
"""

import inspect
import os
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch

from metadist.config.schema import Config
from metadist.core.errors import InputError
from metadist.core.files import bare, is_uri
from metadist.core.redaction import is_redacted
from metadist.learners import Learner
from metadist.run.plugins import PARTS, resolve

OURS = (
    *(f"metadist.environments:{name}" for name in ("Navigation", "PointMass", "Goals", "Directions", "Velocities")),
    *(f"metadist.models.bandit:{name}" for name in ("direct_method", "inverse_propensity", "weighted_regression")),
    *(f"metadist.models.bandit:{name}" for name in ("greedy_snips", "greedy_doubly_robust", "greedy_reward")),
)
"""Parts that are named as a user's own are, and call nothing else (as an environment of gymnasium may)."""
_HERE = (None, "", "auto", "local")  # no addresses, but the cluster of this machine


def outside_code(config: Config) -> dict[str, str]:
    """Setting -> `module:attribute`, for all that computing tasks and judging them imports and metadist does not have
    itself."""
    own = config.evaluation
    judging = {f"evaluation.metrics.{name}": code for name, code in own.metrics.items()}
    judging |= {f"evaluation.figures.{name}": code for name, code in own.figures.items()}
    judging |= {f"evaluation.baselines.{name.partition(':')[2]}": name for name in own.baselines or [] if ":" in name}
    return computing_code(config) | {key: code for key, code in judging.items() if code not in OURS}


def computing_code(config: Config) -> dict[str, str]:
    """Of these what computing tasks imports."""
    parts = {f"learner.{option}": config.learner.options.get(option) for option in PARTS}
    named = {
        "model.name": config.model.name,
        "learner.name": config.learner.name,
        **{key: part.get("name") if isinstance(part, Mapping) else part for key, part in parts.items()},
        "loss": config.loss,
        "data.source": config.data.source,
    }
    return {key: name for key, name in named.items() if isinstance(name, str) and ":" in name and name not in OURS}


def outside_address(config: Config) -> dict[str, str]:
    """The Ray cluster that it would connect to, if it names one."""
    address = config.fleet.address
    if config.fleet.backend == "local" or address is None or address in _HERE:
        return {}
    return {"fleet.address": address}


def outside_place(config: Config, run: Path) -> dict[str, str]:
    """The place of its checkpoints, where that is not in the run's own directory."""
    place = config.checkpoint.location
    if place is None or ("://" not in place and Path(place).resolve().is_relative_to(run.resolve())):
        return {}
    return {"checkpoint.location": place}


def outside_data(config: Config, run: str | Path) -> dict[str, str]:
    """The URIs of data and initial weights that it would be asked for, where these are not in the storage of the run
    itself, which the user has named."""
    own = _storage(str(run)) if is_uri(run) else None
    places = {"data.path": config.data.path, "model.weights": config.model.weights}
    return {key: place for key, place in places.items() if place and is_uri(place) and _storage(place) != own}


def _storage(uri: str) -> tuple[str, str]:
    """The bucket, and how it is reached."""
    return "/".join(bare(uri).split("/", 3)[:3]), uri.partition("?")[2]


def trust_flag(config: Config) -> str:
    """What a printed command that reads the run of this configuration again must end with."""
    run = config.run_dir or ""
    named = (
        outside_code(config) | outside_address(config) | outside_place(config, Path(run)) | outside_data(config, run)
    )
    return " --trust-code" if named else ""


def check_trusted(saved: str | Path, found: Mapping[str, str], trust_code: bool, own: Collection[str] = ()) -> None:
    """Raises InputError where the saved run at `saved` would have something followed that is neither the user's own
    (he typed those settings) nor trusted, or that is trusted and no part of the seam it stands for."""
    foreign = {key: name for key, name in found.items() if not _typed(key, own)}
    if not trust_code and foreign:
        modules = sorted({name.partition(":")[0] for key, name in foreign.items() if _seam(key)})
        named = [f"the code of {', '.join(modules)}"] * bool(modules)
        named += ["an address"] * ("fleet.address" in foreign) + ["a place elsewhere"] * (
            not foreign.keys().isdisjoint(("checkpoint.location", "data.path", "model.weights"))
        )
        settings = ", ".join(f"{key}={name}" for key, name in foreign.items())
        raise InputError(
            f"{saved} is a saved run that names {' and '.join(named)} ({settings}), which is not followed: if you "
            "trust it, add --trust-code (in Python trust_code=True), or give these settings yourself"
        )
    for key, name in foreign.items():
        if (seam := _seam(key)) and not seam.fits(resolve(name), name.partition(":")[0]):
            raise InputError(f"{key}={name} in {saved} is not called: a saved run may name {seam.what}")


def unloadable(config: Config) -> list[str]:
    """What of a job's own code could not be used by `load` and `evaluate` later, even with trust; said beforehand."""
    return [
        f"{key}={name} trains, but the run cannot be loaded again with it: it must be {seam.what}"
        for key, name in outside_code(config).items()
        if (seam := _seam(key)) and not seam.fits(resolve(name), name.partition(":")[0])
    ]


def check_usable(*places: str | None) -> None:
    """Raises InputError where one of these addresses was saved without the password or key that it had."""
    for place in places:
        if place and is_redacted(place):
            raise InputError(
                f"{place} was saved without its secret: give that setting again, or better give the secret in the "
                "environment (MLFLOW_TRACKING_URI, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and an address without it"
            )


def is_tracked(config: Config, trust_code: bool, own: Collection[str]) -> bool:
    """Whether the tracking server that a saved run names is used: where the user gave its address himself, as a setting
    or in the environment, or trusts it."""
    uri = config.tracking.uri
    return uri is None or trust_code or _typed("tracking.uri", own) or uri == os.environ.get("MLFLOW_TRACKING_URI")


def _typed(key: str, own: Collection[str]) -> bool:
    return any(given == key or given == f"{key}.name" or key.startswith(f"{given}.") for given in own)


def _is_model(found: Any, module: str) -> bool:
    """A class of modules, or a function of its own module that is annotated to give one."""
    if not isinstance(found, type):
        found = _returned(found) if _is_own_function(found, module) else None
    return isinstance(found, type) and issubclass(found, torch.nn.Module)


def _returned(function: Callable[..., Any]) -> Any:
    """What it is annotated to return; None where that names something that is not there at run time."""
    try:
        return get_type_hints(function).get("return")
    except (NameError, AttributeError, TypeError):
        return None


def _is_learner(found: Any, module: str) -> bool:
    del module
    return isinstance(found, type) and issubclass(found, Learner)


def _is_part(option: str, found: Any, module: str) -> bool:
    del module
    return isinstance(found, type) and all(inspect.isroutine(getattr(found, name, None)) for name in PARTS[option][1])


def _is_source(found: Any, module: str) -> bool:
    del module
    return isinstance(found, type) and any("__call__" in vars(kind) for kind in found.__mro__)


def _is_own_function(found: Any, module: str) -> bool:
    own = inspect.isfunction(found) and found.__module__.partition(".")[0] == module.partition(".")[0]
    return own and module.partition(".")[0] not in sys.stdlib_module_names


class _Seam(NamedTuple):
    """What a saved run may name in a setting: whether an object of a module is such, and what that is in words."""

    fits: Callable[[Any, str], bool]
    what: str


_FUNCTION = _Seam(_is_own_function, "a Python function of the named module")
_SEAMS = {
    "model.name": _Seam(_is_model, "a torch.nn.Module class, or a function annotated to return one"),
    "learner.name": _Seam(_is_learner, "a metadist.Learner class"),
    **{
        f"learner.{option}": _Seam(partial(_is_part, option), f"a class with methods {methods[0]} and {methods[1]}")
        for option, (_, methods, _) in PARTS.items()
    },
    "loss": _FUNCTION,
    "data.source": _Seam(_is_source, "a class with a method __call__"),
}


def _seam(key: str) -> _Seam | None:
    """The seam of a setting that names code; those of evaluation (`evaluation.metrics.NAME`) take functions."""
    return _FUNCTION if key.startswith("evaluation.") else _SEAMS.get(key)
