"""Where a run goes on from: its checkpoint, and whether that holds all that going on to the bit needs."""

import math
import reprlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from metadist.checkpoint.format import Checkpoint
from metadist.config import Config
from metadist.config.load import parse_config
from metadist.core.errors import InputError
from metadist.core.task import Split
from metadist.fleet.server import Optimization, make_optimizer
from metadist.run.build import Job
from metadist.run.identity import check_measure, check_settings, drift, run_identity
from metadist.run.preflight import preflight
from metadist.run.prepare import Prepared
from metadist.run.saved import find_checkpoint, is_own


@dataclass(frozen=True)
class Start:
    """Where a run begins, all of it tried.

    checkpoint: None at its first step. identity: what its bits depend on; changes: how that differs from the identity
    at the checkpoint; drifted: whether the bits may differ from those of an uninterrupted run.
    """

    prepared: Prepared
    identity: dict[str, Any]
    checkpoint: Checkpoint | None = None
    changes: Sequence[str] = ()
    drifted: bool = False

    @property
    def step(self) -> int:
        """The first meta-step."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def proofs(self) -> tuple[str | None, str | None]:
        """Of workers and servers, which must compute the same bits as those before."""
        saved = self.checkpoint.run if self.checkpoint and not self.changes else {}
        return saved.get("proof"), saved.get("server_proof")


def find_resumable(config: Config, resume: str | Path | None, trust_code: bool = False) -> Checkpoint | None:
    """The checkpoint that a run goes on from, if any, which holds all that this needs. Raises InputError."""
    checkpoint = find_checkpoint(config, resume, trust_code)
    if checkpoint is not None:
        check_resumable(checkpoint)
        if checkpoint.step > config.meta_steps:
            raise InputError(
                f"{checkpoint.step} meta-steps are done, and meta_steps={config.meta_steps}: set meta_steps="
                f"{checkpoint.step} to evaluate the run again, or more to go on"
            )
        check_settings(checkpoint.run["identity"], config)
    return checkpoint


def open_job(config: Config, quiet: bool = True) -> Job:
    """The job with its parts, so that what is wrong with one is told before Ray is started. Raises InputError."""
    job = Job(config, quiet=quiet)
    job.make_parts()
    return job


def prepare_start(
    job: Job, checkpoint: Checkpoint | None, quiet: bool = True, begin: Callable[[Prepared], None] | None = None
) -> Start:
    """Try everything of a run that could fail later. What takes long of it is said, unless `quiet`. `begin`: see
    `preflight`.

    Raises InputError.
    """
    config = job.config
    say = None if quiet else partial(print, file=sys.stderr)
    prepared = preflight(job, evaluated_splits(config), checkpoint, gradient=checkpoint is None, say=say, begin=begin)
    if checkpoint is not None and is_own(checkpoint, config.run_dir or ""):
        check_measure(checkpoint.trainer["progress"], job)
    identity = run_identity(job, prepared.engine)
    drifted = bool(config.fleet.mixed_devices or config.optimizer.max_staleness)
    if checkpoint is None:
        return Start(prepared, identity, drifted=drifted)
    changes = drift(checkpoint.run["identity"], identity)
    check_state(checkpoint, prepared.theta, job.optimization(prepared.engine))
    return Start(prepared, identity, checkpoint, changes, drifted or bool(changes or checkpoint.run.get("drifted")))


def evaluated_splits(config: Config) -> list[Split]:
    """The splits that a run is evaluated on, in its course and at its end."""
    validated: list[Split] = ["validation"] if config.evaluation.every else []
    return [*validated, config.evaluation.split]


def first_target(config: Config, checkpoint: Checkpoint | None) -> int:
    """The number of workers to begin with: the job's; where that is as before, as many as there were."""
    if checkpoint is None:
        return config.num_workers
    before = parse_config(checkpoint.config, "the checkpoint's configuration")
    return checkpoint.trainer["target"] if before.num_workers == config.num_workers else config.num_workers


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Identity(_Strict):
    settings: dict[str, Any]
    data_digest: str | None


class _Run(_Strict):
    identity: _Identity
    run_dir: str
    mlflow_run_id: str | None


class _Server(_Strict):
    model_config = ConfigDict(strict=True, extra="forbid")

    step: int
    optimizer: dict[str, Any]


class _Progress(_Strict):
    model_config = ConfigDict(strict=True, extra="forbid")

    measure: dict[str, str] | None = None
    best: float | None = Field(None, allow_inf_nan=False)
    since_best: int = Field(0, ge=0)
    round_losses: dict[int, float] = {}
    validated: int = Field(0, ge=0)


class _Trainer(_Strict):
    server: _Server
    progress: _Progress
    target: int = Field(ge=1, le=100_000)


class _Checkpoint(_Strict):
    run: _Run
    trainer: _Trainer


def check_resumable(checkpoint: Checkpoint) -> None:
    """Raises InputError where something a run needs to go on is absent or of another kind."""
    try:
        found = _Checkpoint.model_validate({"run": checkpoint.run, "trainer": checkpoint.trainer})
    except ValidationError as error:
        first = error.errors()[0]
        where, message = ".".join(map(str, first["loc"])), first["msg"]
        raise _refusal(f"{where}: {message[0].lower()}{message[1:]}") from None
    if found.trainer.server.step != checkpoint.step:
        raise _refusal(f"its server is at step {found.trainer.server.step} and the checkpoint at {checkpoint.step}")
    if found.trainer.progress.validated > checkpoint.step:
        raise _refusal(f"it was validated at step {found.trainer.progress.validated}, after its own {checkpoint.step}")


