"""How results are measured: the protocol, its intervals, the baselines on the same tasks, figures."""

from metadist.core.measure import Measure
from metadist.evaluation.baselines import choose_baselines
from metadist.evaluation.evaluator import Evaluator
from metadist.evaluation.joint import Joint, fine_tuning
from metadist.evaluation.protocol import Evaluation

__all__ = ["Evaluation", "Evaluator", "Joint", "Measure", "choose_baselines", "fine_tuning"]
