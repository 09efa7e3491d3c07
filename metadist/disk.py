"""Files that a run grows or replaces: whole after a death at any byte, and one clear sentence when the disk is full."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from metadist.errors import StorageFailed


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


class LineFile:
    """Appends lines to `path`; any thread may. One that could not be written whole leaves no trace.

    At opening all beyond `size` bytes is cut off. Raises StorageFailed.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size = path, size
        self._lock = threading.Lock()
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            self._file.truncate(size)

    def append(self, line: str, *, sync: bool = False) -> None:
        """Writes one line and its newline; with `sync` it is on the disk at return."""
        data = line.encode() + b"\n"
        with self._lock, writing(self._path):
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
