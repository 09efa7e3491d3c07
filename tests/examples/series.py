"""Daily sales of products in shops: forecast two weeks after four weeks of a series never seen in training.

The logarithm of sales is a level and a slow trend of each series, a weekly pattern, an answer to the weather and to
promotions, and noise that lasts some days. How strongly a series has each of them is its own; their shapes (which days,
from what temperature on, how a promotion adds to a weekend) are the same for all: that is what there is to meta-learn.

    python -m tests.examples.series sales.csv          # 1,000 series of 180 days
"""

import csv
import datetime
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from metadist import Draws, Learner, Task, TaskId

SERIES, DAYS = 1000, 180
WEEK = np.array([[-0.3, -0.2, -0.1, 0.0, 0.3, 0.7, -0.4], [0.2, 0.2, 0.1, 0.1, 0.0, -0.5, -0.6]])  # leisure, offices
COLUMNS = ["series", "date", "day", *(f"dow{n}" for n in range(7)), "temperature", "promotion", "price", "log_sales"]


def rows(number: int) -> Iterator[list]:
    """The days of a series."""
    draws = Draws(0, TaskId("train", 0, number), stream=7)
    level, trend, leisure, office, weather, offer = draws.normal(6) * [0.8, 0.3, 0.6, 0.3, 0.4, 0.3] + [
        3,
        0,
        1,
        0.5,
        0.6,
        0.6,
    ]
    first, climate, lasting = datetime.date(2024, 1, 1), 3 * draws.normal(1)[0], 0.0
    steps, chance, shocks, noise = draws.normal(DAYS), draws.uniform(DAYS), draws.normal(DAYS), draws.normal(DAYS)
    drift = 0.0
    for day in range(DAYS):
        drift = 0.8 * drift + 2 * steps[day]
        temperature = 10 + climate - 12 * math.cos(2 * math.pi * (day + 20) / 365) + drift
        weekday = (first + datetime.timedelta(day)).weekday()
        promotion = float(chance[day] < 0.15)
        price = 1.0 - 0.2 * promotion * (0.5 + chance[day] / 0.15)
        lasting = 0.6 * lasting + 0.08 * shocks[day]
        sales = level + trend * day / DAYS + leisure * WEEK[0, weekday] + office * WEEK[1, weekday]
        sales += weather * math.tanh(max(0.0, temperature - 14) / 6) - 0.3 * math.tanh(max(0.0, temperature - 26) / 3)
        sales += offer * promotion * (1 + 0.8 * (weekday >= 5)) + lasting + 0.1 * noise[day]
        week = [float(weekday == n) for n in range(7)]
        date = first + datetime.timedelta(day)
        yield [
            f"s{number}",
            date.isoformat(),
            day,
            *week,
            round(temperature, 2),
            promotion,
            round(price, 3),
            round(sales, 4),
        ]


def last_value(task: Task) -> np.ndarray:
    """The forecast that nothing changes: the last day's value [n, 1]. Of tasks in windows of time."""
    return np.repeat(task.support.targets[0][-1:].reshape(1, -1), len(task.query.inputs[0]), axis=0)


def seasonal(task: Task) -> np.ndarray:
    """The mean of the same weekday in the history [n, 1]."""
    history, days = task.support.targets[0].reshape(-1, 1), len(task.query.inputs[0])
    weekdays = (np.arange(len(history) + days)) % 7
    return np.stack(
        [history[weekdays[: len(history)] == weekdays[len(history) + day]].mean(axis=0) for day in range(days)]
    )


def forecast(learner: Learner, theta, fasts, task: Task) -> Figure:
    """A series' history, what came then, and what the learner and the seasonal mean say would come."""
    arrays = Task(*(part._replace(targets=tuple(y.numpy() for y in part.targets)) for part in task))
    history, then = (part.targets[0].reshape(-1) for part in arrays)
    days = np.arange(len(history) + len(then))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="day", ylabel="sales, logarithm, standardized", title="One series")
    axes.plot(days, np.concatenate([history, then]), "k.-", label="sales")
    axes.axvline(len(history) - 0.5, color="grey", linewidth=0.8)
    outputs = learner.predict(theta, fasts[-1], task.query.inputs).detach().numpy()
    for name, values in (("seasonal mean", seasonal(arrays)), ("meta-learned", outputs)):
        axes.plot(days[len(history) :], values.reshape(-1), label=name)
    axes.legend()
    return figure


def write_sales(path: str | Path, series: int = SERIES) -> None:
    """The days of some series as a CSV file."""
    with open(path, "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(COLUMNS)
        writer.writerows(row for number in range(series) for row in rows(number))


if __name__ == "__main__":
    write_sales(sys.argv[1])
