"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each (Lake, Salakhutdinov, Tenenbaum 2015)."""

import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from metadist.core.errors import InputError
from metadist.core.task import Split
from metadist.data.download import Archive, downloads, fetched
from metadist.data.files import files_below, made_by_tool, note_link, read_regular, require_regular, within
from metadist.data.importers.names import natural
from metadist.data.importers.pictures import FILE_BYTES, Decoder, Picture, PictureForm
from metadist.data.notes import Notes, Progress, shown
from metadist.data.splits import shuffled, split_by_counts
from metadist.data.table import Field
from metadist.data.writer import About, DatasetWriter, Group, options_of, staging

_PLACE = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
ARCHIVES = (
    Archive(
        f"{_PLACE}/images_background.zip", 9464212, "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640"
    ),
    Archive(
        f"{_PLACE}/images_evaluation.zip", 6462886, "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee"
    ),
)
PARTS = {"images_background": 964, "images_evaluation": 659}
PAPER_COUNTS = (1100, 100, 423)
LAKE_VALIDATION_ALPHABETS = 5
DRAWING_BYTES = 1 << 20  # the official ones have less than 1 kB
ARCHIVE_BYTES = 1 << 28

Characters = dict[str, list[Picture]]


def omniglot(
    source: str | Path | None,
    out: str | Path,
    *,
    download: bool = False,
    split: Literal["paper", "lake"] = "paper",
    rotations: Literal["none", "train", "all"] = "none",
    size: int = 28,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Import Omniglot, drawings of 1,623 characters (Lake 2015).

    Field `image`: uint8 (1, size, size), ink 255 on 0, scale 1/255, resized from 105 x 105 by Lanczos. Groups are
    "Alphabet/characterNN", parents the alphabets. Split "paper" draws 1100 / 100 / 423 characters at random (Vinyals
    2016's 1200 train with 100 held out for validation); "lake" keeps the background alphabets for train, 5 of the 30
    for validation, and tests on the evaluation alphabets. Rotations add each character turned counter-clockwise as
    classes "Alphabet/characterNN/rot90" (180, 270) of the same split.

    Args:
        source: folder with the official images_background.zip and images_evaluation.zip, or the folders in them; with
            --download the folder to put the zips into, by default one in metadist's cache.
        out: directory to write.
        download: fetch the official zips (16 MB) where they are not there yet.
        split: 1200 random characters to train and validate on, or the official two halves.
        rotations: characters turned by 90, 180 and 270 degrees as further classes.
        size: pixels.
        seed: of the random split.
        overwrite: replace a dataset that is there.
        progress: called now and then with the rows written so far and in all.

    Example:
        metadist data omniglot --download --out data/omniglot
    """
    options = options_of("omniglot", locals())
    source, notes = downloads("omniglot", source, download), Notes()
    if split not in ("paper", "lake") or rotations not in ("none", "train", "all") or size < 1:
        raise InputError(
            f"omniglot takes split paper or lake, rotations none, train or all, size >= 1; not {split!r}, "
            f"{rotations!r}, {size}"
        )
    with staging(out, overwrite) as directory:
        if download:
            fetched(ARCHIVES, source, progress)
        background, evaluation = (_characters(source, part, count, notes) for part, count in PARTS.items())
        characters = {**background, **evaluation}
        groups = _groups(characters, _splits(background, evaluation, split, seed), rotations)
        form = PictureForm((size, size), "L", inverted=True)
        about = About("classes", f"Omniglot ({source})", "MIT", options, form.about(), notes)
        field = Field("image", "input", "uint8", (1, size, size), scale=1 / 255)
        writer = DatasetWriter(directory, [field], groups, about, progress=progress)
        decoder = Decoder(form, notes)
        for name, drawings in characters.items():
            for drawing in drawings:
                pixels = decoder(drawing)
                for turn, label in enumerate([name, *(f"{name}/rot{angle}" for angle in (90, 180, 270))]):
                    if pixels is not None and label in writer.numbers:
                        writer.add_row(label, {"image": np.rot90(pixels, turn, axes=(1, 2))})
        decoder.faults.refuse(source, sum(map(len, characters.values())), "download the official files again")
        writer.finish()
    return Path(out)


def _groups(characters: Characters, splits: dict[str, Split], rotations: str) -> list[Group]:
    groups = []
    for name, drawings in characters.items():
        turned = rotations == "all" or (rotations == "train" and splits[name] == "train")
        for turn in range(4 if turned else 1):
            label = f"{name}/rot{90 * turn}" if turn else name
            groups.append(Group(label, splits[name], len(drawings), name.split("/")[0]))
    return groups


def _splits(background: Characters, evaluation: Characters, split: str, seed: int) -> dict[str, Split]:
    if split == "paper":
        return split_by_counts([*background, *evaluation], PAPER_COUNTS, seed)
    alphabets = shuffled({name.split("/")[0] for name in background}, seed)
    held_out = set(alphabets[:LAKE_VALIDATION_ALPHABETS])
    splits: dict[str, Split] = dict.fromkeys(evaluation, "test")
    for name in background:
        splits[name] = "validation" if name.split("/")[0] in held_out else "train"
    return splits


def _characters(source: Path, part: str, expected: int, notes: Notes) -> Characters:
    """The drawings of each "Alphabet/characterNN" of one part, in natural order."""
    archive, folder = source / f"{part}.zip", source / part
    note_link(folder if folder.is_dir() else archive, source, notes)
    if folder.is_dir():
        files = (
            (file.relative_to(folder).parts, Picture(within(file, source), partial(read_regular, file, FILE_BYTES)))
            for file in files_below(folder, source, notes)
        )
    elif archive.is_file():
        files = _members(archive, part, notes)
    else:
        raise InputError(f"{source} holds neither {part}.zip nor a folder {part}; put Omniglot's official files there")
    characters: Characters = {}
    for names, drawing in files:
        if len(names) == 3 and names[-1].lower().endswith(".png"):
            characters.setdefault("/".join(names[:2]), []).append(drawing)
        else:
            why = "no drawings of the form alphabet/character/drawing.png"
            notes.add("files left out", why, drawing.where, "move them there to have them imported")
    if len(characters) != expected:
        raise InputError(f"{part} in {source} holds {len(characters)} characters, not {expected}; download it again")
    return {name: sorted(characters[name], key=lambda drawing: natural(drawing.where)) for name in sorted(characters)}


def _members(archive: Path, part: str, notes: Notes) -> Iterator[tuple[tuple[str, ...], Picture]]:
    """Each file of a zip below the part's folder: its path there, and the drawing."""
    require_regular(archive)
    if archive.stat().st_size > ARCHIVE_BYTES:
        raise InputError(
            f"{archive} is longer than {ARCHIVE_BYTES >> 20} MiB, so it is not Omniglot's; download it again"
        )
    with _unpacking(archive):
        file = zipfile.ZipFile(archive)
    for name in file.namelist():
        parts = PurePosixPath(name).parts
        where = f"{shown(name)} in {archive}"
        if name.endswith("/"):
            continue
        if part not in parts or any(made_by_tool(piece) for piece in parts):
            remedy = "rename them to have them imported"
            notes.add("files left out", f"hidden, made by a tool, or not below {part}", where, remedy)
        else:
            yield parts[parts.index(part) + 1 :], Picture(where, partial(_unpacked, file, name, archive))


def _unpacked(file: zipfile.ZipFile, name: str, archive: Path) -> bytes:
    with _unpacking(archive), file.open(name) as opened:
        data = opened.read(DRAWING_BYTES + 1)
    if len(data) > DRAWING_BYTES:
        raise InputError(
            f"{shown(name)} in {archive} unpacks to more than {DRAWING_BYTES >> 20} MiB and is no drawing; "
            "download the zip again"
        )
    return data


@contextmanager
def _unpacking(archive: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, lzma.LZMAError) as error:
        raise InputError(f"{archive} is no zip or is cut short; download it again") from error
