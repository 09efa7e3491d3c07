"""What follow the meta-leader is judged by: each task's loss when it arrives, and the regret of not having known it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from metadist.evaluation import Evaluator, measure


def round_loss(fleet: Evaluator, weights: Any, number: int, tasks: int, size: int) -> float:
    """The loss after adaptation on round `number`'s task: a mean over `tasks` ways to divide it into support and query
    set. Called before theta has been trained on it, it is that round's performance."""
    return float(measure(fleet, weights, "validation", tasks, size, step=number + 1)["loss"][:, -1].mean())


def regret(fleet: Evaluator, weights: Any, losses: Sequence[float], tasks: int, size: int) -> dict[str, Any]:
    """The rounds' losses beside those of one theta, the last one, which stands for the best in hindsight; the regret is
    the sum of their differences (Finn et al. 2019, equation 3)."""
    hindsight = [round_loss(fleet, weights, number, tasks, size) for number in range(len(losses))]
    return {"losses": list(losses), "in_hindsight": hindsight, "regret": float(np.sum(losses) - np.sum(hindsight))}
