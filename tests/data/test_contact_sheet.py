from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metadist.core.errors import InputError
from metadist.data import open_dataset
from metadist.data.contact_sheet import contact_sheet
from metadist.data.importers import images
from tests.data.example import write_example


@pytest.mark.usefixtures("figures")
def test_the_sheet_shows_examples_of_each_split_in_their_colours(tmp_path: Path) -> None:
    colours = {"train": (255, 0, 0), "validation": (0, 255, 0), "test": (0, 0, 255)}
    for split, colour in colours.items():
        for name in ("one", "字"):
            (tmp_path / "in" / split / f"{split} {name} $x$").mkdir(parents=True)
            for shot in range(12):
                file = tmp_path / "in" / split / f"{split} {name} $x$" / f"{shot}.png"
                Image.new("RGB", (8, 4), colour).save(file)
    dataset = open_dataset(images(tmp_path / "in", tmp_path / "set", size=(4, 8)))
    contact_sheet(dataset, tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    places = [np.argwhere((pixels == colour).all(axis=2)) for colour in colours.values()]
    tops = [found[:, 0].min() for found in places]
    assert tops == sorted(tops) and min(len(found) for found in places) > 5000
    shares = [len(found) / pixels[:, :, 0].size for found in places]
    assert max(shares) - min(shares) < 0.01


def test_what_holds_no_pictures_or_cannot_be_written_is_refused(tmp_path: Path) -> None:
    write_example(tmp_path / "set")  # uint8 (1, 2, 3) is a picture
    dataset = open_dataset(tmp_path / "set")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        contact_sheet(dataset, tmp_path / "file" / "sheet.png")
