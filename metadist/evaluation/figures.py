"""The two pictures of a run, as PNG files. Colours are Okabe and Ito's, told apart by colour-blind readers too."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metadist.core.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^Dvp*"
_DASHES = ("--", "-.", ":")
_SMOOTHED_FROM = 200


class CurvePoint(NamedTuple):
    """One measurement: the mean over tasks and the half-width of its 95 % interval, in the metric's own unit.

    `inner_steps` is None for a baseline that does not adapt step by step; it is drawn as a horizontal line.
    """

    name: str
    inner_steps: int | None
    mean: float
    half_width: float


def adaptation_curve(rows: Iterable[CurvePoint], title: str, path: Path, metric: str = "accuracy") -> None:
    """Writes a PNG of the metric on query examples against the number of inner steps, one curve a name.

    Accuracies are fractions, shown in per cent. Raises InputError when there is nothing to draw.
    """
    from matplotlib.ticker import MaxNLocator

    curves: dict[str, list[CurvePoint]] = {}
    for row in rows:
        curves.setdefault(row.name, []).append(row)
    if not curves:
        raise InputError(f"There are no results to draw in {path}: evaluate the run first.")
    figure, (axes,) = _figure(width=7.2, heights=(4.5,))
    scale = 100.0 if metric == "accuracy" else 1.0
    steps = sorted({row.inner_steps for points in curves.values() for row in points if row.inner_steps is not None})
    for index, (name, points) in enumerate(curves.items()):
        _draw_curve(axes, name, points, scale, index)
    if steps:
        axes.set_xlim(steps[0] - 0.02 * (steps[-1] - steps[0]) - 0.1, steps[-1] + 0.02 * (steps[-1] - steps[0]) + 0.1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("inner steps")
    axes.set_ylabel("query accuracy (%)" if metric == "accuracy" else f"query {metric}")
    axes.set_title(title, wrap=True)
    figure.legend(loc="outside lower center", ncols=min(3, len(curves)), frameon=False, title="mean, 95 % interval")
    _save(figure, path)


def training_curve(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes a PNG of train loss, validation and throughput over meta-steps, one below the other.

    `metrics` are the rows of `read_metrics`; panels without numbers are left out, the non-finite are not drawn. Raises
    InputError when there is none of `train/loss`, `validation/accuracy`, `validation/loss`, `workers/tasks_per_s`.
    """
    panels = {
        "loss": {"train": _series(metrics, "train/loss"), "validation": _series(metrics, "validation/loss")},
        "validation\naccuracy (%)": {"validation": _series(metrics, "validation/accuracy", scale=100.0)},
        "throughput\n(tasks/s)": {"throughput": _series(metrics, "workers/tasks_per_s")},
    }
    drawn = {label: {name: xy for name, xy in lines.items() if xy[0]} for label, lines in panels.items()}
    drawn = {label: lines for label, lines in drawn.items() if lines}
    if not drawn:
        raise InputError(f"There are no training numbers to draw in {path}: train for at least one step.")
    figure, all_axes = _figure(width=7.2, heights=tuple(1.5 if "tasks" in label else 2.4 for label in drawn))
    for axes, (label, lines) in zip(all_axes, drawn.items(), strict=True):
        for name, (steps, values) in lines.items():
            _draw_series(axes, name, steps, values)
        axes.set_ylabel(label)
        if label == "loss":
            axes.legend(frameon=False)
    if "throughput\n(tasks/s)" in drawn:
        all_axes[-1].set_ylim(bottom=0)
    all_axes[-1].set_xlabel("meta-steps")
    figure.align_ylabels(all_axes)
    _save(figure, path)


def _draw_curve(axes: "Axes", name: str, points: list[CurvePoint], scale: float, index: int) -> None:
    colour = _COLOURS[index % len(_COLOURS)]
    if points[0].inner_steps is None:
        mean, half = points[0].mean * scale, points[0].half_width * scale
        axes.axhline(mean, color=colour, linestyle=_DASHES[index % len(_DASHES)], linewidth=1.5, label=name)
        axes.axhspan(mean - half, mean + half, color=colour, alpha=0.12, linewidth=0)
        return
    points = sorted(points, key=lambda point: point.inner_steps or 0)
    steps = [float(point.inner_steps or 0) for point in points]
    means = [point.mean * scale for point in points]
    low = [mean - point.half_width * scale for mean, point in zip(means, points, strict=True)]
    high = [mean + point.half_width * scale for mean, point in zip(means, points, strict=True)]
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(steps, means, color=colour, marker=_MARKERS[index % len(_MARKERS)], markersize=5, label=name)


def _draw_series(axes: "Axes", name: str, steps: list[float], values: list[float]) -> None:
    """A long noisy series is drawn faintly, with its running mean over 2 % of its points on top."""
    colour = {"train": _COLOURS[0], "validation": _COLOURS[1], "throughput": _COLOURS[2]}[name]
    if len(values) < _SMOOTHED_FROM:
        axes.plot(steps, values, color=colour, marker="o" if len(values) <= 40 else None, markersize=3, label=name)
        return
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    window = len(values) // 50
    means = np.convolve(values, np.full(window, 1 / window), mode="valid")
    axes.plot(
        steps[window // 2 : window // 2 + len(means)],
        means,
        color=colour,
        linewidth=1.6,
        label=f"{name} (mean of {window})",
    )


def _series(metrics: Sequence[Mapping[str, Any]], name: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    """Steps and values, by step; of a step written twice (before and after a resume) the later holds."""
    by_step = {row["step"]: row[name] * scale for row in metrics if name in row}
    finite = sorted((step, value) for step, value in by_step.items() if math.isfinite(value))
    return [step for step, _ in finite], [value for _, value in finite]


def _figure(width: float, heights: tuple[float, ...]) -> "tuple[Figure, list[Axes]]":
    """A figure with panels of these heights (inches) above one another, sharing the x axis; no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, sum(heights) + 0.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    all_axes = list(grid[:, 0])
    for axes in all_axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


def _save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
