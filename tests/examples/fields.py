"""Drawings as fields: from the place of a pixel to its ink, a drawing a task (Tancik et al. 2021,
https://arxiv.org/abs/2012.02189). A source, a metric, baselines and a figure of `jobs/domains/field.yaml`."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from metadist import Draws, Examples, Learner, Task, TaskId
from metadist.data import open_dataset
from metadist.learners import Fast
from metadist.models import SIREN

W0 = 10.0
RATES = {2: 0.002, 50: 0.001, 100: 0.0005, 500: 0.001}  # of Adam, by its steps; chosen on validation tasks, like W0


class Drawings:
    """A drawing of a data set of pictures (`metadist data omniglot`, `letters`, `images`): of some pixels, drawn at
    random, the ink is known, and of all others it is asked. Places are -1..1, down and right; ink 0..1 as the data set
    scales it, the mean of its channels.

    Args:
        seed: of the draws.
        path: directory of the data set.
        known: how many pixels are in the support set.
    """

    outputs = 1

    def __init__(self, seed: int, path: str, known: int = 196):
        self.seed, self.known = seed, known
        self.tables = open_dataset(path).splits

    def __call__(self, task_id: TaskId) -> Task:
        draws, table = Draws(self.seed, task_id), self.tables[task_id.split]
        picture = table.gather(np.array([draws.below(table.num_rows)])).inputs[0][0].mean(axis=0)
        places = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in picture.shape), indexing="ij"), axis=-1)
        places, ink = places.reshape(-1, 2).astype(np.float32), picture.reshape(-1, 1).astype(np.float32)
        order = draws.choose(len(ink), len(ink))
        known, asked = order[: self.known], order[self.known :]
        return Task(Examples((places[known],), (ink[known],)), Examples((places[asked],), (ink[asked],)))


def psnr(outputs: Tensor, ink: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in decibels, of a signal from 0 to 1: -10 log10 of the mean squared error."""
    return -10 * (outputs - ink).square().mean().log10()


def interpolated(task: Task) -> np.ndarray:
    """Linear between the known pixels (over Delaunay's triangles), the nearest one's outside of them."""
    from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator

    (places,), (ink,) = task.support
    asked = task.query.inputs[0]
    between, nearest = (of(places, ink)(asked) for of in (LinearNDInterpolator, NearestNDInterpolator))
    return np.where(np.isnan(between), nearest, between)


def scratch(task: Task, steps: int, rate: float, w0: float = W0, hidden: Sequence[int] = (64, 64, 64)) -> np.ndarray:
    """A SIREN of its own initialisation, after some steps of Adam on the known pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SIREN([[2]], 1, hidden, w0)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    places, ink, asked = map(torch.from_numpy, (task.support.inputs[0], task.support.targets[0], task.query.inputs[0]))
    for _ in range(steps):
        optimizer.zero_grad()
        (network(places) - ink).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return network(asked).numpy()


def _scratch(steps: int) -> Callable[[Task], np.ndarray]:
    return lambda task: scratch(task, steps, RATES[steps])


scratch_2, scratch_50, scratch_100, scratch_500 = map(_scratch, RATES)


def before_and_after(learner: Learner, theta: dict[str, Tensor], fasts: Sequence[Fast], task: Task) -> Figure:
    """What is known of a drawing, the field before the first inner step and after each, and the drawing."""
    places = torch.cat([part.inputs[0] for part in task])
    side = round(len(places) ** 0.5)
    cells = ((places + 1) / 2 * (side - 1)).round().long()

    def picture(ink: Tensor) -> np.ndarray:
        shown = torch.full((side, side), torch.nan)
        shown[tuple(cells[: len(ink)].T)] = ink[:, 0]
        return shown.numpy()

    known, asked = (part.targets[0] for part in task)
    pictures = {"known": picture(known)}
    with torch.no_grad():
        for step, fast in enumerate(fasts):
            pictures[f"after {step} step{'s' * (step > 1)}" if step else "before"] = picture(
                learner.predict(theta, fast, (places,))
            )
    pictures["drawing"] = picture(torch.cat([known, asked]))
    figure = Figure(figsize=(2 * len(pictures), 2.2), layout="constrained")
    for axes, (name, shown) in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures.items(), strict=True):
        axes.imshow(shown, cmap="gray_r", vmin=0, vmax=1)
        axes.set(title=name, xticks=[], yticks=[])
    return figure
