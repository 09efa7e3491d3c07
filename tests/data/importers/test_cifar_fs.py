import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from metadist.core.errors import InputError
from metadist.data import open_dataset
from metadist.data.importers import cifar_fs
from metadist.data.importers.cifar_fs import ARCHIVE, TEST, VALIDATION  # type: ignore[attr-defined]

TRAIN = [f"train class {n}".replace(" ", "_") for n in range(64)]
NAMES = sorted([*TRAIN, *VALIDATION, *TEST])


def made_up() -> dict[str, bytes]:
    """The files of the archive: 600 pictures of each class, five of six in the first; the pixels count them."""
    numbers = np.arange(60_000)
    classes = numbers % 100
    records = np.zeros((60_000, 2 + 3072), np.uint8)
    records[:, 0], records[:, 1] = classes // 5, classes
    records[:, 2], records[:, 3], records[:, 2 + 2048] = numbers % 251, numbers // 251, classes
    names = {"fine_label_names.txt": NAMES, "coarse_label_names.txt": [f"parent{n}" for n in range(20)]}
    return {
        "train.bin": records[:50_000].tobytes(),
        "test.bin": records[50_000:].tobytes(),
        **{file: "\n".join(lines).encode() for file, lines in names.items()},
    }


def pack(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / ARCHIVE.name, "w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-100-binary/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder


def test_classes_pictures_parents_and_the_standard_split(tmp_path: Path) -> None:
    dataset = open_dataset(cifar_fs(pack(tmp_path / "in", made_up()), tmp_path / "set"))
    groups = {split: table.group_names for split, table in dataset.splits.items()}
    assert groups == {"train": sorted(TRAIN), "validation": sorted(VALIDATION), "test": sorted(TEST)}
    for table in dataset.splits.values():
        assert (table.counts == 600).all()
    test = dataset.splits["test"]
    whale = test.group_names.index("whale")
    number = NAMES.index("whale")
    assert test.parents is not None and test.parent_names[test.parents[whale]] == f"parent{number // 5}"
    pictures = test.column("image")[test.starts[whale] : test.starts[whale] + 600]
    counted = pictures[:, 0, 0, 0].astype(int) + 251 * pictures[:, 0, 0, 1].astype(int)
    assert counted.tolist() == [*range(number, 60_000, 100)]
    assert (pictures[:, 2, 0, 0] == number).all()  # the third plane is blue
    assert dataset.metadata["notes"] == []


def test_the_split_is_a_division_of_100_classes() -> None:
    assert (len(set(VALIDATION)), len(set(TEST)), len({*VALIDATION, *TEST})) == (16, 20, 36)


def test_other_files_are_refused(tmp_path: Path) -> None:
    def refused(message: str, source: Path = tmp_path / "in") -> None:
        with pytest.raises(InputError, match=message):
            cifar_fs(source, tmp_path / "out" / "set")
        assert not (tmp_path / "out").exists()

    refused("is not there; .* --download")
    small = made_up() | {"train.bin": bytes(3074), "test.bin": b""}
    for change, message in (
        ({"train.bin": bytes(3073)}, "train.bin in .* is cut short"),
        ({"test.bin": b"\xff" * 3074}, "test.bin in .* has no pictures of CIFAR-100"),
        ({"fine_label_names.txt": b"a\nb"}, "has not the 100 classes"),
        ({}, "has pictures of 1 classes, not 100"),
    ):
        pack(tmp_path / "in", small | change)
        refused(message)
    whole = (tmp_path / "in" / ARCHIVE.name).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"<html>"):
        (tmp_path / "in" / ARCHIVE.name).write_bytes(content)
        refused("is not the official file or is cut short")
