"""What to change where a run's numbers go wrong: only what its learner takes, and what its data can be given."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metadist.data.description import far_from_zero
from metadist.evaluation.advice import LARGE
from metadist.run.facts import columns, inner_rate
from metadist.run.prepare import Prepared


def joined(prepared: Prepared, changes: Sequence[str]) -> str:
    """Changes as one clause, with that of scaling the data: the first where its numbers are far from 0, else the last,
    and none where there is nothing to scale."""
    if far := _far_from_zero(prepared):
        return f"{far}; if that is not enough, {', or '.join(changes)}" if changes else far
    return ", or ".join([*changes, *_scaling(prepared)]) or "look for the reason in the data, or in model.weights"


def steadier(prepared: Prepared, updated: bool = True, evaluation: bool = False) -> str:
    """What keeps losses and gradients finite. `updated`: whether meta-steps were taken, so that their size counts;
    `evaluation`: whether it is about tasks of evaluation, which may adapt at a rate of their own."""
    learner = prepared.engine.learner
    own_rate = evaluation and "inner_lr" not in learner.refused and not learner.learned_rates
    rates = ["evaluation.inner_lr"] * own_rate + [inner_rate(learner)] + ["meta_lr"] * updated
    lower = [f"lower {' or '.join(filter(None, rates))}"] if any(rates) else []
    return joined(prepared, lower + ["set optimizer.clip_norm"] * updated)


def _far_from_zero(prepared: Prepared) -> str:
    """Which numbers are too far from 0 for a model, with the remedy; "" where none are, or data is built in."""
    job = prepared.job
    if job.dataset is not None:
        first, *more = ("" if job.config.data.family else far_from_zero(job.dataset)) or [""]
        return first + f" (likewise {len(more)} others)" * bool(more)
    sizes = columns(prepared)
    if sizes is None or sizes[1] <= LARGE:
        return ""
    return (
        f"inputs have values of {sizes[1]:.2g}, and models learn badly from numbers so far from 0: divide each column "
        "by its deviation in training, in the source"
    )


def _scaling(prepared: Prepared) -> list[str]:
    """The change that scales what has not been scaled of inputs and targets that are numbers; empty where all is."""
    job, shapes = prepared.job, prepared.job.shapes
    what = ["inputs"] * (columns(prepared) is not None and not _scaled(shapes.input_units))
    what += ["targets"] * (not shapes.classification and not _scaled(shapes.target_units))
    if not what or job.config.data.family:
        return []
    return [f"scale {' and '.join(what)} ({'`--standardize` at import' if job.config.data.path else 'in the source'})"]


def _scaled(units: Sequence[Mapping[str, Any]]) -> bool:
    return any(np.any(np.not_equal(unit["scale"], 1)) or np.any(unit["offset"]) for unit in units)
