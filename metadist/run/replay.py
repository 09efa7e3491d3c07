"""Computing a run again from its journal: proof that its bits are what they should be, or a look at one task."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from metadist.checkpoint.format import theta_sha256
from metadist.checkpoint.journal import journalled_hashes, planned_batches, read_journal
from metadist.config import Config, load_config
from metadist.core.errors import InputError
from metadist.core.messages import Chunk, Weights, plan
from metadist.core.task import TaskId
from metadist.fleet.local import LocalFleet
from metadist.run.build import Job
from metadist.run.mirror import run_file
from metadist.run.prepare import prepare
from metadist.run.saved import config_file, read_checkpoint, saved_place
from metadist.run.trust import check_trusted, check_usable, outside_code, outside_data


class Differs(RuntimeError):
    """A replayed run has other bits than its journal says."""


def replay(run_dir: str | Path, say: Callable[[str], None], *, trust_code: bool = False) -> dict[str, Any]:
    """Compute a run again from its first step on one worker in this process, with the batches its journal says, and
    compare theta wherever the journal has its hash. Raises Differs at the first that is not equal, InputError where
    the run names code outside metadist (see `metadist.load`)."""
    config = _trusted(run_dir, trust_code)
    records = read_journal(run_file(run_dir, "journal.jsonl"))
    batches = planned_batches(records)
    hashes = journalled_hashes(records)
    if not hashes:
        raise InputError(f"the journal of {run_dir} has no hash to compare with: let the run save once")
    absent = next((step for step in range(max(hashes)) if step not in batches), None)
    if absent is not None:
        raise InputError(
            f"the journal of {run_dir} does not begin at the first step or lacks step {absent}: a run that went on "
            "from another's checkpoint, or whose journal lost lines, cannot be replayed"
        )
    if config.optimizer.max_staleness:
        raise InputError(
            "an asynchronous run (optimizer.max_staleness above 0) cannot be replayed: its bits are chance"
        )
    prepared = prepare(job := Job(config), [])
    fleet = LocalFleet(lambda: job.worker(prepared.constants))
    optimization = job.optimization(prepared.engine)
    server = fleet.start_server(prepared.theta, optimization, None, lag=config.optimizer.delay)
    theta, last = prepared.theta, max(hashes)
    for step in range(last):
        chunks = plan("train", step, batches[step], prepared.chunk_size)
        server.apply(step, *fleet.meta_gradients(server.used(), chunks))
        expected = hashes.get(step + 1)
        if expected is None:
            continue
        theta = fleet.fetch(server.weights()).theta
        if theta_sha256(theta) != expected:
            raise Differs(
                f"after {step + 1} meta-steps theta is {theta_sha256(theta)}, the journal says {expected}: "
                "another build, device or thread count, data or a journal that was changed, or a faulty machine"
            )
        say(f"step {step + 1} of {last}: equal")
    return {"meta_steps": last, "hashes_compared": len(hashes), "theta_sha256": theta_sha256(theta)}


def replay_task(run_dir: str | Path, task: str | TaskId, *, trust_code: bool = False) -> list[dict[str, Any]]:
    """One training task (`train:STEP:INDEX`) at the theta of the checkpoint of its meta-step.

    Per inner step the support loss and the norm of the fast weights, then the outer loss and the meta-gradient: the
    first value that is not finite shows where it diverged.
    """
    try:
        task_id = task if isinstance(task, TaskId) else TaskId.parse(task)
    except ValueError as error:
        raise InputError(f"--task {task}: write it as train:STEP:INDEX ({error})") from None
    config = _trusted(run_dir, trust_code)
    saved = read_checkpoint(run_dir, f"step_{task_id.step:08d}", saved_place(run_dir, trust_code=trust_code))
    prepared = prepare(job := Job(config), [], saved)
    worker = job.worker(prepared.constants)
    behind = saved.trainer.get("behind")  # in a delayed run gradients are of the weights one step before
    weights = Weights(saved.step, prepared.theta if behind is None else behind.numpy())
    rows = [
        {"inner_step": k, "support_loss": loss, "fast_weight_norm": norm}
        for k, (loss, norm) in enumerate(worker.trace(weights, task_id))
    ]
    chunk = Chunk(task_id.split, task_id.step, task_id.index, task_id.index + 1)
    report, gradient = worker.meta_gradients(weights, chunk)
    norm = float(np.linalg.norm(gradient.astype(np.float64)))
    return [*rows, {"outer_loss": float(report.losses[0]), "meta_gradient_norm": norm}]


def _trusted(run_dir: str | Path, trust_code: bool) -> Config:
    config = load_config([config_file(run_dir)])
    check_trusted(run_dir, outside_code(config) | outside_data(config, run_dir), trust_code)
    check_usable(config.data.path, config.model.weights)
    return config
