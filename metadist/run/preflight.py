"""Checks before the first step of whatever could only fail, or be wrong, after hours: derivatives, evaluation."""

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from metadist.checkpoint.format import Checkpoint
from metadist.core.errors import InputError
from metadist.core.files import reason
from metadist.core.messages import Chunk, Progress, Weights, unseen
from metadist.core.task import Split, Task, TaskId
from metadist.engine import Engine, Found, Method, check_gradient, claims_derivative, plain
from metadist.evaluation.protocol import draw_curve, write_results
from metadist.learners import Learner
from metadist.models.model import layer_of
from metadist.run.build import Job
from metadist.run.pictures import draw_own
from metadist.run.prepare import Prepared, prepare

SLOW_S = 3.0
PLAIN = {"compile": False, "cuda_graphs": False, "autocast": False, "device": "cpu"}


def preflight(
    job: Job, splits: Sequence[Split], checkpoint: Checkpoint | None = None, gradient: bool = False,
    say: Callable[[str], None] | None = None, begin: Callable[[Prepared], None] | None = None,
) -> Prepared:  # fmt: skip
    """Prepare the job and try its evaluation; with `gradient` check the meta-gradient too. What takes long of it is
    said. `begin` is called once a task has been computed, before the slower checks.

    Raises InputError for whatever would go wrong later.
    """
    with said_if_slow("reading the data and trying one task with the model and the learner", say):
        prepared = prepare(job, splits, checkpoint)
    if begin:
        begin(prepared)
    if gradient:
        text = "comparing its meta-gradient with finite differences (engine.gradient_check=false leaves that out)"
        with said_if_slow(text, say):
            prepared = with_gradient_checked(prepared)
    with said_if_slow("trying the evaluation, with its baselines, on two tasks", say):
        return with_evaluation_tried(prepared)


