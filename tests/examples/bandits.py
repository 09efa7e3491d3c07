"""Contextual bandits from logs: two sources that know the truth, what a learner must beat on them, a table of logs.

`Users`: every user has reward weights of its own, drawn from a prior that all share; what is best for a user given its
logs is known exactly (`bayes`). `Classes`: classes of a data set are arms, the right one pays 1 (Dudik et al. 2011).
A task is a user with support rounds to adapt on and query rounds to judge on; its targets are action, propensity,
reward, and the expected rewards of all arms, at which no loss looks.

    python -m tests.examples.bandits logs.csv          # the logs of 1,500 users, without the truth
"""

import csv
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from metadist import MAML, Draws, Examples, Task, TaskId
from metadist.data import ClassSource, cached, open_dataset

ARMS, FEATURES, TRAITS = 5, 4, 3
NOISE = 1.0
LEAST = 0.04  # with which the logging policy takes every arm
RIDGE, TOWARDS, INTERCEPT, DRAWN = 1.0, 2.0, 5.0, 10.0  # penalties of the baselines: the best on validation
GAMMA, PENALTY = 1.0, 0.1  # of kernel ridge on digits, chosen in the same way
TRAINING = 400  # users that the pooled baselines and empirical Bayes are fitted to
ITERATIONS = 100  # of EM


class Linear(torch.nn.Module):
    """Contexts [n, ...] -> estimated rewards [n, A], linear, its weights one vector: so Meta-Curvature learns what all
    of them have to do with one another."""

    def __init__(self, features: int = FEATURES, arms: int = ARMS):
        super().__init__()
        self.features, self.arms = features, arms
        self.weights = torch.nn.Parameter(torch.zeros((features + 1) * arms))

    def forward(self, x):
        weights = self.weights.reshape(self.features + 1, self.arms)
        return x.flatten(1) @ weights[1:] + weights[0]


@cache
def family() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What all users share: mean weights [A, d], what each trait adds to them [traits, A, d], and the weights [A, d] of
    the logging policy; d features, the first of which is 1."""
    draws, size = Draws(0, TaskId("train", 0, 0), stream=7), (ARMS, FEATURES + 1)
    count = ARMS * (FEATURES + 1)
    mean = 0.3 * draws.normal(count).reshape(size)
    traits = 0.4 * draws.normal(TRAITS * count).reshape(TRAITS, *size)
    return mean, traits, draws.normal(count).reshape(size)


def with_one(x: np.ndarray) -> np.ndarray:
    """Contexts [n, ...] as features [n, d], the first of which is 1."""
    return np.concatenate([np.ones((len(x), 1)), x.reshape(len(x), -1)], axis=1)


def logged(draws: Draws, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Actions [n] and their propensities [n] of the softmax policy with these logits [n, A], which takes every arm with
    a probability of `LEAST` at least."""
    soft = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances = LEAST + (1 - LEAST * logits.shape[1]) * soft / soft.sum(axis=1, keepdims=True)
    drawn = draws.uniform(len(logits))[:, None]
    action = np.minimum((drawn > chances.cumsum(axis=1)).sum(axis=1), logits.shape[1] - 1)
    return action.astype(np.int64), np.take_along_axis(chances, action[:, None], axis=1)[:, 0]


def part_of(x, action: np.ndarray, *values: np.ndarray) -> Examples:
    """Rounds as a support or query set: inputs x, targets action, propensity, reward and expected rewards."""
    return Examples(x if isinstance(x, tuple) else (x,), (action, *(each.astype(np.float32) for each in values)))


class Users:
    """Users of a family: reward = (mean + sum_k z_k trait_k)[action] . (1, x) + noise, z and x standard normal."""

    outputs = ARMS

    def __init__(self, seed: int, shots: int = 20, queries: int = 40):
        self.seed, self.shots, self.queries = seed, shots, queries

    def __call__(self, task_id: TaskId) -> Task:
        draws, n, (mean, traits, policy) = Draws(self.seed, task_id), self.shots + self.queries, family()
        weights = mean + np.tensordot(draws.normal(TRAITS), traits, axes=1)
        x = draws.normal(n * FEATURES).reshape(n, FEATURES)
        truth = with_one(x) @ weights.T
        action, propensity = logged(draws, with_one(x) @ policy.T)
        reward = truth[np.arange(n), action] + NOISE * draws.normal(n)
        columns, parts = (x.astype(np.float32), action, propensity, reward, truth), np.split(np.arange(n), [self.shots])
        return Task(*(part_of(*(column[rows] for column in columns)) for rows in parts))


