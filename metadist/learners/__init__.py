"""The algorithms. A job names one of these, or its own `Learner` as `module:Class`."""

from typing import Any

from metadist.learners.learner import Context, Differentiation, Fast, Learner
from metadist.learners.maml import MAML
from metadist.learners.reptile import Reptile

LEARNERS: dict[str, tuple[type[Learner], dict[str, Any], str]] = {
    "maml": (MAML, {}, "second-order MAML, Finn et al. 2017, arxiv.org/abs/1703.03400"),
    "fomaml": (MAML, {"first_order": True}, "first-order MAML, Finn et al. 2017, section 5.2"),
    "anil": (MAML, {"adapted": "head.*"}, "only the head adapts, Raghu et al. 2020, arxiv.org/abs/1909.09157"),
    "reptile": (
        Reptile,
        {},
        "Reptile, Nichol et al. 2018, arxiv.org/abs/1803.02999; its outer step is optimizer.name=sgd, meta_lr=1",
    ),
}
"""Name in a job -> class, the options that name sets, one line."""

__all__ = ["LEARNERS", "MAML", "Context", "Differentiation", "Fast", "Learner", "Reptile"]
