"""Runs from end to end: train one, evaluate one again, change its number of workers."""

import shlex
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metadist.checkpoint.format import Checkpoint, local_folder, theta_sha256
from metadist.checkpoint.journal import Journal, planned_batches, read_journal
from metadist.checkpoint.saver import Saver
from metadist.checkpoint.store import CheckpointStore
from metadist.config import Config, load_config
from metadist.config.load import shown
from metadist.core.errors import EvaluationFailed, HeadLost, Interrupted, StorageFailed
from metadist.core.files import DriverLock, here, private_files, reason, writing
from metadist.core.messages import Weights
from metadist.core.task import Split
from metadist.evaluation.figures import training_curve
from metadist.evaluation.online import regret
from metadist.evaluation.protocol import draw_curve, evaluate_run, write_results
from metadist.fleet.worker import set_up_process
from metadist.run.auto import chunk_size
from metadist.run.build import make_optimization, open_data
from metadist.run.directory import (
    begin_directory,
    check_lasting,
    find_checkpoint,
    first_target,
    is_own,
    located,
    location,
    write_json,
)
from metadist.run.fleets import open_fleet
from metadist.run.identity import check_evaluation, check_settings, digest, drift, run_identity
from metadist.run.predictor import config_file, read_checkpoint, saved_place
from metadist.run.preflight import with_evaluation_tried, with_gradient_checked
from metadist.run.prepare import Prepared, prepare
from metadist.run.resuming import check_resumable, check_state
from metadist.run.signals import Signals, Stop
from metadist.run.tracker import Recording
from metadist.run.trainer import Progress, Trainer
from metadist.run.trust import (
    check_trusted,
    check_usable,
    outside_address,
    outside_code,
    outside_place,
    trust_flag,
    unloadable,
)
from metadist.tracking.jsonl import read_metrics

Say = Callable[[str], None]


def train(
    config: Config, *, resume: str | Path | None = None, quiet: bool = False, trust_code: bool = False
) -> dict[str, Any]:
    """Meta-train, then evaluate the best weights; returns what `results.json` holds.

    `resume`: None refuses a run directory that is in use; "auto" continues what is there, or starts; a path continues
    from that run or checkpoint; one whose checkpoints are elsewhere than in its directory and where this job has them
    is followed with `trust_code` only. Raises InputError, Diverged, or Interrupted (after saving).
    """
    config = located(config)
    assert config.run_dir
    check_lasting(config)
    check_usable(config.tracking.uri, config.checkpoint.location, config.fleet.address)
    if resume not in (None, "auto"):
        saved_place(str(resume), config.checkpoint.location, trust_code)
    with private_files(), DriverLock(Path(config.run_dir)) as lock:
        return _train(config, Path(config.run_dir), lock, resume, quiet)


