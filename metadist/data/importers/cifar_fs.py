"""CIFAR-FS: the 100 classes of CIFAR-100, 600 pictures each, divided as in Bertinetto et al. 2019."""

import tarfile
import zlib
from pathlib import Path

import numpy as np

from metadist.core.errors import InputError
from metadist.core.task import Split
from metadist.data.download import Archive, downloads, fetched
from metadist.data.files import require_regular
from metadist.data.importers.pictures import PictureForm
from metadist.data.notes import Progress, shown
from metadist.data.table import Field
from metadist.data.writer import About, DatasetWriter, Group, options_of, staging

ARCHIVE = Archive(  # the binary one: the one for Python has pickles in it, which could run code
    "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    168513733,
    "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
)
VALIDATION = (
    "beaver", "beetle", "butterfly", "camel", "cattle", "crab", "crocodile", "flatfish", "lamp", "maple_tree",
    "motorcycle", "otter", "sea", "shark", "television", "tractor",
)  # fmt: skip
TEST = (
    "baby", "bed", "bicycle", "chimpanzee", "fox", "leopard", "man", "pickup_truck", "plain", "poppy", "rocket", "rose",
    "snail", "sweet_pepper", "table", "telephone", "wardrobe", "whale", "woman", "worm",
)  # fmt: skip
ROWS = 4096  # written at once
PIXELS = 3 * 32 * 32
FOLDER, LABELS = "cifar-100-binary/", ("fine_label_names.txt", "coarse_label_names.txt")
PICTURES, EACH = ("train.bin", "test.bin"), 600  # pictures of each class, over both
PART_BYTES = 1 << 28  # of a file in the archive; the largest has 154 MB


def cifar_fs(
    source: str | Path | None,
    out: str | Path,
    *,
    download: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Import CIFAR-FS, 60,000 small photographs of 100 classes (Krizhevsky 2009, Bertinetto 2019).

    Field `image`: uint8 (3, 32, 32), scale 1/255. Groups are the classes of CIFAR-100, with the pictures of its train
    and test file, parents its 20 superclasses. 64 classes train, 16 validate, 20 test, as in Bertinetto et al.

    Args:
        source: folder with the official cifar-100-binary.tar.gz; with --download the folder to put it into, by default
            one in metadist's cache.
        out: directory to write.
        download: fetch the official file (169 MB) where it is not there yet.
        overwrite: replace a dataset that is there.
        progress: called now and then with the rows written so far and in all.

    Example:
        metadist data cifar-fs --download --out data/cifar_fs
    """
    options = options_of("cifar_fs", locals())
    source = downloads("cifar-fs", source, download)
    with staging(out, overwrite) as directory:
        if download:
            fetched([ARCHIVE], source, progress)
        archive = source / ARCHIVE.name
        parts = _unpacked(archive)
        names, parents = (parts[file].decode(errors="replace").split() for file in LABELS)
        if len(names) != 100 or len(parents) != 20 or not {*VALIDATION, *TEST} <= {*names}:
            raise InputError(f"{shown(archive)} has not the 100 classes of CIFAR-100; download it again")
        labels, pixels = zip(*(_pictures(archive, file, parts[file]) for file in PICTURES), strict=True)
        pairs = np.unique(np.concatenate(labels).astype(int) @ [100, 1])
        if len(pairs) != len(names):
            raise InputError(f"{shown(archive)} has pictures of {len(pairs)} classes, not 100; download it again")
        of_parent = {pair % 100: pair // 100 for pair in pairs.tolist()}
        groups = [Group(name, _split(name), EACH, parents[of_parent[n]]) for n, name in enumerate(names)]
        about = About(
            "classes", f"CIFAR-100 ({archive})", "none stated; cite Krizhevsky 2009", options,
            PictureForm((32, 32), "RGB").about(),
        )  # fmt: skip
        field = Field("image", "input", "uint8", (3, 32, 32), scale=1 / 255)
        writer = DatasetWriter(directory, [field], groups, about, progress=progress)
        for classes, pictures in zip(labels, pixels, strict=True):
            for start in range(0, len(classes), ROWS):
                rows = slice(start, start + ROWS)
                writer.add(classes[rows, 1].astype(np.int64), {"image": pictures[rows]})
        writer.finish()
    return Path(out)


def _split(name: str) -> Split:
    return "validation" if name in VALIDATION else "test" if name in TEST else "train"


def _pictures(archive: Path, file: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Superclass and class [n, 2] and the pixels [n, 3, 32, 32] of the pictures in a file, uint8."""
    if len(content) % (2 + PIXELS):
        raise InputError(f"{file} in {shown(archive)} is cut short; download it again")
    records = np.frombuffer(content, np.uint8).reshape(-1, 2 + PIXELS)
    if len(records) and (records[:, 0].max() >= 20 or records[:, 1].max() >= 100):
        raise InputError(f"{file} in {shown(archive)} has no pictures of CIFAR-100; download it again")
    return records[:, :2], records[:, 2:].reshape(-1, 3, 32, 32)


def _unpacked(archive: Path) -> dict[str, bytes]:
    """The files in the archive that are needed."""
    if not archive.exists():
        raise InputError(f"{shown(archive)} is not there; put the official file there, or fetch it with --download")
    require_regular(archive)
    found = {}
    try:
        with tarfile.open(archive) as opened:
            for member in opened:
                part = opened.extractfile(member) if member.size <= PART_BYTES else None
                if part is not None and member.name.removeprefix(FOLDER) in (*LABELS, *PICTURES):
                    found[member.name.removeprefix(FOLDER)] = part.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError, KeyError) as error:
        raise InputError(f"{shown(archive)} is not the official file or is cut short; download it again") from error
    if absent := {*LABELS, *PICTURES} - found.keys():
        raise InputError(f"{shown(archive)} has no {min(absent)} of the official file in it; download it again")
    return found
