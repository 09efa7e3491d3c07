"""The algorithms. A job names one of these, or its own `Learner` as `module:Class`."""

from typing import Any

from metadist.learners.cavia import CAVIA
from metadist.learners.evolution import EvolutionStrategies
from metadist.learners.imaml import IMAML
from metadist.learners.inner_optimizers import INNER_OPTIMIZERS, InnerOptimizer
from metadist.learners.learner import Context, Differentiation, Fast, Learner
from metadist.learners.maml import MAML
from metadist.learners.maml_plus_plus import MAMLPlusPlus
from metadist.learners.meta_curvature import MetaCurvature
from metadist.learners.meta_sgd import MetaSGD
from metadist.learners.platipus import PLATIPUS
from metadist.learners.policy_gradient import PolicyGradient
from metadist.learners.prototypes import ProtoMAML, ProtoNet
from metadist.learners.reptile import Reptile
from metadist.learners.ridge import R2D2
from metadist.learners.task_adaptive import TaskAdaptiveMAML

LEARNERS: dict[str, tuple[type[Learner], dict[str, Any], str]] = {
    "maml": (MAML, {}, "second-order MAML, Finn et al. 2017, arxiv.org/abs/1703.03400"),
    "fomaml": (MAML, {"first_order": True}, "first-order MAML, Finn et al. 2017, section 5.2"),
    "anil": (MAML, {"adapted": "head.*"}, "only the head adapts, Raghu et al. 2020, arxiv.org/abs/1909.09157"),
    "boil": (MAML, {"adapted": "body.*"}, "only the body adapts, Oh et al. 2021, arxiv.org/abs/2008.08882"),
    "meta_sgd": (MetaSGD, {}, "a learned rate for every parameter, Li et al. 2017, arxiv.org/abs/1707.09835"),
    "maml++": (
        MAMLPlusPlus,
        {},
        "multi-step loss, annealed order, rates and norms per step, Antoniou et al. 2019, arxiv.org/abs/1810.09502",
    ),
    "task_adaptive": (
        TaskAdaptiveMAML,
        {},
        "an encoder of the task scales each tensor's rate, after Lee et al. 2020, arxiv.org/abs/1905.12917",
    ),
    "reptile": (
        Reptile,
        {},
        "Reptile, Nichol et al. 2018, arxiv.org/abs/1803.02999; its outer step is optimizer.name=sgd, meta_lr=1",
    ),
    "imaml": (
        IMAML,
        {},
        "(1 + damping + H / (proximal + proximal_damping))^-1 times the query gradient at the solution of a proximal "
        "problem, Rajeswaran et al. 2019, arxiv.org/abs/1909.04630 (its code: damping 1, proximal_damping 10)",
    ),
    "platipus": (PLATIPUS, {}, "probabilistic MAML, Finn et al. 2018, arxiv.org/abs/1806.02817"),
    "policy_gradient": (
        PolicyGradient,
        {},
        "meta-RL: MAML by policy gradients, Finn et al. 2017, 5.3, with the curvature of ProMP or the term of E-MAML",
    ),
    "evolution": (
        EvolutionStrategies,
        {},
        "no derivative of the outer loss, or of any: losses at perturbed weights, Song et al. 2020, "
        "arxiv.org/abs/1910.01215",
    ),
    "meta_curvature": (
        MetaCurvature,
        {},
        "learned matrices transform the inner gradient, Park and Oliva 2019, arxiv.org/abs/1902.03356",
    ),
    "cavia": (CAVIA, {}, "only context parameters adapt, Zintgraf et al. 2019, arxiv.org/abs/1810.03642"),
    "r2d2": (R2D2, {}, "ridge regression on learned features, Bertinetto et al. 2019, arxiv.org/abs/1805.08136"),
    "protomaml": (
        ProtoMAML,
        {},
        "MAML from a head of class means, Triantafillou et al. 2020, arxiv.org/abs/1903.03096",
    ),
    "protonet": (ProtoNet, {}, "nearest class mean of learned features, Snell et al. 2017, arxiv.org/abs/1703.05175"),
}
"""Name in a job -> class, the options that name sets, one line."""

__all__ = ["INNER_OPTIMIZERS", "LEARNERS", "Context", "Differentiation", "Fast", "InnerOptimizer", "Learner"]