def _train(config: Config, run_dir: Path, lock: DriverLock, resume: str | Path | None, quiet: bool) -> dict[str, Any]:
    began = time.monotonic()
    checkpoint, prepared = _find_beginning(config, run_dir, resume)
    identity = run_identity(config, prepared.engine)
    changes = drift(checkpoint.run["identity"], identity) if checkpoint else []
    lock.take()
    with ExitStack() as stack:
        locks, kept = [lock], local_folder(config.checkpoint.location) if config.checkpoint.location else None
        if kept is not None and kept != run_dir:
            locks.append(stack.enter_context(DriverLock(kept)))
            locks[1].take()
        begin_directory(config, run_dir, checkpoint)
        record = stack.enter_context(Recording(config, run_dir, checkpoint, quiet))
        for change in changes:
            record.say(f"{change}: from here on the bits may differ from an uninterrupted run")
        target = first_target(config, run_dir, checkpoint)
        signals = Signals()
        before = checkpoint.run if checkpoint else {}
        proofs = [None if changes else before.get(whose) for whose in ("proof", "server_proof")]
        drifted = bool(changes or before.get("drifted"))
        drifted |= bool(config.fleet.mixed_devices or config.optimizer.max_staleness)
        fleet = stack.enter_context(open_fleet(config, prepared, target, record.say, signals, *proofs, writes=True))
        stack.enter_context(signals)
        record.describe(identity, open_data(config))
        trainer = make_trainer(config, run_dir, prepared, fleet, record, checkpoint, identity, drifted, locks)
        stack.callback(trainer.journal.close)
        stack.callback(trainer.saver.close)
        start = checkpoint.step if checkpoint else 0
        record.say(banner(config, run_dir, prepared, start))
        for note in [*prepared.notes, *unloadable(config)]:
            record.say(note)
        signals.deferred = True
        weights, ended_by = trainer.run(start, Stop(signals, config.max_time_s, config.evaluation.patience))
        signals.deferred = False
        check_held(locks)
        if signals.received is not None:
            record.say(f"saved in {run_dir}; the same command with --resume auto goes on from there")
            raise Interrupted(signals.received)
        ending = {
            "theta_sha256": theta_sha256(weights.theta),
            "meta_steps": weights.version,
            "bit_identical": not drifted,
            "ended_by": ended_by,
            "identity": digest(identity),
            "data_digest": identity["data_digest"],
        }
        told = _evaluated(config, prepared, fleet, trainer, weights, record, ending)
        told = {**ending, "seconds": round(time.monotonic() - began, 1), **told}
        lock.check()
        write_json(told, run_dir / "results.json")
        record.tracker.artifact(run_dir / "results.json")
        return told


def _evaluated(
    config: Config,
    prepared: Prepared,
    fleet: Any,
    trainer: Trainer,
    weights: Weights,
    record: Recording,
    ending: dict[str, Any],
) -> dict[str, Any]:
    """What the evaluation of a trained run found. Where it fails, results.json says what was trained, and
    EvaluationFailed how to go on."""
    run_dir = trainer.run_dir
    try:
        told = conclude(config, prepared, fleet, trainer.saver.store, weights, record)
        if config.task.steps_per_round:
            own = config.evaluation.tasks, trainer.chunk_size
            told["online"] = regret(fleet, weights, trainer.progress.round_losses, *own)
            record.tracker.metrics({"online/regret": told["online"]["regret"]}, weights.version)
        return told
    except (Interrupted, KeyboardInterrupt, StorageFailed, HeadLost):
        raise
    except Exception as error:
        failure = f"{type(error).__name__}: {reason(error)}"
        write_json({**ending, "evaluation_failed": failure}, run_dir / "results.json")
        raise EvaluationFailed(
            f"{run_dir} is trained and saved, but evaluating it failed ({failure}): once that is mended, "
            f"`metadist evaluate {shlex.quote(str(run_dir))}{trust_flag(config)}` does it"
        ) from error


def _find_beginning(config: Config, run_dir: Path, resume: str | Path | None) -> tuple[Checkpoint | None, Prepared]:
    """The checkpoint that a run goes on from, if any, and what is known before there are workers, all checked."""
    checkpoint = find_checkpoint(config, run_dir, resume)
    if checkpoint is not None:
        check_resumable(checkpoint)
        check_settings(checkpoint.run["identity"], config)
    set_up_process(config.fleet.threads_per_worker)
    validated: list[Split] = ["validation"] if config.evaluation.every else []
    prepared = prepare(config, [*validated, config.evaluation.split], checkpoint)
    if checkpoint is None:  # else it was done when the run began
        prepared = with_gradient_checked(config, prepared)
    prepared = with_evaluation_tried(config, prepared)
    if checkpoint is not None:
        check_state(checkpoint, prepared.theta, make_optimization(config, prepared.engine))
    return checkpoint, prepared


def check_held(locks: Sequence[DriverLock]) -> None:
    """Raises PlaceLost where a folder that the run writes to is no longer the one it took."""
    for lock in locks:
        lock.check()