def check_state(checkpoint: Checkpoint, theta: np.ndarray, optimization: Optimization) -> None:
    """Raises InputError where the state of the server is another than training would have left for theta [P] and this
    optimization: compared with that of a new optimizer, whatever else is in it would go on in silence."""
    if not np.isfinite(theta).all():
        raise _refusal("its theta is not finite: the run had diverged")
    optimizer, fresh = checkpoint.trainer["server"]["optimizer"], _fresh_state(theta, optimization)
    if checkpoint.step == 0:
        fresh["state"] = {}
    if set(optimizer) != set(fresh) or not _is_one_group(optimizer["param_groups"]):
        raise _refusal("its optimizer is not that of one vector")
    lag = checkpoint.trainer.get("behind")
    tensors = {} if lag is None else {"the weights one step before": (lag, torch.from_numpy(theta))}
    kept, expected = (_entries(each) for each in (optimizer["state"], fresh["state"]))
    for name in sorted(expected.keys() ^ kept.keys()):
        raise _refusal(f"its optimizer {'lacks' if name in expected else 'has a strange'} {name}")
    for name, value in kept.items():
        if expected[name] is None and value is None:
            continue
        tensors[f"its optimizer's {name}"] = value, expected[name]
    for what, pair in tensors.items():
        _check_like(what, *pair)
    _check_apart([value for value, _ in tensors.values()])
    _check_values(kept, checkpoint.step)
    _check_group(optimizer["param_groups"][0], fresh["param_groups"][0], checkpoint, optimization)


def _fresh_state(theta: np.ndarray, optimization: Optimization) -> dict[str, Any]:
    """Of a new optimizer that has stepped once."""
    descended = torch.zeros_like(torch.from_numpy(theta)[: len(theta) - optimization.statistics])
    optimizer = make_optimizer(descended, optimization)
    descended.grad = torch.zeros_like(descended)
    optimizer.step()
    return optimizer.state_dict()


def _is_one_group(groups: Any) -> bool:
    return (
        isinstance(groups, list) and len(groups) == 1 and isinstance(groups[0], dict) and groups[0].get("params") == [0]
    )


def _entries(state: Any) -> dict[str, Any]:
    """What an optimizer keeps of its only vector."""
    kept = state.get(0, {}) if isinstance(state, dict) and set(state) <= {0} else None
    if not isinstance(kept, dict):
        raise _refusal("its optimizer is not that of one vector")
    return kept


def _check_like(what: str, value: Any, expected: torch.Tensor | None) -> None:
    """A plain tensor in memory of its own, of the expected kind, and finite."""
    if type(value) is not torch.Tensor or expected is None or value.layout != expected.layout:
        raise _refusal(f"{what} is no plain tensor")
    for fact in ("dtype", "device", "shape", "requires_grad"):
        found, wanted = getattr(value, fact), getattr(expected, fact)
        if found != wanted:
            raise _refusal(f"{what} has {fact} {_plain(found)}, not {_plain(wanted)}")
    if not value.is_contiguous() or not value.isfinite().all():
        raise _refusal(f"{what} is not finite, or no tensor in memory of its own")


def _check_apart(tensors: list[torch.Tensor]) -> None:
    """Two in one memory would change each other."""
    if len({tensor.untyped_storage().data_ptr() for tensor in tensors}) < len(tensors):
        raise _refusal("tensors of its optimizer share their memory")


def _check_values(kept: dict[str, Any], step: int) -> None:
    if "step" in kept and float(kept["step"]) != float(torch.tensor(step, dtype=kept["step"].dtype)):
        raise _refusal(f"its optimizer is at step {float(kept['step']):g} and the checkpoint at {step}")
    if "exp_avg_sq" in kept and (kept["exp_avg_sq"] < 0).any():
        raise _refusal("its optimizer's exp_avg_sq, a mean of squares, is negative")


def _check_group(
    group: dict[str, Any], fresh: dict[str, Any], checkpoint: Checkpoint, optimization: Optimization
) -> None:
    """The optimizer's settings are those of the job; its rate is that of the last step, where it is known."""
    then = checkpoint.run["identity"].get("scheduled_steps") or optimization.meta_steps
    rate = optimization.meta_lr
    if checkpoint.step:
        rate = replace(optimization, meta_steps=then).rate(checkpoint.step - 1, optimization.reference_batch)
    given = group.get("lr")
    known = optimization.batch_rule == "none"  # else it grew with the batch of that step
    if type(given) is not float or not 0 <= given < math.inf or (known and not math.isclose(given, rate, rel_tol=1e-9)):
        raise _refusal(f"its optimizer's lr is {reprlib.repr(given)}, that of its last step {rate:g}")
    for name in sorted(fresh.keys() | group.keys(), key=str):
        if name not in ("lr", "params") and (
            name not in group or name not in fresh or not _same(group[name], fresh[name])
        ):
            raise _refusal(f"its optimizer's {name} is {reprlib.repr(group.get(name))}, not {fresh.get(name)!r}")


def _same(one: Any, other: Any) -> bool:
    """Equal plain values of equal types."""
    if isinstance(other, tuple):
        return isinstance(one, tuple) and len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and one == other


def _plain(fact: Any) -> Any:
    return list(fact) if isinstance(fact, torch.Size) else fact


def _refusal(why: str) -> InputError:
    return InputError(f"the checkpoint cannot be continued ({why}): take another, or start a new run")
