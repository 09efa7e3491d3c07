"""A run from its job to its results."""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from metadist.config import Config
from metadist.core.errors import Interrupted, doing_it_again
from metadist.run.directory import Run, RunLock, RunTracker
from metadist.run.dry_run import dry_run as dry_run
from metadist.run.export import unlogged
from metadist.run.fleets import Cluster, check_cluster, open_fleet
from metadist.run.places import checked
from metadist.run.results import conclude
from metadist.run.resume import Start, find_resumable, first_target, open_job, prepare_start
from metadist.run.signals import Signals, Stop
from metadist.run.trainer import Trainer
from metadist.run.trust import trust_flag, unloadable


def train(
    config: Config, *, resume: str | Path | None = None, quiet: bool = False, trust_code: bool = False
) -> dict[str, Any]:
    """Meta-train, then evaluate the best weights.

    Args:
        config: the run; `load_config(["job.yaml"], ["meta_lr=0.01"])` makes one.
        resume: None refuses a run directory that is in use; "auto" continues the run there, or starts one; a path
            continues from that run or checkpoint.
        quiet: no progress on stderr.
        trust_code: accept the checkpoints of the run at `resume` in a place that neither its directory nor this job
            names.

    Returns the content of `results.json`: `theta_sha256`, `meta_steps`, the figures of the evaluation with their 95 %
    intervals and baselines, in the units of the metric (accuracy: 0 to 1).

    Raises InputError for settings, data or code that do not fit, Diverged for a loss, gradient or theta that is not
    finite, and Interrupted after a signal, once all is saved.

    Example:
        >>> import metadist
        >>> config = metadist.load_config(["jobs/digits.yaml"], ["meta_steps=10"])
        >>> metadist.train(config)["accuracy"]["after"]["mean"]  # doctest: +SKIP
        0.93
    """
    config = checked(config)
    check_cluster(config)
    began = time.monotonic()
    with RunLock(config) as lock:
        checkpoint = find_resumable(config, resume, trust_code)
        job = open_job(config, quiet)
        with Cluster(config, first_target(config, checkpoint), partial(print, file=sys.stderr)) as cluster:
            start = prepare_start(job, checkpoint, quiet, cluster.begin_workers)
            config = start.prepared.job.config
            lock.take()
            open_tracker = partial(RunTracker, quiet=quiet, measure=start.prepared.job.measure)
            with Run(config, start.checkpoint, start.identity, start.drifted, lock, open_tracker) as run:
                return _train(run, start, cluster, began)


def _train(run: Run, start: Start, cluster: Cluster, began: float) -> dict[str, Any]:
    config, prepared = run.config, start.prepared
    for change in start.changes:
        run.say(f"{change}: from here on the bits may differ from an uninterrupted run")
    target, signals, proofs = first_target(config, start.checkpoint), Signals(), start.proofs
    with (
        open_fleet(cluster, prepared, target, run.say, signals, *proofs, writes=True) as fleet, signals, run.writing()
    ):  # fmt: skip
        run.describe(prepared.job.dataset, prepared.resolved(), prepared.about(), trust_flag(config))
        trainer = Trainer(run, prepared, fleet)
        lines = [banner(run, start), prepared.chosen(), *prepared.notes, *unloadable(config), *unlogged(prepared)]
        for line in [*lines, *first_steps(config)]:
            run.say(line)
        with signals.deferred():
            weights, ended_by = trainer.run(start.step, Stop(signals, config.max_time_s, config.evaluation.patience))
        run.check()
        if early := ended_early(config, ended_by, weights.version):
            run.say(early)
        if signals.received is not None:
            run.say(f"saved at step {weights.version} in {run.place}; {doing_it_again()} goes on from there")
            raise Interrupted(signals.received)
        results = conclude(prepared, fleet, run, weights, ended_by, trainer.progress.round_losses)
        results["resolved"] = prepared.resolved()
        results["seconds"] = round(time.monotonic() - began, 1)
        if page := run.mlflow_page():
            results["mlflow_page"] = page
        run.write_results(results)
        return results


def banner(run: Run, start: Start) -> str:
    """A line on the run that is about to begin."""
    config, prepared, first = run.config, start.prepared, start.step
    begins = f"continues at step {first}" if first else "starts"
    if first >= config.meta_steps:
        begins = f"already finished ({first}/{config.meta_steps} meta-steps), raise meta_steps to continue"
    return (
        f"{run.place} {begins}: {config.learner.name}, {prepared.engine.layout.size} parameters, "
        f"{config.batch_size(config.num_workers)} tasks a step, {config.num_workers} workers, "
        f"{prepared.engine.kind} engine"
    )


def ended_early(config: Config, ended_by: str, step: int) -> str:
    """A sentence on a run that ended before its last meta-step, but for a signal."""
    why = {
        "no improvement": f"{config.evaluation.patience} validations brought no improvement (evaluation.patience)",
        "time limit": f"its {config.max_time_s:g} s are over (max_time_s)" if config.max_time_s else "",
    }.get(ended_by)
    if not why:
        return ""
    key = "evaluation.patience" if ended_by == "no improvement" else "max_time_s"
    return f"stopped at step {step} of {config.meta_steps}: {why}; with {key}=null, {doing_it_again()} goes on"


def first_steps(config: Config) -> list[str]:
    """Sentences on what takes long before the first meta-step is done."""
    own, lines = config.engine, []
    if own.compile:
        lines.append("the first meta-step compiles the meta-gradient, 5 to 25 s (engine.compile=false)")
    if own.cuda_graphs:
        lines.append("the first meta-steps record the meta-gradient's operations (engine.cuda_graphs=false)")
    return lines
