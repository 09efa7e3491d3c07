"""What to try where a learner is not ahead of its best baseline: a table of rules on a run's own numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from metadist.core.measure import ACCURACY, Measure

MOST = 3
"""Pieces of advice given at once."""
UNLIKE = 50
"""How many times the smallest deviation of an input column the largest column may be."""
LARGE = 10
"""How large, in the root of its mean square, a column may be beside the weights of a new network."""
RISING = 0.05
"""The part of all that adaptation gains, from which a last step that gains so much is not the end of it."""
FEW = 50
"""Classes (groups, where one is the task) in training, below which there is little to meta-learn from."""
SHORT = 300
"""Meta-steps below which a run says little of what meta-learning can do."""
FITTED_TO_ALL = {"pooled": "one model of all training rows", "joint": "one network of all tasks, fine-tuned on each"}
OWN = "a model fitted to each task's own examples"
"""What a baseline is to one who would use it: one of `FITTED_TO_ALL`, else `OWN`."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A run's numbers, in the unit of what it is judged by, the `measure`.

    baseline: the best one. curve, ci95: the mean before and after each inner step, and the interval after the last.
    validation: (meta-step, mean, half-width of its interval) of each, in order. inner_lr: of evaluation; None where
    there is none to set. smaller_rates: settings of training by which inner rates are smaller, "" where there are none.
    descends: whether adaptation takes inner steps. closed_form: settings that name a learner of a closed form which the
    run's model allows, "" where there is none. groups: of training (classes, where tasks are made of these); None where
    that is not known. columns: of the inputs, the smallest deviation and the largest root of a mean square; None for
    other inputs than numbers. pictures: whether inputs are imported pictures. pooled: how the learner stands to that
    baseline, "" where it was not computed. evaluate, train, resume: commands that take settings.
    """

    measure: Measure
    baseline: str
    curve: Sequence[float]
    ci95: float
    validation: Sequence[tuple[int, float, float]] = ()
    meta_steps: int = 1
    inner_lr: float | None = None
    smaller_rates: str = ""
    descends: bool = True
    closed_form: str = ""
    groups: int | None = None
    columns: tuple[float, float] | None = None
    pictures: bool = False
    pooled: str = ""
    evaluate: str = "metadist evaluate RUN"
    train: str = "metadist train RUN/config.yaml run_dir=ANOTHER"
    resume: str = "metadist train RUN/config.yaml --resume auto"

    @property
    def simpler(self) -> str:
        """The best baseline as what one can use instead, by its name where that says what it is."""
        if self.baseline == "from_scratch":
            return OWN
        return FITTED_TO_ALL.get(self.baseline, self.baseline.replace("_", " "))

    def gains(self, values: Sequence[float]) -> list[float]:
        """Means of the measure, so that higher is better."""
        return [self.measure.sign * value for value in values]


def advise(facts: Facts) -> list[str]:
    """Sentences without their stop, each with what to type, the most telling first; where no rule applies, what can be
    tried that is not in the numbers, and of a run that was long enough that meta-learning may be the wrong tool."""
    found = [text for rule in RULES if (text := rule(facts))]
    return found[:MOST] or [_beyond_the_numbers(facts)]


def _beyond_the_numbers(facts: Facts) -> str:
    done, values = facts.meta_steps, facts.gains([mean for _, mean, _ in facts.validation])
    if facts.validation:
        done = facts.validation[-1][0]
    others = [f"more classes or groups in training{'' if facts.groups is None else f' (now {facts.groups})'}"]
    others += ["another learner (`metadist learners`)"]
    others += ["larger pictures (`--size` at import)"] * facts.pictures
    other = f"{', '.join(others[:-1])} or {others[-1]}"
    improving = len(values) > 1 and values[-1] >= max(values)
    if done < SHORT or improving:
        why = f"training was short ({done} meta-steps)" if done < SHORT else "the last validation was the best one"
        more = f"`{facts.resume} meta_steps={3 * facts.meta_steps}`"
        return f"{why}: go on, {more}; what its numbers do not tell, but can be tried: {other}"
    return (
        f"meta-learning may be the wrong tool for these tasks: {facts.simpler} does as well, and "
        f"nothing in this run's numbers says what would change that; what they do not tell, but can be tried: {other}"
    )


def scaling(facts: Facts) -> str:
    """Columns of very different sizes: the largest decide every gradient."""
    if facts.columns is None or facts.columns[1] <= min(LARGE, UNLIKE * facts.columns[0]):
        return ""
    smallest, largest = facts.columns
    return (
        f"input columns are large or of very different sizes (a deviation of {smallest:.2g}, values of {largest:.2g}), "
        "and gradient steps follow the largest: import the table again with `--standardize` (in a source of your own, "
        "divide each column by its deviation in training), and train on that"
    )


def one_for_all(facts: Facts) -> str:
    """One model of all training rows that is as good."""
    if facts.pooled not in ("level with", "behind"):
        return ""
    how = "used as it is" if facts.measure == ACCURACY else "shifted by a task's own examples"
    return (
        f"the learner is {facts.pooled} one model of all training rows, {how} (pooled): one model for all may do, "
        "since tasks differ little in what their inputs mean"
    )


def overshooting(facts: Facts) -> str:
    """Adaptation that goes back, or to and fro, by more than the interval."""
    curve = facts.gains(facts.curve)
    best = max(range(len(curve)), key=curve.__getitem__)
    changes = [after - before for before, after in zip(curve, curve[1:], strict=False)]
    large = [change > 0 for change in changes if abs(change) > facts.ci95]
    turns = sum(one != other for one, other in zip(large, large[1:], strict=False))
    if not facts.descends or (curve[best] - curve[-1] <= facts.ci95 and turns < 2):
        return ""
    if best and (turns < 2 or facts.inner_lr is None):
        return (
            f"adaptation is at its best after {best} inner step{'s' * (best != 1)} and worse after {len(changes)}: "
            f"`{facts.evaluate} evaluation.inner_steps={best}`"
        )
    how = "goes to and fro" if turns > 1 else "makes it worse than before"
    if facts.inner_lr is None:
        smaller = f": train with smaller inner rates, `{facts.train} {facts.smaller_rates}`"
        return f"adaptation {how}{smaller if facts.smaller_rates else ''}"
    rate = f"{facts.inner_lr / 10:.3g}"
    return (
        f"adaptation {how}: try a smaller inner rate, `{facts.evaluate} evaluation.inner_lr={rate}`, and if that helps "
        f"train with it, `{facts.train} learner.inner_lr={rate}`"
    )


def unadapted(facts: Facts) -> str:
    """Adaptation that changes no more than the interval."""
    curve, rate = facts.gains(facts.curve), facts.inner_lr
    if not facts.descends or rate is None or len(curve) < 2 or max(curve) - min(curve) > facts.ci95:
        return ""
    return (
        f"{len(curve) - 1} inner steps change the {facts.measure.name} by less than its interval: take larger ones, "
        f"`{facts.train} learner.inner_lr={10 * rate:.3g}`"
    )


def stopping_short(facts: Facts) -> str:
    """Adaptation that still gains at its last step."""
    curve = facts.gains(facts.curve)
    if not facts.descends or len(curve) < 2 or curve[-1] - curve[0] <= facts.ci95:
        return ""
    if curve[-1] - curve[-2] <= RISING * (curve[-1] - curve[0]):
        return ""
    steps = max(5, 2 * (len(curve) - 1))
    return f"adaptation still gains at its last inner step: `{facts.evaluate} evaluation.inner_steps={steps}`"


def unfinished(facts: Facts) -> str:
    """Validation that still rises over the second half of training."""
    if len(facts.validation) < 2:
        return ""
    (first, *_), (last, *_) = facts.validation[(len(facts.validation) - 1) // 2], facts.validation[-1]
    values = facts.gains([mean for _, mean, _ in facts.validation])
    rise = values[-1] - values[(len(values) - 1) // 2]
    if not rise > facts.validation[-1][2] / 2:
        return ""
    unit = f"{100 * rise:.1f} percentage points" if facts.measure == ACCURACY else f"{rise:.3g}"
    return (
        f"validation was still getting better when training ended (by {unit} from step {first} to {last}): go on, "
        f"`{facts.resume} meta_steps={3 * facts.meta_steps}`"
    )


def closed_form(facts: Facts) -> str:
    """A learner by gradient steps, where one in closed form could be had."""
    if not facts.descends or not facts.closed_form:
        return ""
    why = f"{facts.simpler} does better than gradient steps here, or as well"
    if facts.groups is not None and facts.groups < FEW:
        why = f"gradient steps have little to be learned from in {facts.groups} training classes or groups"
    return f"{why}: a learner in closed form needs none, `{facts.train} {facts.closed_form}`"


def few_classes(facts: Facts) -> str:
    """Data of a few classes or groups."""
    if facts.groups is None or facts.groups >= FEW:
        return ""
    return (
        f"training has only {facts.groups} classes or groups: data of more of them would help more than any setting; "
        f"until then use {FITTED_TO_ALL.get(facts.baseline, OWN)}"
    )


RULES: tuple[Callable[[Facts], str], ...] = (
    scaling, one_for_all, overshooting, unadapted, stopping_short, unfinished, closed_form, few_classes
)  # fmt: skip
"""Facts -> advice, or "" where it does not apply."""
