"""The results of a run that has been trained."""

from collections.abc import Mapping
from typing import Any

from metadist.checkpoint.format import theta_sha256
from metadist.core.errors import EvaluationFailed, HeadLost, Interrupted, StorageFailed
from metadist.core.files import reason
from metadist.core.messages import Weights
from metadist.evaluation.protocol import regret
from metadist.run.directory import Run, write_json
from metadist.run.export import log_models
from metadist.run.identity import digest, evaluate_command, figure_title
from metadist.run.judge import evaluate_weights
from metadist.run.measures import final_metrics
from metadist.run.pictures import draw_run, draw_task
from metadist.run.prepare import Prepared


def conclude(
    prepared: Prepared, fleet: Any, run: Run, weights: Weights, ended_by: str, round_losses: Mapping[int, float]
) -> dict[str, Any]:
    """The results of a trained run: what it is, and its evaluation; `round_losses` are those of online rounds.

    Where evaluating fails, results.json says what was trained, and EvaluationFailed the command that makes up for it.
    """
    ending = {
        "theta_sha256": theta_sha256(weights.theta),
        "meta_steps": weights.version,
        "bit_identical": not run.drifted,
        "ended_by": ended_by,
        "identity": digest(run.identity),
        "data_digest": run.identity["data_digest"],
    }
    try:
        summary = _evaluate_best(prepared, fleet, run, weights)
        if run.config.task.steps_per_round:
            tasks = run.config.evaluation.tasks
            summary["online"] = regret(fleet, weights, round_losses, tasks, prepared.chunk_size)
            run.tracker.metrics({"online/regret": summary["online"]["regret"]}, weights.version)
        return ending | summary
    except (Interrupted, KeyboardInterrupt, StorageFailed, HeadLost):
        raise
    except Exception as error:
        failure = f"{type(error).__name__}: {reason(error)}"
        write_json({**ending, "evaluation_failed": failure}, run.path / "results.json")
        raise EvaluationFailed(
            f"{run.place} is trained and saved, but evaluating it failed ({failure}): once that is mended, "
            f"`{evaluate_command(run.config, run.place)}` does it"
        ) from error


def _evaluate_best(prepared: Prepared, fleet: Any, run: Run, weights: Weights) -> dict[str, Any]:
    """Evaluate the best weights by validation (the last ones where there was none), and draw the training curve."""
    best = run.store.load("best") if run.store.has_best() else None
    if best:
        weights = Weights(best.step, prepared.engine.layout.vector(best.weights))
    numbers = run.path / "metrics.jsonl"
    summary = evaluate_weights(prepared, fleet, weights, run.path, run.say, run.place, numbers, run.doing)
    if run.config.optimizer.max_staleness:
        summary["tasks_by_staleness"] = dict(sorted(fleet.staleness.items()))
    title = figure_title(run.config)
    drawn = [
        *draw_run(run.path, title, prepared.job.measure),
        *draw_task(prepared, weights.theta, run.path, run.say, title),
    ]
    for name in ["tasks.arrow", "adaptation_curve.png", *drawn, *summary.get("figures", [])]:
        run.tracker.artifact(run.path / name)
    run.tracker.metrics(final_metrics(summary), weights.version)
    log_models(prepared, run, best)
    return summary