@contextmanager
def said_if_slow(text: str, say: Callable[[str], None] | None) -> Iterator[None]:
    """Say what is being done, once it has taken more than a few seconds."""
    timer = threading.Timer(SLOW_S, say or _say_nothing, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def with_gradient_checked(prepared: Prepared) -> Prepared:
    """Compare the meta-gradient of a training task with finite differences. Raises InputError, which names the tensor,
    where torch differentiates the model or the loss wrongly."""
    config, shapes = prepared.job.config, prepared.job.shapes
    if not config.engine.gradient_check:
        return replace(prepared, gradient="not checked (engine.gradient_check=false)")
    learner = Job(config, shapes).engine("cpu").learner  # with a model of its own, computed in float64
    method, task, exact = prepared.engine.method, prepared.chunk[0], claims_derivative(learner, config.meta_steps)
    theta = prepared.theta
    if not exact and learner.measures:
        return replace(prepared, gradient="an estimate from samples, which finite differences cannot check")
    if not exact:
        learner, theta = plain(learner), Engine(plain(learner)).initial_theta().numpy()
    try:
        found = check_gradient(learner, method, theta, task, config.meta_steps)
        if found.tensor and exact and _has_own_loss(learner):
            other = plain(Job(config, shapes).engine("cpu").learner)
            found = _surrogate(found, other, method, Engine(other).initial_theta().numpy(), task)
    except Exception as error:  # noqa: BLE001 - whatever a user's model does in float64; in float32 it has just computed
        where = layer_of(error, learner.model.module)
        text = f"not checked: {where} cannot be computed in float64 ({type(error).__name__}: {reason(error)})"
        return replace(prepared, gradient=text, notes=[*prepared.notes, f"the meta-gradient was {text}"])
    if isinstance(found, str):
        return replace(prepared, gradient=found, notes=[*prepared.notes, found])
    if found.tensor:
        remedies = [] if prepared.engine.method.differentiation == "remat" else ["engine.differentiation=remat"]
        remedies += [] if prepared.engine.learner.first_order else ["learner.first_order=true"]
        other = f"try {' or '.join(remedies)}, or, " if remedies else ""
        raise InputError(
            f"the meta-gradient is wrong: along {found.tensor!r} and others it differs from finite differences by "
            f"{found.error:.1%}, so torch differentiates the model or the loss wrongly, without an error: a layer "
            "edits weights, hides them from autograd or has a wrong derivative; replace it, "
            f"{other}where it is so on purpose (straight-through estimators, stopped gradients), set "
            "engine.gradient_check=false"
        )
    if found.error != found.error:
        return replace(prepared, gradient=f"too coarse to be checked ({found.seconds:.1f} s)")
    return replace(prepared, gradient=f"agrees with finite differences to {found.error:.0e} ({found.seconds:.1f} s)")


def _surrogate(found: Found, other: Learner, method: Method, theta: np.ndarray, task: Task) -> Found | str:
    """The verdict on a learner with losses of its own: `Found` where plain MAML of its model and loss differs too; else
    a sentence, that its losses are surrogates or wrong."""
    try:
        judged = check_gradient(other, method, theta, task)
        if judged.tensor:
            return judged
    except Exception:  # noqa: BLE001 - the model is not called with a task's inputs, as its learner alone knows how to
        pass
    return (
        f"the learner's meta-gradient is not the derivative of its outer loss (off by {found.error:.0%} along "
        f"{found.tensor!r} and others): so it should be where a loss is a surrogate, as with policy gradients, and "
        "elsewhere it is a fault; engine.gradient_check=false says no more"
    )


def _has_own_loss(learner: Learner) -> bool:
    """Whether its losses or outputs are defined outside metadist."""
    methods = ("inner_loss", "outer_loss", "step_loss", "predict", "model_weights")
    return any(not getattr(type(learner), name).__module__.startswith("metadist.") for name in methods)


def with_evaluation_tried(prepared: Prepared) -> Prepared:
    """Evaluate two tasks as the run will be in the end, with every metric, baseline and figure, so that nothing of it
    fails after hours. Raises InputError; baselines that nobody asked for and that cannot be computed are left out."""
    config = prepared.job.config
    few = {"test_tasks": 2, "baseline_tasks": 1, "scratch_steps": 1, "joint_steps": 1, "joint_inner_steps": 1}
    evaluation = config.evaluation.model_copy(update=few)
    engine = config.engine.model_copy(update={**PLAIN, "kind": prepared.engine.kind})
    small = Job(config.model_copy(update={"evaluation": evaluation, "engine": engine}), prepared.job.shapes)
    here, weights = _Here(small, prepared.constants), Weights(0, prepared.theta)

    def rehearse(baselines: Sequence[str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            summary, results = small.evaluation(prepared.engine, baselines).run(here, weights, _say_nothing)
            write_results(results, Path(folder, "tasks.arrow"))
            draw_curve(summary, "", Path(folder, "curve.png"))
            draw_own(small, prepared.engine, prepared.constants, prepared.theta, Path(folder))

    usable, notes = list(prepared.baselines), list(prepared.notes)
    try:
        try:
            rehearse(usable)
        except Exception:  # noqa: BLE001 - if it is no baseline's, it comes again
            usable, more = _usable_baselines(small, prepared, here)
            rehearse(usable)
            notes += more
    except InputError:
        raise
    except Exception as error:
        loop = ", engine.kind=loop where they are not made for vmap" if prepared.engine.kind == "vmap" else ""
        raise InputError(
            f"evaluating one task fails ({type(error).__name__}: {reason(error)}), which would happen after "
            f"training: check loss, evaluation and your own code{loop} (-v shows the traceback)"
        ) from error
    return replace(prepared, baselines=usable, notes=notes)


def _usable_baselines(job: Job, prepared: Prepared, here: "_Here") -> tuple[list[str], list[str]]:
    """The baselines that can be computed, and a sentence on each that is left out. Raises InputError where the job asks
    for one of these."""
    evaluation, usable, left_out = job.config.evaluation, [], []
    task = job.evaluation_source(TaskId(evaluation.split, 0, 0))
    for name in prepared.baselines:
        try:
            if name == "joint":
                job.joint(prepared.engine).results()
            else:
                here.worker.evaluator.evaluate_baselines((name,), [task])
            usable.append(name)
        except Exception as error:  # noqa: BLE001 - whatever a user's model and loss do when they are called otherwise
            if evaluation.baselines is not None:
                raise InputError(f"evaluation.baselines: {name} cannot be computed here: {reason(error)}") from error
            left_out.append(f"baseline {name} is left out, it cannot be computed here ({reason(error)})")
    return usable, left_out


class _Here:
    """Evaluates in this process, as a fleet does elsewhere."""

    def __init__(self, job: Job, constants: Mapping[str, np.ndarray]):
        self.worker = job.worker(constants)

    def evaluate(
        self, weights: Weights, chunks: Sequence[Chunk], baselines: tuple[str, ...] = (), progress: Progress = unseen
    ) -> list[dict[str, np.ndarray]]:
        del progress
        return [self.worker.evaluate(weights, chunk, baselines) for chunk in chunks]


def _say_nothing(text: str) -> None:
    del text
