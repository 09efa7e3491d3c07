import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from metadist.core.errors import InputError
from metadist.data import About, DatasetWriter, Field, Group, Tokenizer, describe, open_dataset, staging
from metadist.data.importers import omniglot
from metadist.data.notes import Notes, sentence

from .example import write_example


@pytest.mark.parametrize("name", ["train.arrow", "test.arrow"])
def test_a_pipe_or_device_as_a_table_does_not_hang(tmp_path: Path, name: str) -> None:
    for make, kind in (
        (os.mkfifo, "a pipe"),
        (lambda file: file.symlink_to("/dev/zero"), "a device"),
        (os.mkdir, "a folder"),
    ):
        out = tmp_path / kind
        write_example(out)
        (out / name).unlink()
        make(out / name)
        with pytest.raises(InputError, match=f"{name} is {kind} and no regular file"):
            open_dataset(out)


def test_a_pipe_as_a_vocabulary_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "vocabulary.json")
    with pytest.raises(InputError, match="is a pipe and no regular file"):
        Tokenizer.load(tmp_path / "vocabulary.json")


def test_zip_bombs_end_in_one_sentence(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images_background.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for n in range(964):
            content = bytes(1 << 26) if n == 3 else b""
            archive.writestr(f"images_background/A/character{n:03}/1.png", content)
    with zipfile.ZipFile(tmp_path / "images_evaluation.zip", "w") as archive:
        for n in range(659):
            archive.writestr(f"images_evaluation/B/character{n:03}/1.png", b"")
    with pytest.raises(InputError, match="character003/1.png in .* unpacks to more than 1 MiB"):
        omniglot(tmp_path, tmp_path / "set")
    (tmp_path / "images_background.zip").unlink()
    with open(tmp_path / "images_background.zip", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="is longer than 256 MiB"):
        omniglot(tmp_path, tmp_path / "set")


def test_damaged_drawings_are_told_in_one_go(tmp_path: Path) -> None:
    for part, count in (("images_background", 964), ("images_evaluation", 659)):
        with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as archive:
            for n in range(count):
                archive.writestr(f"{part}/{part[7]}/character{n:03}/1.png", b"no picture")
    with pytest.raises(InputError, match="1623 of 1623 pictures.*and 1603 more; for each: download"):
        omniglot(tmp_path, tmp_path / "set")


def written(out: Path, kind: str, rows: np.ndarray, notes: Notes) -> Path:
    groups = [Group("a", "train", 3), Group("b", "test", 3)]
    with staging(out, overwrite=True) as directory:
        about = About(kind, "made up", "none", {}, notes=notes)
        writer = DatasetWriter(directory, [Field("x", "input", "int64", ())], groups, about)
        writer.add(np.array([0, 0, 0, 1, 1, 1]), {"x": rows})
        writer.finish()
    return out


def test_notes_are_kept_and_do_not_change_the_digest(tmp_path: Path) -> None:
    rows = np.arange(6)
    digest = describe(written(tmp_path / "set", "classes", rows, Notes()))["digest"]
    notes = Notes()
    notes.add("files left out", "hidden", "a/.b", "rename them")
    notes.add("files left out", "hidden", "a/.c", "rename them", 2)
    found = describe(written(tmp_path / "set", "classes", rows, notes))
    assert found["digest"] == digest
    assert found["notes"] == [
        {"what": "files left out", "count": 3, "why": "hidden", "example": "a/.b", "remedy": "rename them"}
    ]
    assert sentence(found["notes"][0]) == "files left out: 3, hidden (for example a/.b); rename them"


@pytest.mark.parametrize(
    ("kind", "rows", "expected"),
    [
        ("classes", [1, 2, 3, 4, 5, 6], []),
        ("classes", [1, 1, 1, 4, 5, 6], [("rows repeated", 2, "row 1 of 'a' and row 2 of 'a'")]),
        ("classes", [1, 2, 3, 4, 2, 2], [("rows repeated", 1, "row 2 of 'b' and row 3 of 'b'"),
                                         ("rows shared", 2, "row 2 of 'a' and row 2 of 'b'")]),
        ("values", [1, 2, 3, 4, 2, 2], [("rows repeated", 1, "row 2 of 'b' and row 3 of 'b'")]),
    ],
)  # fmt: skip
def test_equal_rows_are_counted(tmp_path: Path, kind: str, rows: list[int], expected: list) -> None:
    notes = describe(written(tmp_path / "set", kind, np.array(rows), Notes()))["notes"]
    assert [(note["what"], note["count"], note["example"]) for note in notes] == expected
