import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metadist.core.errors import InputError
from metadist.data import describe, open_dataset
from metadist.data.importers import omniglot
from metadist.data.importers.pictures import PictureForm

OFFICIAL = Path(__file__).parents[4] / "shared" / "data" / "omniglot"


def drawing(number: int) -> bytes:
    """105 x 105, one black square on white whose place depends on the number."""
    pixels = np.full((105, 105), 255, np.uint8)
    row, column = 8 * (number % 12), 8 * (number // 12 % 12)
    pixels[row : row + 8, column : column + 8] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).convert("1").save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 1,623 characters with one made-up drawing each: the background as a zip, the evaluation as a folder."""
    source = tmp_path_factory.mktemp("omniglot")
    with zipfile.ZipFile(source / "images_background.zip", "w") as archive:
        archive.writestr("__MACOSX/images_background/A/character01/._1.png", b"not a picture")
        for n in range(964):
            archive.writestr(f"images_background/A{n % 30}/character{n // 30:02}/1_01.png", drawing(n))
    for n in range(659):
        folder = source / "images_evaluation" / f"B{n % 20}" / f"character{n // 20:02}"
        folder.mkdir(parents=True)
        (folder / "1_01.png").write_bytes(drawing(n))
    return source


def test_the_paper_split_with_rotations(small: Path, tmp_path: Path) -> None:
    out = omniglot(small, tmp_path / "set", rotations="train")
    dataset = open_dataset(out, verify=True)
    groups = {split: table.group_names for split, table in dataset.splits.items()}
    assert {split: len(names) for split, names in groups.items()} == {"train": 4400, "validation": 100, "test": 423}
    upright = [{name.split("/rot")[0] for name in names} for names in groups.values()]
    assert sum(map(len, upright)) == len(set.union(*upright)) == 1623
    golden = hashlib.sha256("\n".join(groups["test"]).encode()).hexdigest()[:16]
    assert golden == "983c992ac03f9f8e"
    train = dataset.splits["train"]
    assert train.fields[0].shape == (1, 28, 28) and train.fields[0].scale == 1 / 255
    row = train.group_names.index("A3/character05/rot90") if "A3/character05/rot90" in train.group_names else 1
    name = train.group_names[row].split("/rot")[0]
    first = train.column("image")[train.starts[train.group_names.index(name)]]
    turned = train.column("image")[train.starts[train.group_names.index(f"{name}/rot90")]]
    np.testing.assert_array_equal(np.rot90(first, 1, axes=(1, 2)), turned)
    assert train.parent_names[train.parents[train.group_names.index(name)]] == name.split("/")[0]
    assert first.max() > 200 and np.median(first) == 0  # ink is bright, paper is 0


def test_the_lake_split_keeps_alphabets_apart(small: Path, tmp_path: Path) -> None:
    dataset = open_dataset(omniglot(small, tmp_path / "set", split="lake", size=8, seed=2))
    parents = {split: set(table.parent_names) for split, table in dataset.splits.items()}
    assert [len(names) for names in parents.values()] == [25, 5, 20]
    assert parents["test"] == {f"B{n}" for n in range(20)}
    assert not parents["train"] & parents["validation"]
    test = dataset.splits["test"]
    assert test.fields[0].shape == (1, 8, 8)
    form = PictureForm.of(dataset.metadata["extra"])
    with Image.open(small / "images_evaluation" / "B3" / "character07" / "1_01.png") as file:
        row = test.column("image")[test.starts[test.group_names.index("B3/character07")]]
        assert form is not None and np.array_equal(form(file), row)  # another drawing is treated as those imported


def test_the_official_files(tmp_path: Path) -> None:
    if not OFFICIAL.exists():
        pytest.skip("Omniglot's official zips are not beside the project")
    told = describe(omniglot(OFFICIAL, tmp_path / "set"))
    assert {split: part["rows"] for split, part in told["splits"].items()} == {
        "train": 22000,
        "validation": 2000,
        "test": 8460,
    }
    assert told["ranges"]["image"] == [0, 255]


def refused(source: Path, tmp_path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        omniglot(source, tmp_path / "out" / "set")
    assert not (tmp_path / "out").exists()


def test_absent_or_incomplete_sources_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    refused(source, tmp_path, r"neither images_background\.zip nor a folder images_background")
    (source / "images_background").mkdir()
    refused(source, tmp_path, "holds 0 characters, not 964")


def test_a_zip_cut_short_is_refused(small: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "images_evaluation").symlink_to(small / "images_evaluation")
    content = (small / "images_background.zip").read_bytes()
    (source / "images_background.zip").write_bytes(content[: len(content) // 2])
    refused(source, tmp_path, "images_background.zip is no zip or is cut short")
    at = content.index(b"IDAT") + 6  # inside the first real drawing: the zip's checksum no longer holds
    (source / "images_background.zip").write_bytes(content[:at] + b"\xff\xff\xff" + content[at + 3 :])
    refused(source, tmp_path, "images_background.zip is no zip or is cut short")


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'some'"):
        omniglot(tmp_path, tmp_path / "set", rotations="some")  # type: ignore[arg-type]
