"""Pictures: what is left out, linked, scaled or bad, and that the import says so."""

import os
import shutil
import socket
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from metadist.core.errors import InputError
from metadist.data import open_dataset
from metadist.data.importers import images

CLASSES = ["ant", "bee", "cat", "dog", "eel"]


def noise(number: int, shape: tuple[int, ...] = (8, 8, 3)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, shape).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five classes of three pictures, all different."""
    source = tmp_path / "pictures"
    for n, name in enumerate(CLASSES):
        (source / name).mkdir(parents=True)
        for shot in range(3):
            Image.fromarray(noise(10 * n + shot)).save(source / name / f"{shot}.png")
    return source


def imported(source: Path, tmp_path: Path, **options: Any) -> tuple[dict[str, int], dict[str, int], np.ndarray]:
    """Pictures of each class, counts by what a note says, and all pixels."""
    dataset = open_dataset(images(source, tmp_path / "set", size=(8, 8), overwrite=True, **options), verify=True)
    tables = dataset.splits.values()
    classes = {name: int(count) for t in tables for name, count in zip(t.group_names, t.counts, strict=True)}
    told: dict[str, int] = {}
    for note in dataset.metadata["notes"]:
        told[note["what"]] = told.get(note["what"], 0) + note["count"]
    return classes, told, np.concatenate([table.column("image") for table in tables])


def test_an_ordinary_folder_has_nothing_to_say(folder: Path, tmp_path: Path) -> None:
    classes, told, _ = imported(folder, tmp_path)
    assert classes == dict.fromkeys(CLASSES, 3) and told == {}


@pytest.mark.parametrize(
    "place",
    [
        "cat/.ipynb_checkpoints/0-checkpoint.png", "cat/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "cat/__MACOSX/0.png",
        "cat/._0.png", "cat/more/.cache/deep/0.png", "cat/thumbs/0.png", "cat/Thumbs.db", "cat/desktop.ini",
        "cat/.DS_Store", ".git/objects/0.png", "__MACOSX/cat/0.png", "#recycle/0.png", "@eaDir/0.png", ".hidden.png",
        "cat/$RECYCLE.BIN/0.png", "cat/~$0.png", "System Volume Information/0.png", "cat/Thumbnails/0.PNG",
    ],
)  # fmt: skip
def test_hidden_and_tool_made_files_are_no_pictures_at_any_depth(folder: Path, tmp_path: Path, place: str) -> None:
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "cat" / "0.png", folder / place)
    classes, told, _ = imported(folder, tmp_path)
    assert classes == dict.fromkeys(CLASSES, 3) and told == {"files left out": 1}


def test_a_class_may_have_a_name_that_tools_use_for_thumbnails(folder: Path, tmp_path: Path) -> None:
    (folder / "eel").rename(folder / "Thumbs")
    assert imported(folder, tmp_path)[0]["Thumbs"] == 3


def test_files_without_a_class_or_of_another_suffix_are_said(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "cat" / "0.png", folder / "stray.png")
    (folder / "cat" / "notes.txt").write_text("no picture")
    (folder / "cat" / "photo.heic").write_bytes(b"?")
    shutil.move(folder / "dog" / "0.png", folder / "dog" / "0.PNG")
    classes, told, _ = imported(folder, tmp_path)
    assert classes == dict.fromkeys(CLASSES, 3) and told == {"files left out": 3}


def test_pictures_of_folders_inside_a_class_are_merged_and_said(folder: Path, tmp_path: Path) -> None:
    (folder / "cat" / "big").mkdir()
    Image.fromarray(noise(99)).save(folder / "cat" / "big" / "0.png")
    classes, told, _ = imported(folder, tmp_path)
    assert classes["cat"] == 4 and told == {"pictures merged": 1}


def test_links_are_followed_or_left_out_and_said(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    Image.fromarray(noise(99)).save(outside / "0.png")
    (folder / "cat" / "out.png").symlink_to(outside / "0.png")
    (folder / "cat" / "loop").symlink_to(folder)
    (folder / "loop").symlink_to(".")
    (folder / "more").symlink_to(outside)
    classes, told, _ = imported(folder, tmp_path)
    assert classes == dict.fromkeys(CLASSES, 3) | {"cat": 4, "more": 1}
    assert told == {"links followed": 2, "linked folders left out": 2, "rows shared": 1}


def test_classes_that_differ_by_spaces_or_unicode_form_are_one(folder: Path, tmp_path: Path) -> None:
    for old, new in (("ant", "é"), ("bee", "e\u0301 "), ("cat", " dog")):
        (folder / old).rename(folder / new)
    classes, told, _ = imported(folder, tmp_path)
    assert classes == {"é": 6, "dog": 6, "eel": 3} and told == {"names of class folders merged": 2}
    (folder / "eel").rename(folder / "Dog")
    classes, told, _ = imported(folder, tmp_path, fractions=(1, 0, 0))
    assert classes == {"é": 6, "dog": 6, "Dog": 3} and told["classes kept apart"] == 1


def test_equal_pictures_of_a_class_of_two_classes_and_of_two_splits_are_said(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "ant" / "0.png", folder / "ant" / "copy.png")
    Image.open(folder / "ant" / "1.png").save(folder / "bee" / "same pixels.bmp")
    _, told, _ = imported(folder, tmp_path, fractions=(1, 0, 0))
    assert told == {"rows repeated": 1, "rows shared": 1}
    assert "in the same split" in open_dataset(tmp_path / "set").metadata["notes"][1]["why"]
    for name, split in zip(CLASSES, ["train", "test", "train", "train", "val"], strict=True):
        (tmp_path / "splits" / split).mkdir(parents=True, exist_ok=True)
        (folder / name).rename(tmp_path / "splits" / split / name)
    imported(tmp_path / "splits", tmp_path)
    notes = open_dataset(tmp_path / "set").metadata["notes"]
    assert [(note["what"], note["count"]) for note in notes] == [("rows repeated", 1), ("rows shared", 1)]
    assert "in another split" in notes[1]["why"]
    assert notes[1]["example"] == "train/ant/1.png and test/bee/same pixels.bmp"


@pytest.mark.parametrize(
    ("highest", "divisor", "suffix"), [(4095, 16, "png"), (1023, 4, "tiff"), (65535, 256, "png"), (255, 1, "png")]
)
def test_deep_grey_levels_use_the_whole_range(tmp_path: Path, highest: int, divisor: int, suffix: str) -> None:
    levels = np.random.default_rng(0).integers(0, highest + 1, (5, 8, 8)).astype(np.uint16)
    levels[2, 0, 0] = highest
    for n, name in enumerate(CLASSES):
        (tmp_path / "deep" / name).mkdir(parents=True)
        Image.fromarray(levels[n]).save(tmp_path / "deep" / name / f"0.{suffix}")
    _, told, pixels = imported(tmp_path / "deep", tmp_path, mode="gray", fractions=(1, 0, 0))
    np.testing.assert_array_equal(pixels[:, 0], levels // divisor)
    assert told == {"grey pictures of more than 8 bits scaled to 0..255": 5}


def colours_of_16_bits(levels: np.ndarray) -> bytes:
    """A PNG: Pillow writes none of this kind."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in levels)
    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def test_deep_colours_are_cut_to_their_high_byte_or_refused_where_that_is_nearly_black(
    folder: Path, tmp_path: Path
) -> None:
    levels = np.random.default_rng(77).integers(0, 4096, (8, 8, 3))
    (folder / "ant" / "deep.png").write_bytes(colours_of_16_bits(16 * levels))
    classes, told, pixels = imported(folder, tmp_path, fractions=(1, 0, 0))
    assert classes["ant"] == 4 and told == {"deep colours cut": 1}
    np.testing.assert_array_equal(pixels[3], (levels // 16).transpose(2, 0, 1))
    (folder / "ant" / "deep.png").write_bytes(colours_of_16_bits(levels))
    with pytest.raises(InputError, match="deep.png is a picture of 16 bits per colour that uses 14 or fewer"):
        images(folder, tmp_path / "other")


def test_what_pictures_lose_is_said(folder: Path, tmp_path: Path) -> None:
    glass = Image.fromarray(noise(61, (8, 8, 4)))
    glass.save(folder / "ant" / "glass.png")
    Image.fromarray(noise(62)).convert("CMYK").save(folder / "ant" / "print.jpg")
    frames = [Image.fromarray(noise(n)) for n in (63, 64)]
    for suffix in ("gif", "tiff"):
        frames[0].save(folder / "ant" / f"frames.{suffix}", save_all=True, append_images=frames[1:])
    Image.fromarray(noise(65, (8, 16, 3))).save(folder / "ant" / "wide.png")
    Image.fromarray(noise(66)).convert("P").save(folder / "ant" / "palette.png")
    Image.fromarray(noise(67, (8, 8))).save(folder / "ant" / "grey.png")
    classes, told, _ = imported(folder, tmp_path)
    assert classes["ant"] == 10
    assert told == {
        "transparent pictures filled": 1,
        "print colours converted": 1,
        "frames left out of pictures": 2,
        "pictures stretched": 1,
        "rows repeated": 1,  # the first frames
    }


def spoil(folder: Path) -> list[str]:
    """Pictures that cannot be used, of every kind."""
    whole = (folder / "ant" / "0.png").read_bytes()
    (folder / "ant" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "bee" / "empty.jpg").write_bytes(b"")
    (folder / "cat" / "page.jpg").write_text("<html>404 Not Found</html>")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "dog" / "float.tiff")
    os.mkfifo(folder / "eel" / "pipe.png")
    (folder / "eel" / "zero.png").symlink_to("/dev/zero")
    (folder / "eel" / "gone.png").symlink_to("nowhere.png")
    return [
        "ant/cut.png", "bee/empty.jpg", "cat/page.jpg", "dog/float.tiff", "eel/pipe.png", "eel/zero.png", "eel/gone.png"
    ]  # fmt: skip


def test_all_bad_pictures_are_told_in_one_go_or_skipped(folder: Path, tmp_path: Path) -> None:
    bad = spoil(folder)
    with pytest.raises(InputError, match="7 of 22 pictures") as caught:
        images(folder, tmp_path / "set", size=(8, 8))
    message = str(caught.value)
    assert all(name in message for name in bad) and "--skip-bad" in message and "\n" not in message
    assert "is a pipe" not in message and "a pipe and no regular file" in message and "a device and no" in message
    assert not (tmp_path / "set").exists()
    classes, told, _ = imported(folder, tmp_path, skip_bad=True)
    assert classes == dict.fromkeys(CLASSES, 3)
    assert told == {"pictures left out": 7, "links followed": 1}


def test_a_class_of_bad_pictures_alone_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in (folder / "eel").iterdir():
        file.write_text("no picture")
    with pytest.raises(InputError, match="class 'eel' of .* has no picture that can be read"):
        images(folder, tmp_path / "set", size=(8, 8), skip_bad=True)


def test_names_that_are_not_plain_text(folder: Path, tmp_path: Path) -> None:
    for n, name in enumerate(
        [b"1\xc2\xb23.png", b"\xd9\xa3.png", b"caf\xe9.png", b"two\nlines.png", b"0" * 200 + b".png"]
    ):
        Image.fromarray(noise(50 + n)).save(os.fsdecode(os.fsencode(folder / "cat") + b"/" + name))
    assert imported(folder, tmp_path)[0]["cat"] == 8
    (folder / "cat" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
    with pytest.raises(InputError, match=r"caf\\udce9.png is not a picture"):
        images(folder, tmp_path / "other")
    (folder / "cat").rename(folder / os.fsdecode(b"caf\xe9"))
    with pytest.raises(InputError, match=r"folder caf\\udce9 is not UTF-8"):
        images(folder, tmp_path / "other")


def test_a_socket_is_no_picture(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "cat")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        with pytest.raises(InputError, match="cat/socket.png is a socket and no regular file"):
            images(folder, tmp_path / "set")
