"""The figures of a run, as PNG files. Colours are Okabe and Ito's, told apart by colour-blind readers too."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metadist.core.errors import InputError
from metadist.core.measure import ACCURACY, LOSS, Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^Dvp*"
_DASHES = ("--", "-.", ":")
_SMOOTHED_FROM, _MOST_POINTS, _DECADE = 100, 200, 10.0


class CurvePoint(NamedTuple):
    """One measurement: the mean over tasks and the half-width of its 95 % interval, in the metric's own unit.

    `inner_steps` is None for a baseline that does not adapt step by step; it is drawn as a horizontal line.
    """

    name: str
    inner_steps: int | None
    mean: float
    half_width: float


class Compared(NamedTuple):
    """A run beside others: its mean and half-width, how much better it is than the first with that half-width (NaN of
    the first itself), and whether that is paired over tasks; in the metric's own unit."""

    name: str
    mean: float
    half_width: float
    better: float
    better_half_width: float
    paired: bool


def adaptation_curve(rows: Iterable[CurvePoint], title: str, path: Path, measure: Measure) -> None:
    """Writes a PNG of the measure on query examples against the number of inner steps, one curve a name; where there is
    one step at most, a bar each.

    Accuracies are fractions, shown in per cent. Raises InputError when there is nothing to draw.
    """
    from matplotlib.ticker import MaxNLocator

    curves: dict[str, list[CurvePoint]] = {}
    for row in rows:
        curves.setdefault(row.name, []).append(row)
    if not curves:
        raise InputError(f"There are no results to draw in {path}: evaluate the run first.")
    steps = sorted({row.inner_steps for points in curves.values() for row in points if row.inner_steps is not None})
    if steps and steps[-1] <= 1:
        _bars(curves, measure, title, path)
        return
    figure, (axes,) = _figure(width=7.2, heights=(4.5,))
    for index, (name, points) in enumerate(curves.items()):
        _draw_curve(axes, name, points, measure.scale, index)
    if steps:
        axes.set_xlim(steps[0] - 0.02 * (steps[-1] - steps[0]) - 0.1, steps[-1] + 0.02 * (steps[-1] - steps[0]) + 0.1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("inner steps")
    axes.set_ylabel(_label(measure))
    axes.set_title(title, wrap=True, fontsize=9)
    figure.legend(loc="outside lower center", ncols=min(3, len(curves)), frameon=False, title="mean, 95 % interval")
    _save(figure, path)


def scaling(metrics: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Writes a PNG of the tasks a second against the number of workers alive: each measurement, the medians, and what
    would be proportional to the workers. `metrics` are the rows of `read_metrics`."""
    rates: dict[float, list[float]] = {}
    for row in metrics:
        if "workers/tasks_per_s" in row and row.get("workers/alive"):
            rates.setdefault(row["workers/alive"], []).append(row["workers/tasks_per_s"])
    if not rates:
        raise InputError(f"There is no throughput to draw in {path}: train for at least one step.")
    workers = sorted(rates)
    medians = [float(np.median(rates[each])) for each in workers]
    figure, (axes,) = _figure(width=6.0, heights=(4.0,))
    for each in workers:
        axes.plot([each] * len(rates[each]), rates[each], ".", color=_COLOURS[5], alpha=0.5)
    axes.plot(workers, medians, color=_COLOURS[0], marker="o", label="median")
    ideal = [medians[0] * each / workers[0] for each in workers]
    axes.plot(workers, ideal, color=_COLOURS[6], linestyle="--", linewidth=1, label="proportional")
    axes.set_xticks(workers)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("workers alive")
    axes.set_ylabel("tasks/s")
    axes.set_title(title, wrap=True, fontsize=9)
    axes.legend(frameon=False)
    _save(figure, path)


def comparison(rows: Sequence[Compared], title: str, path: Path, measure: Measure) -> None:
    """Writes a PNG of runs, a line each: their means with intervals, and beside them how much better they are than the
    first."""
    scale = measure.scale
    figure = _canvas((8.0, 1.6 + 0.55 * len(rows)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for place, row in enumerate(rows):
        colour = _COLOURS[place % len(_COLOURS)]
        left.errorbar(scale * row.mean, place, xerr=scale * row.half_width, fmt="o", color=colour, capsize=4)
        if math.isfinite(row.better):
            right.errorbar(
                scale * row.better, place, xerr=scale * row.better_half_width, fmt="o", color=colour, capsize=4,
                markerfacecolor=colour if row.paired else "white",
            )  # fmt: skip
    right.axvline(0, color=_COLOURS[6], linewidth=1)
    left.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlabel(f"{_label(measure)}, 95 % interval")
    unit = " (points)" if measure == ACCURACY else ""
    hollow = "" if all(row.paired for row in rows) else "\nhollow: not paired over tasks"
    right.set_xlabel(f"better than the first{unit}{hollow}")
    figure.suptitle(title, fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def task_picture(images: np.ndarray, labels: np.ndarray, confusion: np.ndarray, path: Path, title: str = "") -> None:
    """Writes a PNG of one task: a row of support pictures a class (at most eight), beside how many query examples of
    each class [row] were taken for which [column]. images [n, 1 or 3, height, width], 0 to 1; labels [n]; confusion
    [ways, ways], counts."""
    ways, most = len(confusion), min(8, int(np.bincount(labels).max()))
    figure = _canvas((0.9 * most + 0.5 + 0.55 * ways + 1.6, max(2.6, 0.62 * ways + 1.0)))
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(0.9 * most + 0.5, 0.55 * ways + 1.6))[0]
    grid = left.subplots(ways, most, squeeze=False)
    for label in range(ways):
        pictures = images[labels == label][:most]
        for axes, picture in zip(grid[label], pictures, strict=False):
            axes.imshow(np.clip(picture.transpose(1, 2, 0), 0, 1).squeeze(), cmap="gray", vmin=0, vmax=1)
        for axes in grid[label]:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        grid[label][0].set_ylabel(f"class {label}", rotation=0, ha="right", va="center", fontsize=8)
    left.suptitle("support set", fontsize=10)
    axes = right.subplots()
    axes.imshow(confusion, cmap="Blues", vmin=0)
    for (row, column), count in np.ndenumerate(confusion):
        colour = "white" if count > confusion.max() / 2 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(ways))
    axes.set_yticks(range(ways))
    axes.set_xlabel("predicted class")
    axes.set_ylabel("class")
    right.suptitle(f"{np.trace(confusion)} of {confusion.sum()} queries right", fontsize=10)
    figure.suptitle(title, fontsize=9)
    _save(figure, path)


def training_curve(
    metrics: Sequence[Mapping[str, Any]], path: Path, title: str = "", measure: Measure = ACCURACY
) -> None:
    """Writes a PNG of losses, of the measure on validation tasks with its 95 % interval and of throughput over
    meta-steps, one below the other. Losses that span decades are on a log axis; numbers that were logged closer
    together than a two-hundredth of the run are drawn as their mean.

    `metrics` are the rows of `read_metrics`; panels without numbers are left out, the non-finite are not drawn. Raises
    InputError when there is none of `train/loss`, `validation/loss`, the measure's and `workers/tasks_per_s`.
    """
    own = "validation\n" + _label(measure).removeprefix("query ")
    panels = {
        "loss": {"train": _series(metrics, "train/loss"), "validation": _series(metrics, "validation/loss")},
        own: {} if measure == LOSS else {"validation": _series(metrics, f"validation/{measure.name}", measure.scale)},
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
            if label.startswith("validation"):
                _draw_interval(axes, metrics, measure, dict(zip(steps, values, strict=True)))
        axes.set_ylabel(label)
        if label == "loss":
            _set_scale(axes, [value for _, values in lines.values() for value in values])
            axes.legend(frameon=False)
    if "throughput\n(tasks/s)" in drawn:
        all_axes[-1].set_ylim(bottom=0)
    all_axes[-1].set_xlabel("meta-steps")
    all_axes[0].set_title(title, wrap=True, fontsize=9)
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
    """A long noisy series is drawn faintly, with its running mean over 5 % of its points on top."""
    steps, values = (steps, values) if name == "validation" else _thinned(steps, values)
    colour = {"train": _COLOURS[0], "validation": _COLOURS[1], "throughput": _COLOURS[2]}[name]
    if len(values) < _SMOOTHED_FROM:
        dots = "o" if len(values) <= (40 if name == "validation" else 1) else None
        axes.plot(steps, values, color=colour, marker=dots, markersize=3, label=name)
        return
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    window = len(values) // 20
    means = np.convolve(values, np.full(window, 1 / window), mode="valid")
    axes.plot(
        steps[window // 2 : window // 2 + len(means)],
        means,
        color=colour,
        linewidth=1.6,
        label=f"{name} (mean of {window})",
    )


def _set_scale(axes: "Axes", values: Sequence[float]) -> None:
    """A log axis where the values are positive and the largest is more than ten times all but the smallest fiftieth."""
    if min(values) > 0 and max(values) > _DECADE * np.quantile(values, 0.02):
        axes.set_yscale("log")


def _draw_interval(
    axes: "Axes", metrics: Sequence[Mapping[str, Any]], measure: Measure, means: Mapping[float, float]
) -> None:
    halves = dict(zip(*_series(metrics, f"validation/{measure.name}_ci95", measure.scale), strict=True))
    steps = [step for step in means if step in halves]
    low, high = ([means[step] + sign * halves[step] for step in steps] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color=_COLOURS[1], alpha=0.2, linewidth=0)


def _bars(curves: Mapping[str, list[CurvePoint]], measure: Measure, title: str, path: Path) -> None:
    """One bar a measurement: before and after the step, and the baselines."""
    named = {0: "before", 1: "after 1 step"}
    bars = [
        (f"{name}\n{named[point.inner_steps]}" if point.inner_steps is not None and len(points) > 1 else name, point)
        for name, points in curves.items()
        for point in points
    ]
    figure, (axes,) = _figure(width=max(4.5, 1.3 * len(bars)), heights=(4.0,))
    colours = [_COLOURS[list(curves).index(point.name) % len(_COLOURS)] for _, point in bars]
    heights, halves = (
        [measure.scale * value for value in each] for each in zip(*[point[2:] for _, point in bars], strict=True)
    )
    axes.bar(range(len(bars)), heights, yerr=halves, color=colours, alpha=0.85, width=0.6, capsize=4)
    axes.set_xticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    axes.set_ylabel(f"{_label(measure)}, 95 % interval")
    axes.set_title(title, wrap=True, fontsize=9)
    _save(figure, path)


def _label(measure: Measure) -> str:
    return f"query {measure.name.replace('_', ' ')}{' (%)' if measure == ACCURACY else ''}"


def _thinned(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """The series with what lies in one two-hundredth of its range as one point, their mean."""
    width = (steps[-1] - steps[0]) / _MOST_POINTS
    if not width:
        return steps, values
    place = np.minimum((np.array(steps) - steps[0]) // width, _MOST_POINTS - 1)
    counts = np.bincount(place.astype(int))
    kept = counts > 0
    means = (np.bincount(place.astype(int), weights=each)[kept] / counts[kept] for each in (steps, values))
    thin_steps, thin_values = (mean.tolist() for mean in means)
    return thin_steps, thin_values


def _series(metrics: Sequence[Mapping[str, Any]], name: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    """Steps and values, by step; of a step written twice (before and after a resume) the later holds."""
    by_step = {row["step"]: row[name] * scale for row in metrics if name in row}
    finite = sorted((step, value) for step, value in by_step.items() if math.isfinite(value))
    return [step for step, _ in finite], [value for _, value in finite]


def _figure(width: float, heights: tuple[float, ...]) -> "tuple[Figure, list[Axes]]":
    """A figure with panels of these heights (inches) above one another, sharing the x axis; no global state."""
    figure = _canvas((width, sum(heights) + 0.4))
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    all_axes = list(grid[:, 0])
    for axes in all_axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


def _canvas(size: tuple[float, float]) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
