"""A contact sheet: examples of some classes of each split of a data set of pictures, as one PNG file."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from metadist.core.errors import InputError
from metadist.data.notes import shown
from metadist.data.table import Dataset, Field, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLASSES, EXAMPLES = 6, 10  # of each split, of each class
GAP = 0.06  # between pictures, as a part of their height
CELL_INCHES, NAMES_INCHES, TITLE_INCHES = 0.62, 2.4, 0.4
NAME = 30  # characters shown of a class's name


def contact_sheet(dataset: Dataset, path: str | Path) -> None:
    """Writes a PNG with the first examples of classes from all over each split, a class per line, as they are stored.

    Raises InputError where no input of the dataset is pictures, or the file cannot be written.

    Example:
        >>> contact_sheet(open_dataset("data/omniglot"), "omniglot.png")
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pictures = [field for field in dataset.fields if field.role == "input" and _is_picture(field)]
    if not pictures:
        raise InputError(f"{dataset.path} holds no pictures to draw: leave --figure out")
    lines = [min(CLASSES, len(table.counts)) for table in dataset.splits.values()]
    wide = EXAMPLES * CELL_INCHES * pictures[0].shape[2] / pictures[0].shape[1]
    across = NAMES_INCHES + wide + 0.1
    down = sum(lines) * CELL_INCHES + len(lines) * TITLE_INCHES + 0.1
    figure, top = Figure(figsize=(across, down), dpi=150), 0.0
    FigureCanvasAgg(figure)
    for count, (split, table) in zip(lines, dataset.splits.items(), strict=True):
        top += count * CELL_INCHES + TITLE_INCHES
        place = (NAMES_INCHES / across, 1 - top / down, wide / across, count * CELL_INCHES / down)
        _draw(figure.add_axes(place), split, table, pictures[0])
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # names in scripts that the font lacks
            figure.savefig(path, format="png")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): choose another file") from error


def _is_picture(field: Field) -> bool:
    return len(field.shape) == 3 and field.shape[0] in (1, 3) and (field.dtype == "uint8" or "float" in field.dtype)


def _draw(axes: "Axes", split: str, table: Table, field: Field) -> None:
    groups = np.unique(np.linspace(0, len(table.counts) - 1, min(CLASSES, len(table.counts))).astype(int)).tolist()
    (_, height, width), gap = field.shape, max(1, round(GAP * field.shape[1]))
    sheet = np.full((len(groups) * (height + gap) - gap, EXAMPLES * (width + gap) - gap, 3), 1.0)
    for line, group in enumerate(groups):
        top, start = line * (height + gap), int(table.starts[group])
        for place in range(min(EXAMPLES, int(table.counts[group]))):
            left = place * (width + gap)
            sheet[top : top + height, left : left + width] = _colours(table, field, start + place)
    axes.imshow(sheet, interpolation="nearest", aspect="auto")
    axes.set_yticks(
        [line * (height + gap) + height / 2 for line in range(len(groups))], [_name(table, g) for g in groups]
    )
    axes.tick_params(length=0, labelsize=8)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    more = f"{len(groups)} of " if len(groups) < len(table.counts) else ""
    axes.set_title(f"{split}: {more}{len(table.counts):,} classes", fontsize=10, loc="left")


def _colours(table: Table, field: Field, row: int) -> np.ndarray:
    """A row's picture as float [height, width, 3] between 0 and 1."""
    low, high = table.metadata["ranges"].get(field.name, (0, 255))
    low = min(low, 0)
    high = 255 if field.dtype == "uint8" and high > 128 else high
    item = row if not field.shared or table.index is None else int(table.index[row])
    pixels = (table.column(field.name)[item].astype(np.float64) - low) / max(high - low, 1e-12)
    return np.broadcast_to(pixels.clip(0, 1).transpose(1, 2, 0), (*field.shape[1:], 3))


def _name(table: Table, group: int) -> str:
    name = shown(table.group_names[group]).replace("$", r"\$")
    return name if len(name) <= NAME else f"...{name[-NAME:]}"
