"""A folder of pictures, one folder per class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from metadist.data.importers.pictures import FILTER, SUFFIXES, decode, natural, read
from metadist.data.splits import FRACTIONS, divide, split_named
from metadist.data.table import Field
from metadist.data.writer import About, DatasetWriter, Group, Progress, staging
from metadist.errors import InputError
from metadist.task import Split

BLOCK_BYTES = 1 << 24


def images(
    source: str | Path,
    out: str | Path,
    *,
    size: tuple[int, int] = (84, 84),
    mode: Literal["color", "gray"] = "color",
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Import a folder of class folders, or of split folders (train / val, valid or validation / test) holding them.

    Field `image`: uint8 (C, H, W) with `size` = (H, W), scale 1/255, resized by Lanczos without keeping the aspect
    ratio. Without split folders the classes are divided by `fractions` (train, validation, test) and `seed`. Hidden
    files and files that are not pictures by their suffix are left out.
    """
    source = Path(source)
    if mode not in ("color", "gray") or len(size) != 2 or min(size) < 1:
        raise InputError(f"images takes mode color or gray and a size (height, width) in pixels; not {mode!r}, {size}")
    with staging(out, overwrite) as directory:
        classes, splits = _classes(source, fractions, seed)
        groups = [Group(name, splits[name], len(files)) for name, files in classes.items()]
        shape = (3 if mode == "color" else 1, *size)
        options = {"importer": "images", "size": list(size), "mode": mode, "fractions": list(fractions), "seed": seed}
        about = About("classes", str(source), "as its source says", options, {"filter": FILTER})
        field = Field("image", "input", "uint8", shape, scale=1 / 255)
        writer = DatasetWriter(directory, [field], groups, about, progress=progress)
        block_rows = max(1, BLOCK_BYTES // int(np.prod(shape)))
        for number, files in enumerate(classes.values()):
            for start in range(0, len(files), block_rows):
                block = [
                    decode(read(file), str(file), size, "RGB" if mode == "color" else "L")
                    for file in files[start : start + block_rows]
                ]
                writer.add(np.full(len(block), number), {"image": np.stack(block)})
        writer.finish()
    return Path(out)


def _classes(source: Path, fractions: Sequence[float], seed: int) -> tuple[dict[str, list[Path]], dict[str, Split]]:
    """The pictures of each class, and each class's split."""
    folders = _folders(source)
    if not folders:
        raise InputError(f"{source} holds no class folders; make one folder of pictures per class")
    named = {folder: split_named(folder.name) for folder in folders}
    if any(named.values()) and not all(named.values()):
        stray = next(folder.name for folder, split in named.items() if not split)
        raise InputError(f"{source} has split folders and beside them {stray!r}; move that into one of them, or away")
    if not all(named.values()):
        classes = {folder.name: _pictures(folder) for folder in folders}
        return classes, divide(classes, fractions, seed)
    classes, splits = {}, {}
    for folder, split in named.items():
        for inner in _folders(folder):
            if inner.name in classes or split is None:
                raise InputError(f"class {inner.name!r} of {source} is in two splits; splits must not share classes")
            classes[inner.name], splits[inner.name] = _pictures(inner), split
    if not classes:
        raise InputError(f"the split folders in {source} hold no class folders; make one folder of pictures per class")
    return classes, splits


def _folders(source: Path) -> list[Path]:
    if not source.is_dir():
        raise InputError(f"{source} is not a folder; give the folder that holds the class folders")
    return sorted(entry for entry in source.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    files = [file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
    if not files:
        raise InputError(f"class folder {folder} holds no picture files (.png, .jpg, ...); add some or remove it")
    return sorted(files, key=lambda file: natural(str(file)))
