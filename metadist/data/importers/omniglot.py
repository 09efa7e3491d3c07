"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each (Lake, Salakhutdinov, Tenenbaum 2015)."""

import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from metadist.data.importers.pictures import FILTER, decode, natural, read
from metadist.data.splits import deal, shuffled
from metadist.data.table import Field
from metadist.data.writer import About, DatasetWriter, Group, Progress, staging
from metadist.errors import InputError
from metadist.task import Split

PARTS = {"images_background": 964, "images_evaluation": 659}
PAPER_COUNTS = (1100, 100, 423)
LAKE_VALIDATION_ALPHABETS = 5
BLOCK_ROWS = 1024

Drawings = list[tuple[str, Callable[[], bytes]]]  # where a drawing lies, and how to read it


def omniglot(
    source: str | Path,
    out: str | Path,
    *,
    split: Literal["paper", "lake"] = "paper",
    rotations: Literal["none", "train", "all"] = "none",
    size: int = 28,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Import the official images_background and images_evaluation (zips, or folders) that lie in `source`.

    Field `image`: uint8 (1, size, size), ink 255 on 0, scale 1/255, resized from 105 x 105 by Lanczos. Groups are
    "Alphabet/characterNN", parents the alphabets. `split="paper"` draws 1100 / 100 / 423 characters at random (Vinyals
    2016's 1200 train with 100 held out for validation); `"lake"` keeps the background alphabets for train, 5 of the 30
    for validation, and tests on the evaluation alphabets. `rotations` adds each character turned counter-clockwise by
    90, 180 and 270 degrees as classes "Alphabet/characterNN/rot90" of the same split.
    """
    source = Path(source)
    if split not in ("paper", "lake") or rotations not in ("none", "train", "all") or size < 1:
        raise InputError(
            f"omniglot takes split paper or lake, rotations none, train or all, size >= 1; not {split!r}, "
            f"{rotations!r}, {size}"
        )
    with staging(out, overwrite) as directory:
        background, evaluation = (_characters(source, part, count) for part, count in PARTS.items())
        characters = {**background, **evaluation}
        groups = _groups(characters, _splits(background, evaluation, split, seed), rotations)
        options = {"importer": "omniglot", "split": split, "rotations": rotations, "size": size, "seed": seed}
        about = About("classes", f"Omniglot ({source})", "MIT", options, {"filter": FILTER})
        field = Field("image", "input", "uint8", (1, size, size), scale=1 / 255)
        writer = DatasetWriter(directory, [field], groups, about, progress=progress)
        _write(writer, characters, size)
        writer.finish()
    return Path(out)


def _groups(characters: dict[str, Drawings], splits: dict[str, Split], rotations: str) -> list[Group]:
    groups = []
    for name, drawings in characters.items():
        turned = rotations == "all" or (rotations == "train" and splits[name] == "train")
        for turn in range(4 if turned else 1):
            label = f"{name}/rot{90 * turn}" if turn else name
            groups.append(Group(label, splits[name], len(drawings), name.split("/")[0]))
    return groups


def _write(writer: DatasetWriter, characters: dict[str, Drawings], size: int) -> None:
    numbers = {group.name: number for number, group in enumerate(writer.groups)}
    codes: list[int] = []
    block: list[np.ndarray] = []
    for name, drawings in characters.items():
        labels = [name, *(f"{name}/rot{angle}" for angle in (90, 180, 270))]
        for where, read_drawing in drawings:
            upright = 255 - decode(read_drawing(), where, (size, size), "L")
            for turn, label in enumerate(labels):
                if label in numbers:
                    codes.append(numbers[label])
                    block.append(np.rot90(upright, turn, axes=(1, 2)))
        if len(block) >= BLOCK_ROWS:
            writer.add(np.array(codes), {"image": np.stack(block)})
            codes, block = [], []
    if block:
        writer.add(np.array(codes), {"image": np.stack(block)})


def _splits(
    background: dict[str, Drawings], evaluation: dict[str, Drawings], split: str, seed: int
) -> dict[str, Split]:
    if split == "paper":
        return deal([*background, *evaluation], PAPER_COUNTS, seed)
    alphabets = shuffled({name.split("/")[0] for name in background}, seed)
    held_out = set(alphabets[:LAKE_VALIDATION_ALPHABETS])
    splits: dict[str, Split] = dict.fromkeys(evaluation, "test")
    for name in background:
        splits[name] = "validation" if name.split("/")[0] in held_out else "train"
    return splits


def _characters(source: Path, part: str, expected: int) -> dict[str, Drawings]:
    """The drawings of each "Alphabet/characterNN" of one part, in natural order."""
    archive, folder = source / f"{part}.zip", source / part
    if folder.is_dir():
        files = ((path.relative_to(folder).parts, str(path), _file(path)) for path in folder.rglob("*.png"))
    elif archive.is_file():
        files = _members(archive, part)
    else:
        raise InputError(f"{source} holds neither {part}.zip nor a folder {part}; put Omniglot's official files there")
    characters: dict[str, Drawings] = {}
    for names, where, read_drawing in files:
        if len(names) == 3 and not any(name.startswith(".") for name in names):
            characters.setdefault("/".join(names[:2]), []).append((where, read_drawing))
    if len(characters) != expected:
        raise InputError(f"{part} in {source} holds {len(characters)} characters, not {expected}; download it again")
    return {name: sorted(characters[name], key=lambda item: natural(item[0])) for name in sorted(characters)}


def _file(path: Path) -> Callable[[], bytes]:
    return lambda: read(path)


def _members(archive: Path, part: str) -> Iterator[tuple[tuple[str, ...], str, Callable[[], bytes]]]:
    """Each picture of a zip: its path below the part's folder, its place in words, and how to read it."""
    broken = f"{archive} is no zip or is cut short; download it again"
    try:
        file = zipfile.ZipFile(archive)
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(broken) from error

    def member(name: str) -> Callable[[], bytes]:
        def read_member() -> bytes:
            try:
                return file.read(name)
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
                raise InputError(broken) from error

        return read_member

    for name in file.namelist():
        parts = PurePosixPath(name).parts
        if name.endswith(".png") and part in parts:
            yield parts[parts.index(part) + 1 :], f"{name} in {archive}", member(name)