class Classes:
    """Classes of a data set as arms: in each task some are drawn, in random order; taking the right one pays 1. The
    logging policy leans to the right arm and to arms that it likes, other ones in each task."""

    def __init__(
        self,
        seed: int,
        family: str = "digits",
        path: str | None = None,
        ways: int = 3,
        shots: int = 8,
        queries: int = 15,
    ):
        dataset = open_dataset(path or cached(family, {}, True))
        self.seed, self.outputs = seed, ways
        self.labelled = ClassSource(dataset.splits, shots=shots, queries=queries, seed=seed, ways=ways)

    def __call__(self, task_id: TaskId) -> Task:
        draws = Draws(self.seed, task_id, stream=9)
        liking = draws.normal(self.outputs)
        return Task(*(self.logged(draws, liking, part) for part in self.labelled(task_id)))

    def logged(self, draws: Draws, liking: np.ndarray, part: Examples) -> Examples:
        truth = np.eye(self.outputs)[part.targets[0]]
        action, propensity = logged(draws, liking + truth)
        return part_of(part.inputs, action, propensity, truth[np.arange(len(action)), action], truth)


def rounds(part) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [n, d], actions [n] and rewards [n] of a support or query set."""
    return with_one(part.inputs[0].astype(np.float64)), part.targets[0], part.targets[2].astype(np.float64)


def truth(task: Task) -> np.ndarray:
    """The expected rewards of the query rounds [n, A], which only a benchmark knows."""
    return task.query.targets[3]


def bayes(task: Task) -> np.ndarray:
    """Expected rewards [n, A] given the support rounds, exactly: of `Users`, a Gaussian posterior of the traits."""
    (mean, traits, _), (x, action, reward) = family(), rounds(task.support)
    design = np.einsum("knd,nd->nk", traits[:, action], x)
    left = reward - (mean[action] * x).sum(axis=1)
    z = np.linalg.solve(design.T @ design + NOISE**2 * np.eye(TRAITS), design.T @ left)
    return rounds(task.query)[0] @ (mean + np.tensordot(z, traits, axes=1)).T


def fitted(x: np.ndarray, action: np.ndarray, reward: np.ndarray, arms: int, penalty: float) -> np.ndarray:
    """Ridge regression of each arm's rewards on its rounds, weights [A, d]; the intercept is penalised too."""
    weights = np.zeros((arms, x.shape[1]))
    for arm in range(arms):
        mine = x[action == arm]
        weights[arm] = mine.T @ np.linalg.solve(mine @ mine.T + penalty * np.eye(len(mine)), reward[action == arm])
    return weights


def ridge_per_user(task: Task) -> np.ndarray:
    """Per-user ridge: each arm's rewards by the user's own rounds alone."""
    return rounds(task.query)[0] @ fitted(*rounds(task.support), arms_of(task), RIDGE).T


def arms_of(task: Task) -> int:
    """Arms of a task that comes with the rewards of all; of logs alone it is not known, and `ARMS` is taken."""
    return task.query.targets[3].shape[1] if len(task.query.targets) > 3 else ARMS


def kernel_ridge(task: Task) -> np.ndarray:
    """Ridge regression with a Gaussian kernel, around a reward of 1/A: each arm's rewards by the user's own rounds."""
    (x, action, reward), asked, arms = rounds(task.support), rounds(task.query)[0], arms_of(task)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-GAMMA * np.square(a[:, None] - b[None]).sum(axis=2))

    found = np.full((len(asked), arms), 1 / arms)
    for arm in range(arms):
        mine, left = x[action == arm], reward[action == arm] - 1 / arms
        found[:, arm] += kernel(asked, mine) @ np.linalg.solve(kernel(mine, mine) + PENALTY * np.eye(len(mine)), left)
    return found