def make_trainer(
    config: Config,
    run_dir: Path,
    prepared: Prepared,
    fleet: Any,
    record: Recording,
    checkpoint: Checkpoint | None,
    identity: dict[str, Any],
    drifted: bool,
    locks: Sequence[DriverLock],
) -> Trainer:
    """The trainer of a run, at its start or where the checkpoint left it. `locks` are of the folders it writes to."""
    state = checkpoint.trainer if checkpoint else None
    journal = Journal(run_dir / "journal.jsonl")
    store = CheckpointStore(
        location(config, run_dir), config.checkpoint.keep_last, record.say, lambda: check_held(locks)
    )
    if "://" in store.location:
        store.claim(f"{run_dir}, {here()},")
    planned, own = planned_batches(read_journal(run_dir / "journal.jsonl")), is_own(checkpoint, run_dir)
    if planned and not checkpoint:
        record.say(
            f"{run_dir} has no checkpoint: its {len(planned)} meta-steps are computed again, each with the tasks that "
            "journal.jsonl has for it"
        )
    noted = state["progress"] if state and own else {}
    return Trainer(
        config,
        run_dir=run_dir,
        engine=prepared.engine,
        shapes=prepared.shapes,
        fleet=fleet,
        server=fleet.start_server(
            prepared.theta,
            make_optimization(config, prepared.engine),
            state["server"] if state else None,
            state["behind"].numpy() if state and state.get("behind") is not None else None,
            config.optimizer.delay,
        ),
        saver=Saver(store, journal, record.say),
        journal=journal,
        tracker=record.tracker,
        say=record.say,
        facts=lambda: {
            "identity": identity,
            "shapes": prepared.shapes._asdict(),
            "mlflow_run_id": record.mlflow_run_id(),
            "run_dir": str(run_dir),
            "proof": fleet.proof,
            "server_proof": fleet.server_proof,
            "drifted": drifted,
        },
        planned=planned,
        progress=Progress(**{"validated": checkpoint.step if checkpoint else 0, **noted}),
    )


def conclude(
    config: Config, prepared: Prepared, fleet: Any, store: CheckpointStore, weights: Weights, record: Recording
) -> dict[str, Any]:
    """Evaluate the best weights by validation (the last ones where there was none), and leave files and figures."""
    assert config.run_dir
    run_dir = Path(config.run_dir)
    if store.has_best():
        best = store.load("best")
        weights = Weights(best.step, prepared.engine.layout.vector(best.weights))
    told = judge(config, prepared, fleet, weights, run_dir, record.say)
    if config.optimizer.max_staleness:
        told["tasks_by_staleness"] = dict(sorted(fleet.staleness.items()))
    rows = read_metrics(run_dir / "metrics.jsonl")
    files = ["tasks.arrow", "adaptation_curve.png"]
    if any("train/loss" in row for row in rows):
        with writing(run_dir):
            training_curve(rows, run_dir / "training_curve.png")
        files.append("training_curve.png")
    for name in files:
        record.tracker.artifact(run_dir / name)
    metric = "accuracy" if "accuracy" in told else "loss"
    final = {f"{config.evaluation.split}/{metric}": told[metric]["after"]["mean"]}
    final[f"{config.evaluation.split}/{metric}_ci95"] = told[metric]["after"]["ci95"]
    final[f"{config.evaluation.split}/diverged_tasks"] = told["diverged_tasks"]
    if told["begun"] == "before adaptation":
        final[f"{config.evaluation.split}/{metric}_before"] = told[metric]["before"]["mean"]
    record.tracker.metrics(final, weights.version)
    return {"evaluated_step": weights.version, "evaluated_theta_sha256": theta_sha256(weights.theta), **told}


def judge(config: Config, prepared: Prepared, fleet: Any, weights: Weights, folder: Path, say: Say) -> dict[str, Any]:
    """The full evaluation, its per-task results and its figure written to `folder`."""
    own = prepared.shapes, prepared.engine, fleet, weights, prepared.baselines
    told, results = evaluate_run(config, *own, say)
    protocol = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in told["protocol"].items())
    with writing(folder):
        write_results(results, folder / "tasks.arrow")
        draw_curve(told, protocol, folder / "adaptation_curve.png")
    return told


