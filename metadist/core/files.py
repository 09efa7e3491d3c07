"""Files that a run grows or replaces: whole after a death at any byte, and one clear sentence when the disk is full."""

import os
import stat
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from metadist.core.errors import InputError, PlaceLost, StorageFailed

MOST_TEXT_BYTES = 1 << 24
MOST_LINES_BYTES = 1 << 34


@contextmanager
def private_files() -> Iterator[None]:
    """What is made meanwhile, by this process and those it starts, is its user's alone to read: files 0600,
    directories 0700."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def writing(what: str | Path) -> Iterator[None]:
    """Turns the OSError of a full, read-only or vanished place into a StorageFailed that names it."""
    try:
        yield
    except StorageFailed:
        raise
    except OSError as error:
        raise StorageFailed(
            f"{what} cannot be written ({reason(error)}): make room or get the right to write there, then the same "
            "command with --resume auto goes on from the last checkpoint"
        ) from error


def reason(error: BaseException) -> str:
    """What the system said, in a few words."""
    told = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(told.split()).rstrip(".")


def read_file(path: str | Path, most_bytes: int = MOST_TEXT_BYTES) -> bytes:
    """All of a regular file. Raises InputError where it is none (a pipe, a device) or too large, OSError as usual."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # which does not wait for who writes to a pipe
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path} is no regular file (a folder, pipe or device): replace it by the file meant")
        if found.st_size > most_bytes:
            raise InputError(f"{path} has {found.st_size} bytes, and no such file more than {most_bytes}: remove it")
        return file.read(most_bytes)


def replace_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all. Raises StorageFailed."""
    aside = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            aside.write_text(text)
            os.replace(aside, path)
        except OSError:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            raise


class Held:
    """What is at a path now. `check` raises PlaceLost when it is no longer there, or something else is.

    It is kept open, since a new file may be given the number of one that was removed.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        self._found = _identity(os.fstat(descriptor))

    def check(self) -> None:
        try:
            same = _identity(os.stat(self._path)) == self._found
        except (FileNotFoundError, NotADirectoryError):
            same = False
        if not same:
            raise PlaceLost(
                f"{self._path} was removed, replaced or moved while a run was writing to it, so that the run ends: "
                "put it back if it was moved, then the same command with --resume auto goes on; else it begins anew"
            )


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


class LineFile:
    """Appends lines to `path`; any thread may. One that could not be written whole leaves no trace.

    At opening all beyond `size` bytes is cut off; the directory must be there. Raises StorageFailed, and PlaceLost
    where the file is no longer the one at its path.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size = path, size
        self._lock = threading.Lock()
        with writing(path):
            self._file = path.open("ab", buffering=0)
            self._file.truncate(size)
            self._held = Held(path)

    def append(self, line: str, *, sync: bool = False) -> None:
        """Writes one line and its newline; with `sync` it is on the disk at return."""
        data = line.encode() + b"\n"
        with self._lock, writing(self._path):
            self._held.check()
            try:
                _write_all(self._file.fileno(), data)
            except BaseException:
                with suppress(OSError):
                    self._file.truncate(self._size)
                raise
            self._size += len(data)
        if sync:
            with writing(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _write_all(descriptor: int, data: bytes) -> None:
    """A nearly full disk takes a part without an error: the rest then gives it."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
