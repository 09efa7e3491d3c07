"""A folder of pictures, one folder per class."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

from metadist.core.errors import InputError
from metadist.core.task import Split
from metadist.data.files import entries, files_below, made_by_tool, note_left_out, note_link, read_regular, within
from metadist.data.importers.names import clean, note_cleaned, note_lookalikes
from metadist.data.importers.pictures import FILE_BYTES, FILTER, SUFFIXES, Decoder, Picture, natural
from metadist.data.notes import Notes, shown
from metadist.data.splits import FRACTIONS, divide, split_named
from metadist.data.table import Field
from metadist.data.writer import About, DatasetWriter, Group, Progress, options_of, staging

Classes = dict[str, list[Path]]


def images(
    source: str | Path,
    out: str | Path,
    *,
    size: tuple[int, int] = (84, 84),
    mode: Literal["color", "gray"] = "color",
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Import your own images, a folder per class.

    Pictures become uint8 (C, H, W), scale 1/255, resized by Lanczos without keeping the aspect ratio, as field `image`.
    Without split folders the classes are divided at random. Files that are hidden, made by a tool, or no pictures by
    their suffix are left out, and noted. Pictures that cannot be read are refused, all in one message.

    Args:
        source: folder with a folder per class, or train/, validation/ and test/ with a folder per class each.
        out: directory to write.
        size: height and width, pixels.
        mode: three channels, or one.
        fractions: of the classes, for train, validation and test.
        seed: of the random split.
        skip_bad: leave out what cannot be used, and say how much.
        overwrite: replace a dataset that is there.
        progress: called now and then with the rows written so far and in all.

    Example:
        metadist data images --source birds --size 84 84 --out data/birds
    """
    options = options_of("images", locals())
    source, notes = Path(source), Notes()
    if mode not in ("color", "gray") or len(size) != 2 or min(size) < 1:
        raise InputError(f"images takes mode color or gray and a size (height, width) in pixels; not {mode!r}, {size}")
    with staging(out, overwrite) as directory:
        classes, splits = _classes(source, notes)
        splits = splits or divide(classes, fractions, seed)
        decoder = Decoder(size, "RGB" if mode == "color" else "L", notes)
        decoder.measure((file for files in classes.values() for file in files), source)
        if skip_bad:
            classes = _readable(source, classes, decoder)
        groups = [Group(name, splits[name], len(files)) for name, files in classes.items()]
        listed = list(classes.values())
        extra = {"filter": FILTER, "preprocessing": {"pictures": asdict(decoder.form)}}
        about = About("classes", str(source), "as its source says", options, extra, notes)
        field = Field("image", "input", "uint8", (3 if mode == "color" else 1, *size), scale=1 / 255)
        name_row = lambda group, row: within(listed[group][row], source)  # noqa: E731
        writer = DatasetWriter(directory, [field], groups, about, progress=progress, name_row=name_row)
        for name, files in classes.items():
            for file in files:
                pixels = decoder(_picture(file, source))
                if pixels is not None:
                    writer.add_row(name, {"image": pixels})
        remedy = "replace or remove it, or leave it out with --skip-bad"
        decoder.faults.refuse(source, sum(map(len, listed)), remedy)
        writer.finish()
    return Path(out)


def _readable(source: Path, classes: Classes, decoder: Decoder) -> Classes:
    """The classes without the pictures that cannot be used, which are noted."""
    trial = Decoder(decoder.size, decoder.mode, Notes())
    trial.deep_bits, trial.dark_colours = decoder.deep_bits, decoder.dark_colours
    good: Classes = {}
    for name, files in classes.items():
        good[name] = [file for file in files if trial(_picture(file, source)) is not None]
        if not good[name]:
            raise InputError(f"class {shown(name)!r} of {shown(source)} has no picture that can be read; remove it")
    trial.faults.note(decoder.notes, "replace or remove them")
    return good


def _picture(file: Path, source: Path) -> Picture:
    return Picture(within(file, source), partial(read_regular, file, FILE_BYTES))


def _classes(source: Path, notes: Notes) -> tuple[Classes, dict[str, Split]]:
    """The pictures of each class in natural order, and each class's split where there are split folders."""
    folders = _folders(source, source, notes)
    if not folders:
        raise InputError(f"{source} holds no class folders; make one folder of pictures per class")
    named: dict[Path, Split | None] = {folder: split_named(folder.name) for folder in folders}
    stray = [folder.name for folder, split in named.items() if not split]
    if stray and len(stray) < len(folders):
        raise InputError(
            f"{source} has split folders and beside them {stray[0]!r}; move that into one of them, or away"
        )
    classes: Classes = {}
    splits: dict[str, Split] = {}
    for folder, split in named.items():
        for inner in _folders(folder, source, notes) if split else [folder]:
            name = _class_name(inner, source, notes)
            if split and splits.setdefault(name, split) != split:
                raise InputError(f"class {name!r} of {source} is in two splits; splits must not share classes")
            classes.setdefault(name, []).extend(_pictures(inner, source, notes))
    if not classes:
        raise InputError(f"the split folders in {source} hold no class folders; make one folder of pictures per class")
    note_lookalikes("classes", classes, notes)
    return {name: sorted(files, key=lambda file: natural(str(file))) for name, files in classes.items()}, splits


def _class_name(folder: Path, source: Path, notes: Notes) -> str:
    try:
        folder.name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the name of folder {within(folder, source)} is not UTF-8; rename the folder") from error
    if clean(folder.name) != folder.name:
        note_cleaned("names of class folders", folder.name, notes)
    return clean(folder.name)


def _folders(folder: Path, source: Path, notes: Notes) -> list[Path]:
    """The folders in a folder of folders; what else lies there is noted."""
    if not folder.is_dir():
        raise InputError(f"{shown(folder)} is not a folder; give the folder that holds the class folders")
    found: list[Path] = []
    for entry in entries(folder):
        if made_by_tool(entry.name):
            note_left_out(entry, source, notes)
        elif not entry.is_dir():
            why = "they lie beside the class folders"
            notes.add("files left out", why, within(entry, source), "move them into the folder of their class")
        elif entry.is_symlink() and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(entry)):
            why = "they lead back to the source"
            notes.add("linked folders left out", why, within(entry, source), "remove the link")
        else:
            note_link(entry, source, notes)
            found.append(entry)
    return found


def _pictures(folder: Path, source: Path, notes: Notes) -> list[Path]:
    files = []
    for file in files_below(folder, source, notes):
        if file.suffix.lower() not in SUFFIXES:
            remedy = "convert them to PNG or JPEG to have them imported"
            notes.add("files left out", "no pictures by their suffix", within(file, source), remedy)
            continue
        files.append(file)
        if file.parent != folder:
            example = f"{within(file, source)} into {shown(folder.name)!r}"
            remedy = "make them class folders of their own if they are classes"
            notes.add("pictures merged", "of folders inside a class folder into the class", example, remedy)
    if not files:
        raise InputError(
            f"class folder {shown(folder)} holds no picture files (.png, .jpg, ...); add some or remove it"
        )
    return files
