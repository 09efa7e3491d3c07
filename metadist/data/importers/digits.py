"""The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn carries: a data set without a download."""

from pathlib import Path

import numpy as np

from metadist.data.splits import deal
from metadist.data.table import Field
from metadist.data.writer import About, DatasetWriter, Group, Progress, staging

CLASS_COUNTS = (4, 3, 3)


def digits(out: str | Path, *, seed: int = 0, overwrite: bool = False, progress: Progress | None = None) -> Path:
    """Write scikit-learn's digits with 4 classes for train, 3 for validation, 3 for test, chosen by `seed`.

    Field `image`: uint8 (1, 8, 8), 0 to 16, scale 1/16.
    """
    from sklearn.datasets import load_digits

    with staging(out, overwrite) as directory:
        flat, labels = (np.asarray(array) for array in load_digits(return_X_y=True))
        splits = deal([str(digit) for digit in range(10)], CLASS_COUNTS, seed)
        groups = [Group(str(digit), splits[str(digit)], int((labels == digit).sum())) for digit in range(10)]
        source = "scikit-learn's digits: test part of the UCI Optical Recognition of Handwritten Digits data"
        about = About("classes", source, "CC BY 4.0 (UCI)", {"importer": "digits", "seed": seed})
        field = Field("image", "input", "uint8", (1, 8, 8), scale=1 / 16)
        writer = DatasetWriter(directory, [field], groups, about, progress=progress)
        writer.add(labels, {"image": flat.astype(np.uint8).reshape(-1, 1, 8, 8)})
        writer.finish()
    return Path(out)
