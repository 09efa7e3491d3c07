import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from metadist.core.errors import InputError
from metadist.data import open_dataset
from metadist.data.importers import images
from metadist.data.importers.pictures import PictureForm

CLASSES = ["ant", "bee", "cat", "dog", "eel"]


def save(
    file: Path, colour: tuple[int, ...] | int = (255, 0, 0), mode: str = "RGB", size: tuple[int, int] = (9, 6)
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "pictures"
    for n, name in enumerate(CLASSES):
        for shot in range(n + 1):
            save(source / name / f"{shot}.png", (10 * n, shot, 7))
    (source / "ant" / "notes.txt").write_text("no picture")
    return source


def test_classes_become_groups(folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(images(folder, tmp_path / "set", size=(4, 5)), verify=True)
    found = {name: count for t in dataset.splits.values() for name, count in zip(t.group_names, t.counts, strict=True)}
    assert found == {"ant": 1, "bee": 2, "cat": 3, "dog": 4, "eel": 5}
    assert {split: len(table.group_names) for split, table in dataset.splits.items()} == {
        "train": 3,
        "validation": 1,
        "test": 1,
    }
    for table in dataset.splits.values():
        for name, start, count in zip(table.group_names, table.starts, table.counts, strict=True):
            pixels = table.column("image")[start : start + count]
            assert pixels.shape[1:] == (3, 4, 5)
            expected = [[10 * CLASSES.index(name), shot, 7] for shot in range(count)]
            np.testing.assert_array_equal(pixels[:, :, 0, 0], expected)


def test_split_folders_and_gray(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "splits"
    for name, split in zip(CLASSES, ["train", "train", "val", "test", "test"], strict=True):
        (source / split).mkdir(parents=True, exist_ok=True)
        (folder / name).rename(source / split / name)
    dataset = open_dataset(images(source, tmp_path / "set", size=(3, 3), mode="gray"))
    assert {split: table.group_names for split, table in dataset.splits.items()} == {
        "train": ["ant", "bee"],
        "validation": ["cat"],
        "test": ["dog", "eel"],
    }
    assert dataset.splits["test"].column("image").shape == (9, 1, 3, 3)


def test_modes_are_converted_without_surprises(tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    save(source / "a" / "clear.png", (0, 0, 0, 0), "RGBA")
    deep = np.full((4, 4), 0x8000, np.uint16)
    (source / "b").mkdir()
    Image.fromarray(deep).save(source / "b" / "deep.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 0, 200, 0])
    (source / "c").mkdir()
    palette.save(source / "c" / "palette.png", transparency=0)
    dataset = open_dataset(images(source, tmp_path / "set", size=(4, 4), fractions=(1, 0, 0)))
    assert dataset.splits["train"].column("image")[:, :, 0, 0].tolist() == [[255] * 3, [128] * 3, [0, 200, 0]]


def refused(source: Path, tmp_path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        images(source, tmp_path / "out" / "set", size=(4, 4))
    assert not (tmp_path / "out").exists()


def test_damaged_pictures_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "eel" / "5.png").write_text("hello")
    refused(folder, tmp_path, r"5\.png is not a picture that can be read")
    (folder / "eel" / "5.png").write_bytes(b"")
    refused(folder, tmp_path, r"5\.png is not a picture that can be read")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "gif", "tiff", "bmp", "webp"):
        file = folder / "eel" / f"cut.{suffix}"
        Image.fromarray(noise).save(file)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        (folder / "eel" / "5.png").unlink(missing_ok=True)
        refused(folder, tmp_path, rf"cut\.{suffix} is not a picture that can be read or is cut short")
        file.unlink()


def test_folders_without_classes_are_refused(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path, "is not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "holds no class folders")
    (tmp_path / "empty" / "train").mkdir()
    refused(tmp_path / "empty", tmp_path, "hold no class folders")
    (folder / "fox").mkdir()
    refused(folder, tmp_path, r"fox holds no picture files")


def test_splits_that_share_classes_are_explained_and_merged_on_demand(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for n, name in enumerate(CLASSES):
        for split in ("train", "test"):
            save(source / split / name / "1.png", (10 * n, ord(split[1]), 7))
    save(source / "test" / "new" / "1.png", (99, 0, 7))
    refused(source, tmp_path, r"5 of 6 classes of .* are in two splits \('ant' first\).*--merge.*--source")
    dataset = open_dataset(images(source, tmp_path / "set", size=(4, 4), merge=True))
    found = {name: count for t in dataset.splits.values() for name, count in zip(t.group_names, t.counts, strict=True)}
    assert found == dict.fromkeys(CLASSES, 2) | {"new": 1} and len(dataset.splits) == 3
    (note,) = [note for note in dataset.metadata["notes"] if "merged" in note["what"]]
    assert note["count"] == 6 and note["why"].startswith("train and test are put together")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("bus", "train", "val"):
        save(tmp_path / "source" / name / "1.png", (len(name), 2, 7))
    refused(tmp_path / "source", tmp_path, "beside them 'bus'.*--classes-only")
    dataset = open_dataset(images(tmp_path / "source", tmp_path / "set", size=(4, 4), classes_only=True))
    assert sorted(name for table in dataset.splits.values() for name in table.group_names) == ["bus", "train", "val"]


@pytest.mark.parametrize(
    ("resize", "what", "row"),
    [
        ("squash", "pictures stretched", [20] * 2 + [200] * 4 + [20] * 2),
        ("crop", "pictures cropped", [200] * 8),
        ("pad", "pictures padded", [0] * 8),
    ],
)
def test_a_wide_picture_is_squashed_cropped_or_padded_and_that_is_said(
    tmp_path: Path, resize: Literal["squash", "crop", "pad"], what: str, row: list[int]
) -> None:
    wide = np.full((16, 32), 20, np.uint8)
    wide[:, 8:24] = 200  # the middle square
    for name in ("a", "b", "c"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.fromarray(wide).save(tmp_path / "in" / name / "1.png")
        Image.fromarray(wide[:, :16]).save(tmp_path / "in" / name / "2.png")
    out = images(tmp_path / "in", tmp_path / "set", size=(8, 8), mode="gray", resize=resize, fractions=(1, 0, 0))
    dataset = open_dataset(out)
    pixels = dataset.splits["train"].column("image")
    np.testing.assert_allclose(pixels[0, 0, 0], row, atol=25)  # Lanczos rings a little at edges
    assert pixels[0, 0, 4, 3] == 200 or abs(int(pixels[0, 0, 4, 3]) - 200) < 25
    note = dataset.metadata["notes"][0]
    assert note["what"] == what and note["count"] == 3 and "a/1.png, 16 x 32" in note["example"]
    form = PictureForm.of(dataset.metadata["extra"])
    assert form is not None and (form.size, form.mode, form.resize) == ((8, 8), "L", resize)
    with Image.open(tmp_path / "in" / "b" / "1.png") as file:
        np.testing.assert_array_equal(form(file), pixels[2])  # another picture is treated as those imported


def test_a_picture_of_one_line_fits_too() -> None:
    line = Image.new("RGB", (500, 1), (9, 9, 9))
    for resize in ("squash", "crop", "pad"):
        assert PictureForm((8, 8), "RGB", resize)(line).shape == (3, 8, 8)
    assert PictureForm.of({}) is None


def make_many(folder: Path) -> None:
    """60,000 pictures of 84 x 84 in 100 classes, all different: 1.3 GB."""
    colours = np.random.default_rng(0).integers(0, 256, (100, 6, 6, 3)).astype(np.uint8)
    for number in range(100):
        (folder / f"n{number:04}").mkdir(parents=True)
        pixels = np.array(Image.fromarray(colours[number]).resize((84, 84), Image.Resampling.BICUBIC))
        for shot in range(600):
            pixels[:2, :8, 0], pixels[2:4, :8, 1] = shot % 251, shot // 251
            Image.fromarray(pixels).save(folder / f"n{number:04}" / f"{shot}.bmp")


IMPORT = """
import sys
from metadist.cli.main import main
code = main(["data", "images", "--source", "many", "--size", "84", "84", "--out", "set"])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))  # its peak of resident memory
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_as_many_pictures_as_mini_imagenet_has_are_imported_in_little_memory(tmp_path: Path) -> None:
    make_many(tmp_path / "many")
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary, peak = done.stdout.split("\n")[:2]
    assert "train 64 groups with 38400 rows, validation 16 groups with 9600 rows, test 20 groups with 12000" in summary
    size = sum(file.stat().st_size for file in (tmp_path / "set").iterdir())
    assert size > 60_000 * 84 * 84 * 3 and int(peak.split()[1]) < 300_000  # kB; measured: 170 MB for 1.27 GB
    assert "of 60000 pictures looked at" in done.stderr and "60000 of 60000 rows" in done.stderr
    table = open_dataset(tmp_path / "set", verify=True).splits["test"]
    row = int(table.starts[3]) + 500
    with Image.open(tmp_path / "many" / table.group_names[3] / "500.bmp") as file:
        np.testing.assert_array_equal(table.column("image")[row], np.asarray(file).transpose(2, 0, 1))
