"""A folder of pictures, one folder per class."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from metadist.core.errors import InputError
from metadist.data.files import read_regular, within
from metadist.data.importers.class_folders import Classes, ClassFolders
from metadist.data.importers.pictures import FILE_BYTES, RESIZED, SUFFIXES, Decoder, Picture, PictureForm, Resize
from metadist.data.notes import Notes, Progress, shown
from metadist.data.splits import FRACTIONS, divide
from metadist.data.table import Field
from metadist.data.writer import About, DatasetWriter, Group, options_of, staging


def images(
    source: str | Path,
    out: str | Path,
    *,
    size: tuple[int, int] = (84, 84),
    mode: Literal["color", "gray"] = "color",
    resize: Resize = "squash",
    classes_only: bool = False,
    merge: bool = False,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Import your own images, a folder per class.

    Pictures become uint8 (C, H, W), scale 1/255, resized by Lanczos, as field `image`. Without split
    folders the classes are divided at random. Files that are hidden, made by a tool, or no pictures by their suffix are
    left out, and noted. Pictures that cannot be read are refused, all in one message.

    mini-ImageNet and CUB have no downloads here, the first since there is no official archive of it: import your copy
    with this command, train/, val/ and test/ folders of the usual split (CUB: one of class folders) as --source.

    Args:
        source: folder with a folder per class, or train/, validation/ and test/ with a folder per class each.
        out: directory to write.
        size: height and width, pixels.
        mode: three channels, or one.
        resize: what happens to pictures of another aspect ratio; squash gives it up, crop keeps the middle of the
            picture, pad adds black bars.
        classes_only: take folders called train, validation or test as classes like the others.
        merge: put split folders with the same classes in each together, and divide the classes anew.
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
    if mode not in ("color", "gray") or resize not in RESIZED or len(size) != 2 or min(size) < 1:
        raise InputError(
            "images takes mode color or gray, resize squash, crop or pad and a size (height, width) in pixels; not "
            f"{mode!r}, {resize!r}, {size}"
        )
    with staging(out, overwrite) as directory:
        folders = ClassFolders("pictures", "PNG or JPEG", SUFFIXES, classes_only, merge)
        classes, splits = folders.read(source, notes)
        splits = splits or divide(classes, fractions, seed)
        decoder = Decoder(PictureForm(size, "RGB" if mode == "color" else "L", resize), notes)
        decoder.measure([file for files in classes.values() for file in files], source, progress)
        if skip_bad:
            classes = _readable(source, classes, decoder)
        groups = [Group(name, splits[name], len(files)) for name, files in classes.items()]
        listed = list(classes.values())
        about = About("classes", str(source), "as its source says", options, decoder.form.about(), notes)
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
    trial = Decoder(decoder.form, Notes())
    trial.dark_colours = decoder.dark_colours
    good: Classes = {}
    for name, files in classes.items():
        good[name] = [file for file in files if trial(_picture(file, source)) is not None]
        if not good[name]:
            raise InputError(f"class {shown(name)!r} of {shown(source)} has no picture that can be read; remove it")
    trial.faults.note(decoder.notes, "replace or remove them")
    return good


def _picture(file: Path, source: Path) -> Picture:
    return Picture(within(file, source), partial(read_regular, file, FILE_BYTES))
