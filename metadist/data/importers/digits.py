"""The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn carries: a data set without a download."""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from metadist.data.importers.pictures import PictureForm
from metadist.data.notes import Progress
from metadist.data.splits import split_by_counts
from metadist.data.table import Field
from metadist.data.writer import About, DatasetWriter, Group, options_of, staging

CLASS_COUNTS = (4, 3, 3)


def digits(
    out: str | Path,
    *,
    turned: bool = True,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write scikit-learn's 8x8 handwritten digits; works offline.

    4 classes for train, 3 for validation, 3 for test. Field `image`: uint8 (1, 8, 8), 0 to 16, scale 1/16.

    Args:
        out: directory to write.
        turned: training digits in their seven other orientations (turned and mirrored) as further classes "3/turn1" to
            "3/turn7", but for the half turn that makes a 9 a 6: four are few to meta-learn from.
        seed: of the random split.
        overwrite: replace a dataset that is there.
        progress: called now and then with the rows written so far and in all.

    Example:
        metadist data digits --out data/digits
    """
    options = options_of("digits", locals())
    from sklearn.datasets import load_digits

    with staging(out, overwrite) as directory:
        flat, labels = (np.asarray(array) for array in load_digits(return_X_y=True))
        splits = split_by_counts([str(digit) for digit in range(10)], CLASS_COUNTS, seed)
        groups, blocks = [], []
        for digit in range(10):
            upright = flat[labels == digit].astype(np.uint8).reshape(-1, 1, 8, 8)
            for turn in range(8 if turned and splits[str(digit)] == "train" else 1):
                if turn == 2 and digit in (6, 9):
                    continue  # half a turn makes one the other
                name = f"{digit}/turn{turn}" if turn else str(digit)
                groups.append(Group(name, splits[str(digit)], len(upright)))
                image = np.rot90(upright, turn % 4, axes=(2, 3))
                blocks.append(image[..., ::-1] if turn >= 4 else image)
        source = "scikit-learn's digits: test part of the UCI Optical Recognition of Handwritten Digits data"
        field = Field("image", "input", "uint8", (1, 8, 8), scale=1 / 16)
        form = PictureForm((8, 8), "L", inverted=True, highest=16)
        extra = {"preprocessing": {"pictures": asdict(form)}}
        about = About("classes", source, "CC BY 4.0 (UCI)", options, extra)
        writer = DatasetWriter(directory, [field], groups, about, progress=progress)
        for number, block in enumerate(blocks):
            writer.add(np.full(len(block), number), {"image": np.ascontiguousarray(block)})
        writer.finish()
    return Path(out)
