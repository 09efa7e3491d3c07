"""What follow the meta-leader is judged by: each task's loss when it arrives, and the regret of not having known it."""

from collections.abc import Mapping
from typing import Any

from metadist.evaluation.protocol import Evaluator, measure


def round_loss(fleet: Evaluator, weights: Any, number: int, tasks: int, size: int) -> float:
    """The loss after adaptation on round `number`'s task: a mean over `tasks` ways to divide it into support and query
    set. Called before theta has been trained on it, it is that round's performance."""
    return float(measure(fleet, weights, "validation", tasks, size, step=number + 1)["loss"][:, -1].mean())


def regret(fleet: Evaluator, weights: Any, losses: Mapping[int, float], tasks: int, size: int) -> dict[str, Any]:
    """The losses of the rounds that were judged (all, unless the run began from another's checkpoint) beside those of
    one theta, the last one, which stands for the best in hindsight; the regret is the sum of their differences (Finn et
    al. 2019, equation 3)."""
    hindsight = [round_loss(fleet, weights, number, tasks, size) for number in losses]
    lost = sum(losses.values()) - sum(hindsight)
    return {"rounds": list(losses), "losses": list(losses.values()), "in_hindsight": hindsight, "regret": lost}
