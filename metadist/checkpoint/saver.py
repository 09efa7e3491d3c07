"""Checkpoints written beside the training: the loop hands over a snapshot and goes on."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from pyarrow import ArrowException

from metadist.checkpoint.format import Checkpoint, theta_sha256
from metadist.checkpoint.journal import Journal
from metadist.checkpoint.store import CheckpointStore
from metadist.core.errors import PlaceLost, StorageFailed
from metadist.core.files import reason

MOST_FAILURES = 3
PAUSE_S = 1.0


class Saver:
    """Writes checkpoints in a thread of its own, one at a time and in the order of their steps, and journals the hash
    of theta once a checkpoint is complete.

    Of what is not written yet, the newest best and the newest other are kept: a store slower than the run delays no
    step, but passes checkpoints over. What could not be written is told to `say` and tried again with the next one;
    after three failures in a row every call raises StorageFailed.
    """

    def __init__(self, store: CheckpointStore, journal: Journal, say: Callable[[str], None]) -> None:
        self.store = store
        self._journal, self._say = journal, say
        self._changed = threading.Condition()
        self._owed: dict[bool, tuple[Checkpoint, np.ndarray]] = {}  # by whether it is the best
        self._busy = self._closed = self._slow_told = False
        self._failures = 0
        self._fatal: Exception | None = None
        self._thread: threading.Thread | None = None

    def save(self, checkpoint: Checkpoint, theta: np.ndarray, *, best: bool) -> None:
        """Hand over a snapshot, of which nothing may change from now on; `theta` [P] is what its hash is of."""
        self.check()
        with self._changed:
            passed_over = self._owed.get(best)
            self._owed[best] = checkpoint, theta
        if passed_over and not self._failures and not self._slow_told:
            self._slow_told = True
            self._say(
                f"the checkpoint of step {passed_over[0].step} was passed over for that of step {checkpoint.step}: "
                "writing takes longer than the steps between (said once), set checkpoint.every higher"
            )
        self._wake()

    def check(self) -> None:
        """Raises what ended saving, if anything did."""
        if self._fatal is not None:
            raise self._fatal

    def flush(self) -> None:
        """Wait until everything is written; what fails is tried again, until it is given up with StorageFailed."""
        self._wait()
        while self._owed and self._fatal is None:
            time.sleep(PAUSE_S)
            self._wake()
            self._wait()
        self.check()

    def close(self) -> None:
        """Wait for what is being written, try once what could not be, and end the thread."""
        self._wait()
        if self._owed and self._fatal is None:
            self._wake()
            self._wait()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _wake(self) -> None:
        with self._changed:
            self._busy = True
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="metadist-saver", daemon=True)
            self._thread.start()

    def _wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)

    def _serve(self) -> None:
        """Write what is owed whenever woken, until there is nothing left or something fails."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._busy or self._closed)
                if not self._busy:
                    return
                best = min(self._owed, key=lambda kind: self._owed[kind][0].step, default=None)
                if best is None or self._fatal is not None:
                    self._busy = False
                    self._changed.notify_all()
                    continue
                owed = self._owed.pop(best)
            try:
                self._write(*owed, best)
                self._failures = 0
            except Exception as error:  # noqa: BLE001 - raised in the driver's thread, by `check`
                self._note(error, owed[0].step)
                with self._changed:
                    self._owed.setdefault(best, owed)
                    self._busy = False
                    self._changed.notify_all()

    def _write(self, checkpoint: Checkpoint, theta: np.ndarray, best: bool) -> None:
        hashed = theta_sha256(theta)
        run = {**checkpoint.run, "theta_sha256": hashed, "best": best}
        self.store.save(replace(checkpoint, run=run), best=best)
        self._journal.append({"done": checkpoint.step, "theta_sha256": hashed}, sync=True)

    def _note(self, error: Exception, step: int) -> None:
        if isinstance(error, PlaceLost) or not isinstance(error, OSError | ArrowException):
            self._fatal = error
            return
        self._failures += 1
        what = f"the checkpoint of step {step} could not be written ({reason(error)})"
        if self._failures < MOST_FAILURES:
            self._say(f"{what}, failure {self._failures} of {MOST_FAILURES} in a row: it is tried again later")
            return
        self._fatal = StorageFailed(
            f"{what}, the {MOST_FAILURES}rd failure in a row: make room in {self.store.location} or set "
            "checkpoint.location, then --resume auto goes on from the newest checkpoint there"
        )
