"""The sinusoid regression family of the MAML paper (Finn 2017, section 5.1)."""

from pathlib import Path

import numpy as np

from metadist.core.errors import InputError
from metadist.core.task import SPLITS
from metadist.data.notes import Progress
from metadist.data.splits import uniforms
from metadist.data.table import Field
from metadist.data.writer import About, DatasetWriter, Group, options_of, staging

AMPLITUDES, PHASES, INPUTS = (0.1, 5.0), (0.0, np.pi), (-5.0, 5.0)
BLOCK_GROUPS = 1024


def sinusoid(
    out: str | Path,
    *,
    groups: tuple[int, int, int] = (20000, 500, 1000),
    points: int = 50,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Draw sine curves of random amplitude and phase (Finn 2017).

    y = A sin(x - phase) with A in U[0.1, 5], phase in U[0, pi], x in U[-5, 5] (as in cbfinn/maml). Fields `x` and `y`:
    float32 (1,). A function depends only on (seed, split, its number), so larger sets extend smaller ones.

    Args:
        out: directory to write.
        groups: functions for train, validation and test.
        points: values of x at which each is sampled.
        seed: of the draws.
        overwrite: replace a dataset that is there.
        progress: called now and then with the rows written so far and in all.

    Example:
        metadist data sinusoid --out data/sinusoid
    """
    options = options_of("sinusoid", locals())
    if len(groups) != 3 or min(groups) < 0 or sum(groups) < 1 or points < 1:
        raise InputError(f"sinusoid takes three numbers of groups and points >= 1; not {tuple(groups)} and {points}")
    with staging(out, overwrite) as directory:
        rows = [
            Group(f"{split}/{number:07d}", split, points)
            for split, count in zip(SPLITS, groups, strict=True)
            for number in range(count)
        ]
        about = About("values", "generated: A sin(x - phase), Finn et al. 2017", "none needed", options)
        fields = [Field("x", "input", "float32", (1,)), Field("y", "target", "float32", (1,))]
        writer = DatasetWriter(directory, fields, rows, about, progress=progress)
        first = 0
        for split, count in zip(SPLITS, groups, strict=True):
            for start in range(0, count, BLOCK_GROUPS):
                block = range(start, min(count, start + BLOCK_GROUPS))
                draws = np.stack([uniforms(f"sinusoid/{split}/{number}", seed, 2 + points) for number in block])
                x, y = _curve(draws)
                codes = np.repeat(np.array(block) + first, points)
                writer.add(codes, {"x": x.reshape(-1, 1), "y": y.reshape(-1, 1)})
            first += count
        writer.finish()
    return Path(out)


def _curve(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x and y, float32 [functions, points], from uniform draws [functions, 2 + points]: amplitude, phase, then x."""
    amplitude, phase, x = np.split(draws, [1, 2], axis=1)
    amplitude, phase, x = (
        low + (high - low) * draw
        for (low, high), draw in zip((AMPLITUDES, PHASES, INPUTS), (amplitude, phase, x), strict=True)
    )
    x = x.astype(np.float32)
    return x, (amplitude * np.sin(x.astype(np.float64) - phase)).astype(np.float32)
