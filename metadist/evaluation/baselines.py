"""What a meta-learner must beat on the same task: simple learners that see only its support set."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from metadist.core.errors import InputError
from metadist.core.task import Task
from metadist.data.shapes import is_text
from metadist.learners import Learner

Baseline = Callable[[Task], np.ndarray]
RIDGE = 1.0


def features(inputs: tuple[np.ndarray, ...]) -> np.ndarray:
    """Raw features [n, d], float64: token fields with their mask as bags of words of unit length, others flattened."""
    first = inputs[0]
    if is_text(inputs):
        words, place = np.unique(first, return_inverse=True)
        bag = np.zeros((len(first), len(words)))
        np.add.at(bag, (np.arange(len(first))[:, None], place.reshape(first.shape)), inputs[1])
        return bag / np.maximum(np.linalg.norm(bag, axis=1, keepdims=True), 1e-12)
    return np.concatenate([x.reshape(len(x), -1).astype(np.float64) for x in inputs], axis=1)


def _both(task: Task) -> tuple[np.ndarray, np.ndarray]:
    joined = features(tuple(np.concatenate(pair) for pair in zip(task.support.inputs, task.query.inputs, strict=True)))
    cut = len(task.support.inputs[0])
    return joined[:cut], joined[cut:]


def nearest_class_mean(task: Task) -> np.ndarray:
    """Logits [n, N]: minus the squared distance of raw features to each class's support mean; lowest for a class that
    has no support examples, where labels have gaps."""
    support, query = _both(task)
    labels, asked = (part.targets[0].astype(np.int64) for part in task)
    logits = np.full((len(query), max(labels.max(), asked.max()) + 1), np.finfo(np.float64).min / 2)
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


CLOSED_FORM: dict[str, Baseline] = {
    "nearest_class_mean": nearest_class_mean,
    "support_mean": support_mean,
    "ridge": ridge,
}


def choose_baselines(asked: Sequence[str] | None, classification: bool, known_loss: bool) -> list[str]:
    """The baselines of an evaluation: those asked for, else those that suit the kind of task.

    `known_loss`: the loss is metadist's own; by another one regression may mean something else by outputs and targets.
    Raises InputError where one asked for does not suit.
    """
    suited = ["nearest_class_mean"] if classification else ["support_mean", "ridge", "joint"]
    suited.append("from_scratch")
    if asked is None:
        return suited if classification or known_loss else []
    unfit = [name for name in asked if name not in (*suited, "joint")]
    if unfit:
        kind = "classification" if classification else "regression"
        raise InputError(f"evaluation.baselines: {unfit[0]} does not suit {kind}; take of {', '.join(suited)}")
    return list(asked)


def from_scratch(learner: Learner, task: Task, steps: int, lr: float) -> dict[str, Tensor]:
    """Weights of the model trained on the support set alone, from its own initial ones, by `steps` of Adam. `task`
    holds tensors."""
    model, device = learner.model, task.support.inputs[0].device
    weights = {name: value.clone().to(device).requires_grad_() for name, value in model.parameters.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=lr, foreach=False)
    for _ in range(steps):
        optimizer.zero_grad()
        with model.in_place():
            learner.loss(model(weights, *task.support.inputs), *task.support.targets).backward()
        optimizer.step()
    return {name: value.detach() for name, value in weights.items()}


def _flat(targets: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.concatenate([y.reshape(len(y), -1).astype(np.float64) for y in targets], axis=1)
