"""The evaluation of weights: its figures, the verdict, what to try where that is not "ahead", and its files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from metadist.checkpoint.format import theta_sha256
from metadist.core.errors import InputError
from metadist.core.files import reason, writing
from metadist.core.messages import Weights, unseen
from metadist.evaluation.advice import advise
from metadist.evaluation.protocol import Doing, draw_curve, write_results
from metadist.evaluation.verdict import compare, compare_with
from metadist.run.facts import facts
from metadist.run.identity import evaluation_tasks, figure_title
from metadist.run.pictures import draw_own
from metadist.run.prepare import Prepared


def evaluate_weights(
    prepared: Prepared, fleet: Any, weights: Weights, folder: Path, say: Callable[[str], None], run: str, metrics: Path,
    doing: Doing = unseen,
) -> dict[str, Any]:  # fmt: skip
    """The summary of the full evaluation of weights of the run at `run`, whose numbers of training are in `metrics`;
    results of each task, the adaptation curve and the user's figures are written to `folder`."""
    own = prepared.job.config.evaluation
    summary, results = prepared.job.evaluation(prepared.engine, prepared.baselines).run(fleet, weights, say, doing)
    measure = prepared.job.measure
    found = compare(results, measure)
    if found is not None and found.standing in ("level with", "behind"):
        pooled = compare_with("pooled", results, measure)
        known = facts(prepared, summary, found, run, metrics, pooled.standing if pooled else "")
        summary["advice"] = advise(known)
    if few := prepared.job.few_tasks(own.split, own.test_tasks):
        summary["few_tasks"] = few
    caption = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in summary["protocol"].items())
    with writing(folder):
        write_results(results, folder / "tasks.arrow")
        draw_curve(summary, f"{figure_title(prepared.job.config)}\n{caption}", folder / "adaptation_curve.png")
    try:
        summary["figures"] = draw_own(prepared.job, prepared.engine, prepared.constants, weights.theta, folder)
    except Exception as error:  # of a function that was tried before the run: no reason to lose its results
        what = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        say(f"evaluation.figures are not all drawn: {what}{reason(error)}")
    step_and_hash = {"evaluated_step": weights.version, "evaluated_theta_sha256": theta_sha256(weights.theta)}
    return {**step_and_hash, **summary, "tasks_of": evaluation_tasks(prepared.job)}
