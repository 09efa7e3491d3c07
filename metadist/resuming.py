"""Whether a checkpoint, perhaps from elsewhere, holds what a run needs to go on; its bytes are as they were written."""

from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from metadist.checkpoint_format import Checkpoint
from metadist.errors import InputError

_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # of adam and adamw


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
    step: int
    optimizer: dict[str, Any]


class _Progress(_Strict):
    model_config = ConfigDict(strict=True, extra="forbid")

    best: float | None = None
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


def check_state(checkpoint: Checkpoint, theta: np.ndarray, optimizer_name: str, statistics: int = 0) -> None:
    """Raises InputError where the server's state does not fit theta [P], which ends with so many statistics."""
    behind = checkpoint.trainer.get("behind")
    if behind is not None and (not isinstance(behind, torch.Tensor) or tuple(behind.shape) != theta.shape):
        raise _refusal("the weights one step before are of another shape than theta")
    descended = (len(theta) - statistics,)
    optimizer = checkpoint.trainer["server"]["optimizer"]
    state, groups = optimizer.get("state"), optimizer.get("param_groups")
    one_group = isinstance(groups, list) and len(groups) == 1 and isinstance(groups[0], dict)
    if not one_group or groups[0].get("params") != [0] or not isinstance(state, dict) or not set(state) <= {0}:
        raise _refusal("its optimizer is not that of one vector")
    kept = state.get(0) or {}
    if optimizer_name != "sgd" and checkpoint.step and not kept.keys() >= _MOMENTS:
        raise _refusal(f"its optimizer lacks {min(_MOMENTS - kept.keys())}")
    for name, value in kept.items():
        if not isinstance(value, torch.Tensor):
            continue
        if tuple(value.shape) not in ((), descended) or not value.is_floating_point():
            raise _refusal(f"its optimizer's {name} has shape {list(value.shape)}, theta {list(descended)}")


def _refusal(why: str) -> InputError:
    return InputError(f"the checkpoint cannot be continued ({why}): take another, or start a new run")
