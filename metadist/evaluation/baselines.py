"""What a meta-learner must beat on the same task: simple learners of its support set, some with a look at training."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from torch import Tensor

from metadist.core.errors import InputError
from metadist.core.task import Task
from metadist.data.shapes import is_text
from metadist.engine.optimizers import Adam, plain_step
from metadist.learners import Learner

Baseline = Callable[[Task], np.ndarray]
OwnBaseline = Callable[[Task], Any]
"""A user's: outputs [n, ...] for the query set, or, of a learner with measures, {measure: value}."""
RIDGE = 1.0
FITTING_TASKS, FITTING_NUMBERS = 200, 2_000_000
"""What `FITTED` baselines see of training: so many tasks, and of these no more than so many numbers of input."""
MOST_VALUES = 8
"""Of an example's targets, or labels, up to which `pooled` is computed unasked: it grows trees for each."""


def features(inputs: tuple[np.ndarray, ...]) -> np.ndarray:
    """Raw features [n, d], float64: token fields with their mask as bags of words of unit length, others flattened."""
    if is_text(inputs):
        return _unit(_bag(inputs)[1])
    return np.concatenate([x.reshape(len(x), -1).astype(np.float64) for x in inputs], axis=1)


def _bag(inputs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The words (token numbers) of some texts [w], and how often each has them [n, w]."""
    words, place = np.unique(inputs[0], return_inverse=True)
    bag = np.zeros((len(inputs[0]), len(words)))
    np.add.at(bag, (np.arange(len(bag))[:, None], place.reshape(inputs[0].shape)), inputs[1])
    return words, bag


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _joined(task: Task) -> tuple[np.ndarray, ...]:
    """The inputs of the support set, then those of the query set."""
    return tuple(np.concatenate(pair) for pair in zip(task.support.inputs, task.query.inputs, strict=True))


def _both(task: Task) -> tuple[np.ndarray, np.ndarray]:
    joined, cut = features(_joined(task)), len(task.support.inputs[0])
    return joined[:cut], joined[cut:]


def _no_class(task: Task) -> np.ndarray:
    """Logits [n, N] of the queries by which no class is predicted: those of classes with support examples are filled
    in, and where labels have gaps the others stay so low."""
    labels, asked = (part.targets[0].astype(np.int64) for part in task)
    return np.full((len(asked), max(labels.max(), asked.max()) + 1), np.finfo(np.float64).min / 2)


def nearest_class_mean(task: Task) -> np.ndarray:
    """Logits [n, N]: minus the squared distance of raw features to each class's support mean; lowest for a class that
    has no support examples, where labels have gaps."""
    (support, query), labels, logits = _both(task), task.support.targets[0].astype(np.int64), _no_class(task)
    for label in np.unique(labels[labels >= 0]):
        logits[:, label] = -((query - support[labels == label].mean(axis=0)) ** 2).sum(axis=1)
    return logits


def support_mean(task: Task) -> np.ndarray:
    """Values [n, d]: the mean support target, whatever the input."""
    targets = _flat(task.support.targets)
    return np.repeat(targets.mean(axis=0, keepdims=True), len(task.query.inputs[0]), axis=0)


def ridge(task: Task) -> np.ndarray:
    """Values [n, d]: ridge regression on raw features, penalty 1 on the slopes, none on the intercept (dual form)."""
    support, query = _both(task)
    targets = _flat(task.support.targets)
    center, level = support.mean(axis=0), targets.mean(axis=0)
    kernel = (support - center) @ (support - center).T + RIDGE * np.eye(len(support))
    return level + (query - center) @ (support - center).T @ np.linalg.solve(kernel, targets - level)


def logistic_regression(training: Sequence[Task]) -> Baseline:
    """Logistic regression (scikit-learn's, penalty 1) on raw features: each column of numbers divided by its deviation
    in `training`, all pixels of a picture field by one."""
    columns = []
    for field in zip(*(_joined(task) for task in training), strict=True):
        flat = np.concatenate(field).reshape(sum(map(len, field)), -1).astype(np.float64)
        deviation = flat.std(axis=0)
        if field[0].ndim > 2:
            deviation = np.full_like(deviation, np.sqrt(np.square(deviation).mean()))
        columns.append(np.where(deviation > 0, deviation, 1.0))
    scale = np.concatenate(columns)

    def logits(task: Task) -> np.ndarray:
        support, query = _both(task)
        return _logistic(task, support / scale, query / scale)

    return logits


def tfidf_logistic_regression(training: Sequence[Task]) -> Baseline:
    """Logistic regression on words weighted by TF-IDF (scikit-learn's form of it). How many texts have a word is
    counted in `training`, never in the task at hand, of which a learner knows no queries either."""
    present = [np.unique(row[mask]) for task in training for row, mask in zip(*_joined(task), strict=True)]
    known, counts = np.unique(np.concatenate(present), return_counts=True)
    rarest = 1 + np.log(1 + len(present))
    weights = dict(zip(known.tolist(), (rarest - np.log(1 + counts)).tolist(), strict=True))

    def logits(task: Task) -> np.ndarray:
        words, bag = _bag(_joined(task))
        rows, cut = _unit(bag * [weights.get(word, rarest) for word in words.tolist()]), len(task.support.inputs[0])
        return _logistic(task, rows[:cut], rows[cut:])

    return logits


def _logistic(task: Task, support: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Logits [n, N] of a logistic regression fitted to the support set's features [m, d]. Where d is above m it is
    computed in the space of the support set, which changes no solution: a penalised slope lies in it."""
    from sklearn.linear_model import LogisticRegression  # a second that --help need not wait for

    labels, logits = task.support.targets[0].astype(np.int64), _no_class(task)
    present = np.unique(labels[labels >= 0])
    if len(present) == 1:
        logits[:, present] = 0
        return logits
    rows, center = support[labels >= 0], support[labels >= 0].mean(axis=0)
    rows, query = rows - center, query - center
    if rows.shape[1] > len(rows):
        basis, _ = np.linalg.qr(rows.T)
        rows, query = rows @ basis, query @ basis
    fitted = LogisticRegression(max_iter=1000).fit(rows, labels[labels >= 0])
    scores = fitted.decision_function(query)
    logits[:, present] = scores if len(present) > 2 else np.stack([np.zeros_like(scores), scores], axis=1)
    return logits


def pooled(training: Sequence[Task]) -> Baseline:
    """One model of all training groups, gradient-boosted trees (scikit-learn's).

    Of values [n, d]: of what an example's target is above its group's mean, plus an offset that the support set gives:
    the mean of what is left there. Of labels that mean the same in every task, logits [n, N]: of the label, used as it
    is, whatever the support set.
    """
    rows = np.concatenate([features(_joined(task)) for task in training])
    if np.issubdtype(training[0].support.targets[0].dtype, np.integer) and len(training[0].support.targets) == 1:
        return _pooled_labels(rows, np.concatenate([part.targets[0] for task in training for part in task]))
    from sklearn.ensemble import HistGradientBoostingRegressor

    values = [np.concatenate([_flat(part.targets) for part in task]) for task in training]
    above = np.concatenate([each - each.mean(axis=0) for each in values])
    with _one_thread():
        trees = [HistGradientBoostingRegressor(random_state=0).fit(rows, column) for column in above.T]

    def predict(task: Task) -> np.ndarray:
        with _one_thread():
            support, query = (np.stack([each.predict(part) for each in trees], axis=1) for part in _both(task))
        return query + (_flat(task.support.targets) - support).mean(axis=0)

    return predict


def _one_thread() -> AbstractContextManager[Any]:
    """Trees grown and asked by one thread: with more, sums have another order, and workers get in each other's way."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="openmp")


def _pooled_labels(rows: np.ndarray, labels: np.ndarray) -> Baseline:
    """Of features [n, d] of all training tasks and their labels [n], whose rows of no class (-1) are left out."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    with _one_thread():
        trees = HistGradientBoostingClassifier(random_state=0).fit(rows[labels >= 0], labels[labels >= 0])

    def logits(task: Task) -> np.ndarray:
        found = _no_class(task)
        with _one_thread():
            shares = trees.predict_proba(features(task.query.inputs))
        found[:, trees.classes_] = np.log(np.maximum(shares, np.finfo(np.float64).tiny))
        return found

    return logits


CLOSED_FORM: dict[str, Baseline] = {
    "nearest_class_mean": nearest_class_mean,
    "support_mean": support_mean,
    "ridge": ridge,
}
FITTED: dict[str, Callable[[Sequence[Task]], Baseline]] = {
    "logistic_regression": logistic_regression,
    "tfidf_logistic_regression": tfidf_logistic_regression,
    "pooled": pooled,
}
"""What first looks at tasks of the training split."""


def choose_baselines(
    asked: Sequence[str] | None, classification: bool, known_loss: bool, text: bool = False, values: int = 1,
    shared_labels: bool = False, learner: type[Learner] = Learner, own: Collection[str] = (),
) -> list[str]:  # fmt: skip
    """The baselines of an evaluation: those asked for, else those that suit the kind of task.

    `known_loss`: the loss is metadist's own; by another one regression may mean something else by outputs and targets.
    text: of inputs; values: of an example's targets, or its labels; shared_labels: whether these mean the same in every
    task. learner: the kind that is judged; own: names of baselines of the user's. Raises InputError where one asked for
    does not suit.
    """
    if learner.measures:
        return _measured_by_learner(asked, learner, own)
    if asked is None and learner.baselines is not None:
        return list(learner.baselines)
    pooled = [] if text or (classification and not shared_labels) else ["pooled"]
    if classification:
        suited = ["nearest_class_mean", "tfidf_logistic_regression" if text else "logistic_regression", *pooled]
    else:
        suited = ["support_mean", "ridge", *pooled, "joint"]
    suited.append("from_scratch")
    if asked is None:
        chosen = [name for name in suited if name != "pooled" or values <= MOST_VALUES]
        return chosen if classification or known_loss else []
    unfit = [name for name in asked if name not in (*suited, "joint", "initial", *own)]
    if unfit:
        kind = "classification" if classification else "regression"
        if unfit[0] == "pooled":
            needed = (
                "labels that mean the same in every task (task.permute_labels=false, as many ways as there are labels)"
            )
            kind = "texts" if text else f"{kind} without {needed}"
        raise InputError(f"evaluation.baselines: {unfit[0]} does not suit {kind}; take of {', '.join(suited)}")
    return list(asked)


def _measured_by_learner(asked: Sequence[str] | None, learner: type[Learner], own: Collection[str]) -> list[str]:
    """Of a learner that is judged by its own measures, where no model of inputs and targets can be compared."""
    suited = ("initial", "joint")
    if asked is None:
        return list(suited if learner.baselines is None else learner.baselines)
    if unfit := [name for name in asked if name not in (*suited, *own)]:
        raise InputError(
            f"evaluation.baselines: {unfit[0]} predicts targets, and this learner is judged by "
            f"{next(iter(learner.measures))}: take of {', '.join(suited)}, or a function of your own, module:callable"
        )
    return list(asked)


def fitted(name: str, training: Callable[[int], Task]) -> Baseline:
    """The baseline of that name, once it has seen what it may of training; `training` gives task 0, 1, ... of it."""
    if name in CLOSED_FORM:
        return CLOSED_FORM[name]
    tasks = [training(0)]
    size = sum(array.size for part in tasks[0] for array in part.inputs)
    tasks += map(training, range(1, min(FITTING_TASKS, FITTING_NUMBERS // size)))
    return FITTED[name](tasks)


def from_scratch(learner: Learner, task: Task, steps: int, lr: float) -> dict[str, Tensor]:
    """Weights of the model trained on the support set alone, from its own initial ones, by `steps` of Adam. `task`
    holds tensors."""
    model, device = learner.model, task.support.inputs[0].device
    weights = {name: value.clone().to(device).requires_grad_() for name, value in model.parameters.items()}
    optimizer = Adam(weights.values(), lr=lr, foreach=False)
    for _ in range(steps):
        optimizer.zero_grad()
        with model.in_place():
            learner.loss(model(weights, *task.support.inputs), *task.support.targets).backward()
        plain_step(optimizer)
    return {name: value.detach() for name, value in weights.items()}


def _flat(targets: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.concatenate([y.reshape(len(y), -1).astype(np.float64) for y in targets], axis=1)