@cache
def training_users() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All logged rounds of each training user, generated for the baselines that are fitted to many users."""
    tasks = [Users(0)(TaskId("train", 0, number)) for number in range(TRAINING)]
    both = [(rounds(task.support), rounds(task.query)) for task in tasks]
    return [(np.concatenate([s[0], q[0]]), np.append(s[1], q[1]), np.append(s[2], q[2])) for s, q in both]


@cache
def pooled_weights() -> np.ndarray:
    """Ridge regression of each arm's rewards on the rounds of training users [A, d]."""
    x, action, reward = (np.concatenate(each) for each in zip(*training_users(), strict=True))
    return fitted(x, action, reward, ARMS, 1e-3)


def pooled_ridge(task: Task) -> np.ndarray:
    """One ridge regression for all users."""
    return rounds(task.query)[0] @ pooled_weights().T


def pooled_with_intercept(task: Task) -> np.ndarray:
    """The same, and for each arm an intercept of the user's own, shrunk to 0."""
    x, action, reward = rounds(task.support)
    left = reward - (pooled_weights()[action] * x).sum(axis=1)
    taken = np.bincount(action, minlength=ARMS)
    return pooled_ridge(task) + np.bincount(action, left, minlength=ARMS) / (taken + INTERCEPT)


def ridge_towards_pooled(task: Task) -> np.ndarray:
    """Per-user ridge whose penalty is on the difference to pooled ridge: what the user's rounds do not say, all say."""
    x, action, reward = rounds(task.support)
    left = reward - (pooled_weights()[action] * x).sum(axis=1)
    return pooled_ridge(task) + rounds(task.query)[0] @ fitted(x, action, left, ARMS, TOWARDS).T


class Prior(NamedTuple):
    """What users have in common: mean [A * d] and covariance [A * d, A * d] of their weights, the noise's variance."""

    mean: np.ndarray
    covariance: np.ndarray
    noise: float


