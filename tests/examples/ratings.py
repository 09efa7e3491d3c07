"""Ratings of items by users: after ten ratings of a new user, what does it give to other items?

A rating is 3, what the item has (its quality) and the user (its mood), the product of their traits, and noise, cut
to 1 to 5 and rounded to halves. Items are the same for all users, so that their traits are there to be learned. Users
rate what they know: items are drawn by popularity.

    python -m tests.examples.ratings ratings.csv          # 60 ratings each of 1,500 users
"""

import csv
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from metadist import Draws, Learner, Task, TaskId
from metadist.data import open_dataset

USERS, ITEMS, TRAITS, EACH = 1500, 300, 4, 60
DATA = "data/ratings"  # where the job's head has it imported to
SHRINKAGE, PENALTY, OWN_PENALTY, ROUNDS, RANK = 5.0, 0.5, 0.3, 10, 4  # of the baselines: the best on validation


@cache
def items() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quality [items], traits [items, TRAITS] and the sum of popularities up to each item [items]."""
    draws = Draws(0, TaskId("train", 0, 0), stream=7)
    popularity = 1 / (10 + np.arange(ITEMS))
    traits = 0.45 * draws.normal(ITEMS * TRAITS).reshape(ITEMS, TRAITS)
    return 0.4 * draws.normal(ITEMS), traits, np.cumsum(popularity / popularity.sum())


def rows(number: int) -> Iterator[list]:
    """The ratings of a user, of different items."""
    draws, (quality, traits, popular) = Draws(0, TaskId("train", 1, number), stream=7), items()
    mood, own = 0.4 * draws.normal(1)[0], draws.normal(TRAITS)
    drawn = dict.fromkeys(np.minimum(np.searchsorted(popular, draws.uniform(8 * EACH)), ITEMS - 1).tolist())
    noise = 0.4 * draws.normal(EACH)
    for item, error in zip(list(drawn)[:EACH], noise, strict=False):
        rating = 3 + quality[item] + mood + traits[item] @ own + error
        yield [f"u{number}", f"i{item}", round(2 * min(5.0, max(1.0, rating))) / 2]


@cache
def training() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, item numbers and ratings of the training split [n] each, as a task has them."""
    table = open_dataset(DATA).splits["train"]
    inputs, targets = table.gather(np.arange(table.num_rows))
    return np.arange(len(table.counts)).repeat(table.counts), inputs[0], targets[0].reshape(-1).astype(np.float64)


@cache
def item_offsets() -> np.ndarray:
    """What each item is given above the mean of its users, shrunk to 0 [items + 1]."""
    users, numbers, ratings = training()
    means = np.bincount(users, ratings) / np.bincount(users)
    size = numbers.max() + 1
    return np.bincount(numbers, ratings - means[users], size) / (np.bincount(numbers, minlength=size) + SHRINKAGE)


def item_mean(task: Task) -> np.ndarray:
    """What an item is given by all, and an offset of the user's own [n, 1]."""
    offsets = item_offsets()
    (mine, asked), ratings = (part.inputs[0] for part in task), task.support.targets[0].reshape(-1)
    return (offsets[asked] + (ratings - offsets[mine]).mean())[:, None]


@cache
def factors() -> np.ndarray:
    """Traits of items [items + 1, RANK] by matrix factorization (alternating least squares) of what is left in training
    of the means of users and the offsets of items."""
    users, numbers, ratings = training()
    means, size = np.bincount(users, ratings) / np.bincount(users), int(numbers.max()) + 1
    left = ratings - means[users] - item_offsets()[numbers]
    found = {0: np.random.default_rng(0).normal(size=(size, RANK)) * 0.1}
    for _ in range(ROUNDS):
        found[1] = _solved(users, found[0][numbers], left, int(users.max()) + 1)
        found[0] = _solved(numbers, found[1][users], left, size)
    return found[0]


def _solved(rows: np.ndarray, design: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Ridge regression of the values of each row [count, RANK]."""
    gram, moment = np.zeros((count, RANK, RANK)), np.zeros((count, RANK))
    np.add.at(gram, rows, design[:, :, None] * design[:, None, :])
    np.add.at(moment, rows, design * values[:, None])
    return np.linalg.solve(gram + PENALTY * np.eye(RANK), moment[..., None])[..., 0]


def matrix_factorization(task: Task) -> np.ndarray:
    """Items' traits of training, and a ridge regression on them of the user's own ratings [n, 1]."""
    (mine, asked), ratings = (part.inputs[0] for part in task), task.support.targets[0].reshape(-1)
    base, traits = item_mean(task), factors()
    offset = (ratings - item_offsets()[mine]).mean()
    left = ratings - item_offsets()[mine] - offset
    own = np.linalg.solve(traits[mine].T @ traits[mine] + OWN_PENALTY * np.eye(RANK), traits[mine].T @ left)
    return base + (traits[asked] @ own)[:, None]


def ratings(learner: Learner, theta, fasts, task: Task) -> Figure:
    """What a user gave to other items against what was expected: from all users alone, and after its own ratings."""
    arrays = Task(
        *(part._replace(inputs=(part.inputs[0].numpy(),), targets=(part.targets[0].numpy(),)) for part in task)
    )
    given = arrays.query.targets[0].reshape(-1)
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="rating, standardized", ylabel="expected", title="One user's other items")
    outputs = learner.predict(theta, fasts[-1], task.query.inputs).detach().numpy()
    for name, values in (("mean of the item, offset of the user", item_mean(arrays)), ("meta-learned", outputs)):
        axes.plot(given, values.reshape(-1), "o", alpha=0.6, label=name)
    axes.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    axes.legend()
    return figure


def write_ratings(path: str | Path, users: int = USERS) -> None:
    """The ratings of some users as a CSV file."""
    with open(path, "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["user", "item", "rating"])
        writer.writerows(row for number in range(users) for row in rows(number))


if __name__ == "__main__":
    write_ratings(sys.argv[1])
