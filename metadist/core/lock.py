"""One driver at a time: who writes to a folder holds a lock that the system takes back when the process ends."""

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

from metadist.core.errors import InputError
from metadist.core.files import Held, reason

LOCK_FILE = "driver.lock"


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


def here() -> str:
    """This process, as a person finds it."""
    return f"process {os.getpid()} on {socket.gethostname()}"
