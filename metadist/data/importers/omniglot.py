"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each (Lake, Salakhutdinov, Tenenbaum 2015)."""

import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from metadist.core.errors import InputError
from metadist.core.task import Split
from metadist.data.files import files_below, made_by_tool, note_link, require_regular, within
from metadist.data.importers.pictures import FILTER, BadPicture, Decoder, natural, read, refuse
from metadist.data.notes import Notes, shown
from metadist.data.splits import deal, shuffled
from metadist.data.table import Field
from metadist.data.writer import About, DatasetWriter, Group, Progress, staging

PARTS = {"images_background": 964, "images_evaluation": 659}
PAPER_COUNTS = (1100, 100, 423)
LAKE_VALIDATION_ALPHABETS = 5
BLOCK_ROWS = 1024
DRAWING_BYTES = 1 << 20  # the official ones have less than 1 kB
ARCHIVE_BYTES = 1 << 28

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
    source, notes = Path(source), Notes()
    if split not in ("paper", "lake") or rotations not in ("none", "train", "all") or size < 1:
        raise InputError(
            f"omniglot takes split paper or lake, rotations none, train or all, size >= 1; not {split!r}, "
            f"{rotations!r}, {size}"
        )
    with staging(out, overwrite) as directory:
        background, evaluation = (_characters(source, part, count, notes) for part, count in PARTS.items())
        characters = {**background, **evaluation}
        groups = _groups(characters, _splits(background, evaluation, split, seed), rotations)
        options = {"importer": "omniglot", "split": split, "rotations": rotations, "size": size, "seed": seed}
        about = About("classes", f"Omniglot ({source})", "MIT", options, {"filter": FILTER}, notes)
        field = Field("image", "input", "uint8", (1, size, size), scale=1 / 255)
        writer = DatasetWriter(directory, [field], groups, about, progress=progress)
        _write(writer, source, characters, Decoder((size, size), "L", notes))
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


def _write(writer: DatasetWriter, source: Path, characters: dict[str, Drawings], decoder: Decoder) -> None:
    numbers = {group.name: number for number, group in enumerate(writer.groups)}
    codes: list[int] = []
    block: list[np.ndarray] = []
    bad: list[BadPicture] = []
    for name, drawings in characters.items():
        labels = [name, *(f"{name}/rot{angle}" for angle in (90, 180, 270))]
        for where, read_drawing in drawings:
            try:
                upright = 255 - decoder(read_drawing(), where)
            except BadPicture as error:
                bad.append(error)
                continue
            for turn, label in enumerate(labels):
                if label in numbers:
                    codes.append(numbers[label])
                    block.append(np.rot90(upright, turn, axes=(1, 2)))
        if len(block) >= BLOCK_ROWS:
            writer.add(np.array(codes), {"image": np.stack(block)})
            codes, block = [], []
    refuse(bad, sum(map(len, characters.values())), source, "download the official files again")
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


def _characters(source: Path, part: str, expected: int, notes: Notes) -> dict[str, Drawings]:
    """The drawings of each "Alphabet/characterNN" of one part, in natural order."""
    archive, folder = source / f"{part}.zip", source / part
    note_link(folder if folder.is_dir() else archive, source, notes)
    if folder.is_dir():
        files = ((f.relative_to(folder).parts, within(f, source), _file(f)) for f in files_below(folder, source, notes))
    elif archive.is_file():
        files = _members(archive, part, notes)
    else:
        raise InputError(f"{source} holds neither {part}.zip nor a folder {part}; put Omniglot's official files there")
    characters: dict[str, Drawings] = {}
    for names, where, read_drawing in files:
        if len(names) == 3 and names[-1].lower().endswith(".png"):
            characters.setdefault("/".join(names[:2]), []).append((where, read_drawing))
        else:
            why = "no drawings of the form alphabet/character/drawing.png"
            notes.add("files left out", why, where, "move them there to have them imported")
    if len(characters) != expected:
        raise InputError(f"{part} in {source} holds {len(characters)} characters, not {expected}; download it again")
    return {name: sorted(characters[name], key=lambda item: natural(item[0])) for name in sorted(characters)}


def _file(path: Path) -> Callable[[], bytes]:
    return lambda: read(path)


def _members(archive: Path, part: str, notes: Notes) -> Iterator[tuple[tuple[str, ...], str, Callable[[], bytes]]]:
    """Each file of a zip below the part's folder: its path there, its place in words, and how to read it."""
    broken = f"{archive} is no zip or is cut short; download it again"
    require_regular(archive)
    if archive.stat().st_size > ARCHIVE_BYTES:
        raise InputError(
            f"{archive} is longer than {ARCHIVE_BYTES >> 20} MiB, so it is not Omniglot's; download it again"
        )
    try:
        file = zipfile.ZipFile(archive)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise InputError(broken) from error

    def member(name: str) -> Callable[[], bytes]:
        def read_member() -> bytes:
            try:
                with file.open(name) as opened:
                    data = opened.read(DRAWING_BYTES + 1)
            except (
                zipfile.BadZipFile,
                zlib.error,
                EOFError,
                OSError,
                RuntimeError,
                ValueError,
                lzma.LZMAError,
            ) as error:
                raise InputError(broken) from error
            if len(data) > DRAWING_BYTES:
                raise InputError(
                    f"{shown(name)} in {archive} unpacks to more than {DRAWING_BYTES >> 20} MiB and is no drawing; "
                    "download the zip again"
                )
            return data

        return read_member

    for name in file.namelist():
        parts = PurePosixPath(name).parts
        where = f"{shown(name)} in {archive}"
        if name.endswith("/"):
            continue
        if part not in parts or any(made_by_tool(piece) for piece in parts):
            remedy = "rename them to have them imported"
            notes.add("files left out", f"hidden, made by a tool, or not below {part}", where, remedy)
        else:
            yield parts[parts.index(part) + 1 :], where, member(name)