def evaluate(
    config: Config,
    run: str | Path,
    *,
    checkpoint: str = "best",
    say: Say = print,
    trust_code: bool = False,
    own: Collection[str] = (),
) -> dict[str, Any]:
    """Evaluate a run's weights as `config` (the run's own, with changes) says; everything is left in
    RUN/evaluations/NAME, one NAME per configuration.

    Code, addresses and places that the run names as `config` does are followed with `trust_code` only, or where they
    are settings in `own` (dotted keys), which the user gave himself. Raises InputError that names them.
    """
    config = located(config)
    check_followed(config, run, trust_code, own)
    check_usable(config.checkpoint.location, config.fleet.address)
    saved = read_checkpoint(run, checkpoint, config.checkpoint.location)
    check_evaluation(saved.run["identity"], config)
    set_up_process(config.fleet.threads_per_worker)
    prepared = with_evaluation_tried(config, prepare(config, [config.evaluation.split], saved))
    for note in prepared.notes:
        say(note)
    weights = Weights(saved.step, prepared.theta)
    name = digest({"config": shown(config), "step": saved.step})
    folder = Path(run) / "evaluations" / name
    signals = Signals()
    with private_files():
        with writing(folder):
            folder.parent.mkdir(exist_ok=True)
            folder.mkdir(exist_ok=True)
        with open_fleet(config, prepared, config.num_workers, say, signals) as fleet, signals:
            told = judge(config, prepared, fleet, weights, folder, say)
        told = {"evaluated_step": saved.step, "evaluated_theta_sha256": theta_sha256(weights.theta), **told}
        write_json(told, folder / "results.json")
    return told | {"folder": str(folder)}


def check_followed(config: Config, run: str | Path, trust_code: bool, own: Collection[str]) -> None:
    """Raises InputError where evaluation would follow what only the saved run names."""
    followed, saved = (
        outside_code(each) | outside_address(each) | outside_place(each, Path(run))
        for each in (config, load_config([config_file(run)]))
    )
    check_trusted(run, {key: name for key, name in followed.items() if saved.get(key) == name}, trust_code, own)


def banner(config: Config, run_dir: Path, prepared: Prepared, start: int) -> str:
    """What is about to happen, in one line."""
    batch = config.batch_size(config.num_workers)
    begins = f"continues at step {start}" if start else "starts"
    if start >= config.meta_steps:
        begins = f"has done {start} meta-steps, so that none of meta_steps={config.meta_steps} is left"
    # on Ray the workers are starting meanwhile
    memory = f", {prepared.memory()} of memory each" if config.fleet.backend == "ray" else ""
    return (
        f"{run_dir} {begins}: {config.learner.name}, {prepared.engine.layout.size} parameters, "
        f"{batch} tasks a step, {config.num_workers} workers, {prepared.engine.kind} engine{memory}"
    )


def dry_run(config: Config) -> dict[str, Any]:
    """Everything `train` would check before it starts workers, and the plan."""
    config = located(config)
    assert config.run_dir
    check_lasting(config)
    find_checkpoint(config, Path(config.run_dir), "auto")
    checked: list[Split] = (
        ["validation", config.evaluation.split] if config.evaluation.every else [config.evaluation.split]
    )
    prepared = with_evaluation_tried(config, with_gradient_checked(config, prepare(config, checked)))
    engine = prepared.engine
    return {
        "run_dir": config.run_dir,
        "learner": config.learner.name,
        "parameters": engine.layout.size,
        "engine": asdict(engine.method),
        "memory_per_worker": prepared.memory(),
        "chunk_size": chunk_size(config, engine),
        "tasks_per_step": config.batch_size(config.num_workers),
        "workers": config.num_workers,
        "inputs": prepared.shapes.inputs,
        "outputs": prepared.shapes.outputs,
        "meta_gradient": prepared.gradient,
        "baselines": list(prepared.baselines),
        "notes": [*prepared.notes, *unloadable(config)],
        "identity": digest(run_identity(config, engine)),
    }
