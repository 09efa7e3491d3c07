"""Names of places, and reading and writing files safely: whole after a death at any byte, one clear sentence when the
disk is full, and one driver at a time in a folder."""

import fcntl
import json
import math
import os
import socket
import stat
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from metadist.core.errors import InputError, PlaceLost, StorageFailed, doing_it_again
from metadist.core.redaction import redact

MOST_TEXT_BYTES = 1 << 24
MOST_LINES_BYTES = 1 << 34
LOCK_FILE = "driver.lock"


@contextmanager
def private_files() -> Iterator[None]:
    """What is made meanwhile, by this process and those it starts, is its user's alone to read: files 0600,
    directories 0700."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def cache_root() -> Path:
    """Where this machine keeps what it can make or fetch again: $METADIST_CACHE, else ~/.cache/metadist."""
    return Path(os.environ.get("METADIST_CACHE") or Path.home() / ".cache" / "metadist")


def is_uri(place: str | Path) -> bool:
    """Whether a place is given as a URI, rather than as a local path."""
    return "://" in str(place)


def join(location: str, name: str) -> str:
    """The place `name` under a path, or under a URI that may end in options (`s3://bucket/runs?region=...`)."""
    if not is_uri(location):
        return os.path.join(os.path.abspath(location), name)
    base, mark, options = location.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{options}"


def bare(location: str) -> str:
    """The name of a place: a URI without user, password, options and a slash at its end; a path as it is."""
    if not is_uri(location):
        return location
    scheme, _, rest = location.partition("?")[0].partition("://")
    host, slash, path = redact(f"{scheme}://{rest}").partition("://")[2].partition("/")
    if not scheme.startswith(("abfs", "wasb")):  # whose containers stand before the @
        host = host.rpartition("@")[2]
    return f"{scheme}://{host}{slash}{path}".rstrip("/")


@contextmanager
def writing(what: str | Path) -> Iterator[None]:
    """Turns the OSError of a full, read-only or vanished place into a StorageFailed that names it."""
    try:
        yield
    except StorageFailed:
        raise
    except OSError as error:
        raise StorageFailed(
            f"{what} cannot be written ({reason(error)}): make room or get the right to write there, then "
            f"{doing_it_again()} goes on from the last checkpoint"
        ) from error


def reason(error: BaseException) -> str:
    """What the system said, in a few words."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(said.split()).rstrip(".")


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


def finite(value: Any) -> Any:
    """The same with None for each number that is not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_LINE = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


class JsonLines:
    """Appends JSON objects to `path`, one a line; any thread may. One that could not be written whole leaves no trace.

    At opening a last line that a dying process left half-written is cut off, so that a new one never glues to it; the
    directory must be there. Raises InputError where an earlier line is damaged, StorageFailed where the file cannot be
    written, and PlaceLost where it is no longer the one at its path.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._size = path, _whole_lines(path)[1]
        self._lock = threading.Lock()
        with writing(path):
            self._file = path.open("ab", buffering=0)
            self._file.truncate(self._size)
            self._held = Held(path)

    def append(self, record: dict[str, Any], *, sync: bool = False) -> None:
        """Writes a record of plain JSON values (no NaN: ValueError); with `sync` it is on the disk at return."""
        data = _LINE.encode(record).encode() + b"\n"
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records in order; none when there is no file. A torn last line is left out, a damaged one elsewhere is an
    InputError that names it."""
    return _whole_lines(path)[0]


def parse_json_line(line: bytes) -> dict[str, Any] | None:
    """The record of one line with its newline; None where it is torn or damaged."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records and the number of bytes they take."""
    lines = read_file(path, MOST_LINES_BYTES).splitlines(keepends=True) if path.exists() else []
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        record = parse_json_line(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise InputError(
                f"Line {number} of {path} is damaged: restore the file from a copy, or delete the lines from there on."
            )
    return records, sum(map(len, lines[: len(records)]))


def _write_all(descriptor: int, data: bytes) -> None:
    """A nearly full disk takes a part without an error: the rest then gives it."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


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
                f"put it back if it was moved, then {doing_it_again()} goes on; else it begins anew"
            )


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


class DriverLock:
    """Locks a folder against a second driver while it is entered, or from `take` on where the folder comes later.

    Readers (evaluate, scale, replay) do not ask for it. The kernel releases it with the process, however that ends.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None
        self._was_there = False
        self._held: list[Held] = []

    def __enter__(self) -> "DriverLock":
        self._was_there = self._folder.is_dir()
        if self._was_there:
            self.take()
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def take(self) -> None:
        """Lock the folder; one that was not there at entry is made. Raises InputError that names the driver that has
        it, or why it cannot be."""
        if self._descriptor is not None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=self._was_there)
            descriptor = os.open(self._folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except FileExistsError:
            raise InputError(f"another driver has just begun in {self._folder}: choose another run_dir") from None
        except OSError as error:
            raise InputError(f"{self._folder} cannot be written to ({reason(error)}): choose another") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise InputError(
                f"{self._folder} is in use by another driver ({holder or 'just starting'}): "
                "wait until it ends, stop it, or choose another run_dir"
            ) from None
        except OSError:  # a file system without locks: the rest works as it did
            os.close(descriptor)
            self._held = [Held(self._folder)]
            return
        self._descriptor = descriptor
        self._held = [Held(self._folder), Held(self._folder / LOCK_FILE)]
        with suppress(OSError):  # on a full disk it holds without a name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{here()}\n".encode(), 0)

    def check(self) -> None:
        """Raises PlaceLost where the folder or its lock is no longer the one that was taken."""
        for held in self._held:
            held.check()


def lock_holder(folder: Path) -> str | None:
    """The driver that has locked a folder, as `here` calls it; None where none has."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "a driver that is just starting"
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)  # and its lock with it
    return None


def here() -> str:
    """This process, as a person finds it."""
    return f"process {os.getpid()} on {socket.gethostname()}"
