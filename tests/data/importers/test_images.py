from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metadist.core.errors import InputError
from metadist.data import open_dataset
from metadist.data.importers import images

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


def test_a_class_in_two_splits_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save(tmp_path / "source" / split / "ant" / "1.png")
    refused(tmp_path / "source", tmp_path, "class 'ant' of .* is in two splits")
