"""Settings that a learner usually begins with, by what the tasks are: those of the papers and of jobs/learners."""

from typing import Any, NamedTuple

from metadist.core.errors import InputError, did_you_mean
from metadist.learners import LEARNERS

Settings = dict[str, dict[str, tuple[Any, str]]]
"""section ("" for none) -> setting -> its value, and the reason for it ("" for none)."""
CLASSES_ONLY, WITHOUT_TEXT = ("protonet", "protomaml"), ("cavia",)


class Rates(NamedTuple):
    """Of gradient descent in the inner loop, in training, and the steps after it."""

    lr: float
    steps: int
    later: int
    what: str


RATES = {
    "conv4": Rates(0.4, 1, 3, "pictures"),
    "bag": Rates(0.05, 5, 10, "texts"),
    "mlp": Rates(0.1, 3, 5, "tables"),
    "values": Rates(0.01, 5, 10, "values"),
}


def learner_settings(name: str, model: str, values: bool, support: int, meta_steps: int) -> Settings:
    """Sections of a job for the learner of that name and a built-in model; `values`: the tasks are regression;
    `support`: examples of a support set. Raises InputError where there is no such learner, or it does not suit."""
    if name not in LEARNERS:
        hint = did_you_mean(name, LEARNERS) or f"; known: {', '.join(LEARNERS)}"
        raise InputError(f"there is no learner {name!r}{hint}")
    if LEARNERS[name][0].measures:
        raise InputError(f"{name} is for environments (jobs/domains), and this data has examples: take maml")
    if values and name in CLASSES_ONLY:
        raise InputError(f"{name} is for classes, and this data has values: take maml, meta_curvature or r2d2")
    if model == "bag" and name in WITHOUT_TEXT:
        raise InputError(f"{name} needs a network with a context, and `bag`, for texts, has none: take anil or maml")
    rates = RATES["values" if values else model]
    own = _OWN.get(name, _by_gradient)(rates, values, support, meta_steps)
    own["learner"] = {"name": (name, LEARNERS[name][2]), **own.get("learner", {})}
    return own


def _by_gradient(rates: Rates, values: bool, support: int, meta_steps: int) -> Settings:
    del values, support, meta_steps
    return {
        "learner": {
            "inner_lr": (rates.lr, f"usual for {rates.what}; lower it where the loss jumps or is not finite"),
            "inner_steps": (rates.steps, "of adaptation, in training"),
        },
        "evaluation": {"inner_steps": (rates.later, "a few more than in training often help, and cost little")},
    }


def _anil(rates: Rates, values: bool, support: int, meta_steps: int) -> Settings:
    own = _by_gradient(rates, values, support, meta_steps)
    own["learner"]["inner_steps"] = (max(3, rates.steps), "of the head alone, which cost little")
    return own


def _maml_plus_plus(rates: Rates, values: bool, support: int, meta_steps: int) -> Settings:
    del values, support
    return {
        "learner": {
            "inner_lr": (rates.lr / 2, "where the learned rates begin"),
            "inner_steps": (max(3, rates.steps), "each has rates and norms of its own"),
            "multi_step_until": (meta_steps * 2 // 5, "meta-steps whose loss is of all inner steps: the first 40 %"),
            "first_order_until": (meta_steps // 10, "meta-steps without second derivatives: the first 10 %"),
        },
        "optimizer": {"schedule": ("cosine", "as in the paper"), "final_lr": (1e-5, "")},
    }


def _meta_sgd(rates: Rates, values: bool, support: int, meta_steps: int) -> Settings:
    del values, support, meta_steps
    return {
        "learner": {
            "inner_steps": (rates.steps, "of adaptation"),
            "lowest_rate": (rates.lr / 2, "where the learned rates begin: at random between these"),
            "highest_rate": (rates.lr * 3 / 2, ""),
        }
    }


def _protomaml(rates: Rates, values: bool, support: int, meta_steps: int) -> Settings:
    return _by_gradient(rates._replace(lr=rates.lr / 4), values, support, meta_steps)


def _protonet(rates: Rates, values: bool, support: int, meta_steps: int) -> Settings:
    del rates, values, support, meta_steps
    return {}


def _r2d2(rates: Rates, values: bool, support: int, meta_steps: int) -> Settings:
    del rates, support, meta_steps
    return {
        "learner": {
            "initial_lambda": (1.0, "the ridge's strength, which is learned from here"),
            "initial_scale": (1.0 if values else 10.0, "of its outputs, learned from here"),
        }
    }


def _cavia(rates: Rates, values: bool, support: int, meta_steps: int) -> Settings:
    del support, meta_steps
    pictures = rates.what == "pictures"
    return {
        "model": {"context": (100 if pictures else 5, "parameters that adapt, as in the paper")},
        "learner": {
            "inner_lr": (10.0 if pictures else 1.0, "high, since only the context moves"),
            "inner_steps": (1 if values else 2, "of adaptation"),
        },
    }


def _imaml(rates: Rates, values: bool, support: int, meta_steps: int) -> Settings:
    del values, support, meta_steps
    return {
        "learner": {
            "inner_lr": (min(0.1, rates.lr), "of the proximal problem"),
            "inner_steps": (16, "so that it is nearly solved"),
            "proximal": (2.0, "how strongly adaptation is held at theta"),
            "solver_steps": (5, "of conjugate gradients"),
            "damping": (1.0, "as in the published code: without it the linear system may be indefinite"),
            "proximal_damping": (10.0, ""),
        }
    }


def _reptile(rates: Rates, values: bool, support: int, meta_steps: int) -> Settings:
    del meta_steps
    adam = {
        "inner_lr": (0.001, "of Adam, as in the paper"),
        "inner_steps": (5, "of adaptation, in training"),
        "inner_batch": (min(10, support), "examples of each inner step"),
        "inner_optimizer": ({"name": "adam", "beta1": 0}, "as in the paper"),
    }
    plain = {"inner_lr": (rates.lr, f"usual for {rates.what}"), "inner_steps": (rates.steps, "of adaptation")}
    return {
        "": {"meta_lr": (1.0, "a whole step towards the mean of the adapted weights, at first")},
        "optimizer": {"name": ("sgd", "Reptile's outer step"), "schedule": ("linear", "from meta_lr to 0")},
        "learner": plain if values else adam,
        "evaluation": {"inner_steps": (rates.later if values else 20, "adaptation is slow: more than in training")},
    }


def _platipus(rates: Rates, values: bool, support: int, meta_steps: int) -> Settings:
    own = _by_gradient(rates, values, support, meta_steps)
    own["learner"]["samples"] = (10, "of the weights, for each task")
    if values:
        own["learner"]["predicts"] = ("values", "")
    return own


_OWN = {
    "anil": _anil, "maml++": _maml_plus_plus, "meta_sgd": _meta_sgd, "protomaml": _protomaml, "protonet": _protonet,
    "r2d2": _r2d2, "cavia": _cavia, "imaml": _imaml, "reptile": _reptile, "platipus": _platipus,
}  # fmt: skip
