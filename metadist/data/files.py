"""Opening and listing files that somebody else made: only regular ones, with limits, and nothing passed over unsaid."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from metadist.core.errors import InputError
from metadist.data.notes import Notes, shown

MADE_BY_TOOLS = {
    "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "__macosx",
    "__pycache__", "system volume information", "lost+found", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db",
    "desktop.ini", "icon\r",
}  # fmt: skip
THUMBNAILS = {"thumbs", "_thumbs", "thumbnails", "_thumbnails"}  # inside a class folder; as a class they are data


def made_by_tool(name: str, *, thumbnails: bool = False) -> bool:
    """Whether a file or folder is hidden, or what systems and tools leave in folders."""
    lower = name.lower()
    return name.startswith((".", "~$")) or lower in MADE_BY_TOOLS or (thumbnails and lower in THUMBNAILS)


class Unreadable(InputError):
    """A file or folder that cannot be read: `why`, in words that follow its path."""

    def __init__(self, path: Path, why: str | Exception, remedy: str) -> None:
        if isinstance(why, Exception):
            why = f"cannot be read ({getattr(why, 'strerror', None) or why})"
        super().__init__(f"{shown(path)} {why}; {remedy}")
        self.why = why


def require_regular(path: Path) -> None:
    """Raises Unreadable where opening the path could block or never end: a pipe, a device, a socket, a folder."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise Unreadable(path, error, "check the path and its permissions") from error
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISDIR, "a folder"), (stat.S_ISSOCK, "a socket"))
        kind = next((name for test, name in kinds if test(mode)), "a device")
        raise Unreadable(path, f"is {kind} and no regular file", "remove it or put the file itself there")


def open_regular(path: Path) -> BinaryIO:
    """A regular file, opened for reading. Raises Unreadable for anything else, without blocking."""
    require_regular(path)
    try:
        return open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise Unreadable(path, error, "check its permissions") from error


def read_regular(path: Path, limit: int) -> bytes:
    """All bytes of a regular file of at most `limit` bytes; raises Unreadable for anything else."""
    with open_regular(path) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise Unreadable(path, error, "check the disk") from error
    if len(data) > limit:
        raise Unreadable(path, f"is longer than {limit >> 20} MiB", "give a smaller file")
    return data


def entries(folder: Path) -> list[Path]:
    """What lies directly in a folder, sorted by name. Raises Unreadable when it cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise Unreadable(folder, error, "check its permissions") from error


def files_below(folder: Path, root: Path, notes: Notes) -> Iterator[Path]:
    """The files at any depth below a folder of the source `root`.

    Left out, and noted: what is hidden or made by a tool, and linked folders. Files that are links are yielded, with a
    note where they lead out of `root`; so are pipes and other things that are no regular files: opening them says so.
    """
    folders = [folder]
    while folders:
        for path in entries(folders.pop()):
            linked = path.is_symlink()
            if made_by_tool(path.name, thumbnails=True):
                note_left_out(path, root, notes)
            elif linked and path.is_dir():
                remedy = "copy the folder there to have its files imported"
                notes.add("linked folders left out", "links may lead in circles", within(path, root), remedy)
            elif path.is_dir():
                folders.append(path)
            else:
                note_link(path, root, notes)
                yield path


def note_left_out(path: Path, root: Path, notes: Notes) -> None:
    """Count what is hidden or made by a tool: a file, or all files of a folder."""
    folder = path.is_dir() and not path.is_symlink()
    count = sum(len(files) for *_, files in os.walk(path)) if folder else 1
    remedy = "rename them or their folder to have them imported"
    notes.add("files left out", "hidden or made by a tool", within(path, root), remedy, count)


def note_link(path: Path, root: Path, notes: Notes) -> None:
    """Say that a path is a link out of the source, where it is."""
    target = os.path.realpath(path)
    if path.is_symlink() and not Path(target).is_relative_to(os.path.realpath(root)):
        example = f"{within(path, root)} -> {shown(target)}"
        notes.add("links followed", "they lead out of the source folder", example, "remove those that you do not trust")


def within(path: Path, root: Path) -> str:
    """A path as seen from the source, fit for a message."""
    return shown(path.relative_to(root) if path.is_relative_to(root) and path != root else path)
