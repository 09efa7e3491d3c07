"""Fetching the official archive of a public data set: only what was asked for, whole, and the file that is expected."""

import hashlib
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from metadist.core.errors import InputError
from metadist.core.files import cache_root
from metadist.data.files import open_regular
from metadist.data.notes import Progress, shown

BLOCK_BYTES = 1 << 20
TRIES = 5  # of a connection that breaks; those that bring nothing
WAIT_S, PATIENCE_S = 1.0, 30.0  # between tries, for an answer
PART = ".part"


@dataclass(frozen=True)
class Archive:
    """A file in the internet that is the same for good: its address, size in bytes and sha256 (hex)."""

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def downloads(name: str, source: str | Path | None, download: bool) -> Path:
    """The folder with the archives of a data set: the one that was given, else one in this machine's cache. Raises
    InputError where none was given, and nothing is to be downloaded."""
    if source is None and not download:
        raise InputError(
            f"{name} needs its official files; give their folder as --source, or fetch them with --download"
        )
    return cache_root() / "downloads" / name if source is None else Path(source)


def fetched(archives: Sequence[Archive], folder: Path, progress: Progress | None = None) -> None:
    """Put archives into a folder, those that are not there yet. What is broken off goes on where it was, at once or
    when the command is typed again; `progress` is called now and then with the MB that are there and in all.

    Raises InputError where there is no way to one, or it comes short or as another file; nothing but a `.part` of it is
    left then.

    Example:
        >>> fetched([Archive("https://example.org/birds.zip", 1048576, "9f86d0...")], Path("downloads"))
    """
    for archive in archives:
        final = folder / archive.name
        if not final.exists():
            _fetch(archive, folder, progress)
        elif not _is(archive, final):
            raise InputError(
                f"{shown(final)} is there and is not the official {archive.name}; move it away to have that fetched, "
                "or import it as it is without --download"
            )


def _fetch(archive: Archive, folder: Path, progress: Progress | None) -> None:
    part = folder / f".{archive.name}{PART}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _receive(archive, part, progress)
        if not _is(archive, part):
            part.unlink()
            raise InputError(
                f"{archive.url} brought another file than the official one (its sha256 is not {archive.sha256[:12]}...)"
                "; try again, and if it stays so, get the file elsewhere and give its folder as --source"
            )
        part.rename(folder / archive.name)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        why = getattr(error, "reason", None) or error
        raise InputError(
            f"there is no way from here to {archive.url} ({why}); download it on a machine with a network, and give "
            "the folder that it is in as --source, without --download"
        ) from error
    except OSError as error:
        raise InputError(f"{shown(folder)} cannot be written ({error.strerror}); choose another --source") from error


def _receive(archive: Archive, part: Path, progress: Progress | None) -> None:
    """Fetch what is missing of a part, again where the connection breaks."""
    left = TRIES
    while left:
        before = _length(part)
        if before >= archive.size:
            return
        try:
            _receive_rest(archive, part, before, progress)
        except (http.client.HTTPException, TimeoutError, ConnectionError):
            if left == 1:
                raise
        left = left - 1 if _length(part) <= before else TRIES
        if _length(part) < archive.size:
            time.sleep(WAIT_S)
    raise InputError(
        f"{archive.url} ended after {_length(part):,} of {archive.size:,} bytes {TRIES} times; type the command again "
        "to go on from there"
    )


def _receive_rest(archive: Archive, part: Path, begin: int, progress: Progress | None) -> None:
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={begin}-"} if begin else {})
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {begin}-")
        with part.open("ab" if goes_on else "wb") as file:  # a server that cannot go on begins again
            while block := answer.read(BLOCK_BYTES):
                file.write(block)
                if progress is not None:
                    progress(file.tell() // 1_000_000, archive.size // 1_000_000, f"MB of {archive.name}")
                if file.tell() > archive.size:
                    return  # which its sha256 will show


def _length(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _is(archive: Archive, file: Path) -> bool:
    if file.stat().st_size != archive.size:
        return False
    found = hashlib.sha256()
    with open_regular(file) as opened:
        while block := opened.read(BLOCK_BYTES):
            found.update(block)
    return found.hexdigest() == archive.sha256