def one_hot(x: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Rounds as rows [n, A * d] of the regression on all arms' weights: the features in the place of the arm taken."""
    return (np.eye(ARMS)[action][:, :, None] * x[:, None]).reshape(len(x), -1)


def posterior(prior: Prior, rows: np.ndarray, reward: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [..., A * d] and covariance of the weights given rewards [..., n] of rounds [..., n, A * d]."""
    across = rows.swapaxes(-1, -2) / prior.noise
    precision = across @ rows
    covariance = np.linalg.solve(np.eye(len(prior.mean)) + prior.covariance @ precision, prior.covariance)
    left = (reward - rows @ prior.mean)[..., None]
    return prior.mean + (covariance @ (across @ left))[..., 0], covariance


@cache
def fitted_prior() -> Prior:
    """The prior under which the training users' logs are likeliest, by EM (Laird and Ware 1982, section 4)."""
    x, action, reward = map(np.stack, zip(*training_users(), strict=True))
    rows = np.stack([one_hot(*each) for each in zip(x, action, strict=True)])
    prior = Prior(np.zeros(rows.shape[2]), np.eye(rows.shape[2]), 1.0)
    for _ in range(ITERATIONS):
        means, covariances = posterior(prior, rows, reward)
        mean = means.mean(axis=0)
        spread = covariances.mean(axis=0) + (means - mean).T @ (means - mean) / len(means)
        errors = np.square(reward - (rows @ means[..., None])[..., 0]) + ((rows @ covariances) * rows).sum(axis=2)
        prior = Prior(mean, spread, float(errors.mean()))
    return prior


def empirical_bayes(task: Task) -> np.ndarray:
    """Hierarchical linear model: the posterior mean of the user's weights under the prior fitted to training users."""
    x, action, reward = rounds(task.support)
    weights, _ = posterior(fitted_prior(), one_hot(x, action), reward)
    return rounds(task.query)[0] @ weights.reshape(ARMS, -1).T


def thompson(task: Task) -> np.ndarray:
    """Thompson sampling: one draw of each arm's weights from their posterior given the user's rounds, under a Gaussian
    prior around pooled ridge. Arms are played by the draw, so this still explores."""
    (x, action, reward), prior = rounds(task.support), pooled_weights()
    draws = Draws(0, TaskId("test", 0, int(np.abs(task.query.inputs[0]).sum() * 2**20)), stream=8)
    weights = np.empty_like(prior)
    for arm in range(ARMS):
        mine = x[action == arm]
        precision = mine.T @ mine + DRAWN * np.eye(x.shape[1])
        mean = prior[arm] + np.linalg.solve(precision, mine.T @ (reward[action == arm] - mine @ prior[arm]))
        root = np.linalg.cholesky(np.linalg.inv(precision))
        weights[arm] = mean + NOISE * root @ draws.normal(x.shape[1])
    return rounds(task.query)[0] @ weights.T


def regret(learner: MAML, theta, fasts, task: Task) -> Figure:
    """What is lost over the query rounds of a task against the best arm: by the logging policy, by per-user ridge, by
    the learner before and after its inner steps, and for `Users` by exact Bayes."""
    arrays = Task(*(Examples(*(tuple(each.numpy() for each in group) for group in part)) for part in task))
    rewards = truth(arrays)
    taken = {"logging policy": arrays.query.targets[0], "ridge per user": ridge_per_user(arrays).argmax(axis=1)}
    for name, fast in (("before adaptation", fasts[0]), ("after adaptation", fasts[-1])):
        taken[name] = learner.predict(theta, fast, task.query.inputs).argmax(dim=1).numpy()
    if rewards.shape[1] == ARMS and arrays.query.inputs[0].shape[1:] == (FEATURES,):
        taken["exact Bayes"] = bayes(arrays).argmax(axis=1)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="round", ylabel="cumulative regret", title="One user's rounds")
    for name, arms in taken.items():
        lost = rewards.max(axis=1) - rewards[np.arange(len(arms)), arms]
        axes.plot(np.arange(1, len(lost) + 1), lost.cumsum(), "--" if name == "exact Bayes" else "-", label=name)
    axes.legend()
    return figure


def round_values(scores: np.ndarray, part: Examples) -> np.ndarray:
    """What each logged round says that the policy is worth which takes the arm of the largest score [n, A], doubly
    robust with the scores as reward estimates [n]; their mean is `greedy_doubly_robust`."""
    rows, (action, propensity, reward) = np.arange(len(scores)), part.targets[:3]
    best = scores.argmax(axis=1)
    return scores[rows, best] + (best == action) / propensity * (reward - scores[rows, action])


def values(learner: MAML, theta, fasts, task: Task) -> Figure:
    """What the logged query rounds of a user say that policies are worth, doubly robust, with 95 % intervals over
    rounds; the line is what the logging policy earned in them. Beside it how often each arm is taken."""
    arrays = task.map(lambda value: value.numpy())
    scores = {each.__name__.replace("_", " "): each(arrays) for each in (ridge_per_user, empirical_bayes)}
    for name, fast in (("before adaptation", fasts[0]), ("after adaptation", fasts[-1])):
        scores[name] = learner.predict(theta, fast, task.query.inputs).detach().numpy()
    found = {"logging policy": arrays.query.targets[2]}
    found |= {name: round_values(each, arrays.query) for name, each in scores.items()}
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, rewards in enumerate(found.values()):
        half = 1.96 * rewards.std(ddof=1) / len(rewards) ** 0.5
        left.errorbar(rewards.mean(), place, xerr=half, fmt="o", capsize=4, color=f"C{place}")
    left.axvline(found["logging policy"].mean(), color="grey", linewidth=1)
    left.set_yticks(range(len(found)), list(found))
    left.invert_yaxis()
    left.set(xlabel="reward a round, 95 % interval", title=f"One user's {len(arrays.query.targets[0])} judged rounds")
    taken = {"logging policy": arrays.query.targets[0], "after adaptation": scores["after adaptation"].argmax(axis=1)}
    for offset, (name, arms) in zip((-0.2, 0.2), taken.items(), strict=True):
        counts = np.bincount(arms, minlength=ARMS)
        right.bar(np.arange(ARMS) + offset, counts, 0.4, label=name, color=f"C{list(found).index(name)}")
    right.set(xlabel="arm", ylabel="rounds in which it is taken", xticks=range(ARMS))
    right.margins(y=0.3)  # room for the legend
    right.legend()
    return figure


def write_logs(path: str | Path, users: int = 1500) -> None:
    """The logs of some users as a CSV file: user, x1, ..., action, propensity, reward."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", *(f"x{i + 1}" for i in range(FEATURES)), "action", "propensity", "reward"])
        for number in range(users):
            for part in Users(1)(TaskId("train", 0, number)):
                for row in zip(*part.inputs[0].T, *part.targets[:3], strict=True):
                    writer.writerow([f"u{number}", *(f"{value:.6g}" for value in row)])


if __name__ == "__main__":
    write_logs(sys.argv[1])
