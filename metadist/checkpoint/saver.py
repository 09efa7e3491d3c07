"""Checkpoints written beside the training: the loop hands over a snapshot and goes on."""

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import numpy as np
from pyarrow import ArrowException

from metadist.checkpoint.format import Checkpoint, theta_sha256
from metadist.checkpoint.journal import Journal
from metadist.checkpoint.store import CheckpointStore
from metadist.core.errors import PlaceLost, StorageFailed, doing_it_again
from metadist.core.files import reason

MOST_FAILURES = 3
PAUSE_S = 1.0
_Snapshot = tuple[Checkpoint, np.ndarray, Callable[[], None]]


class Saver:
    """Writes checkpoints in one thread, by step, and journals the hash of theta once a checkpoint is complete.

    Of those that wait, the newest best and the newest other count: a store slower than the run delays no step, but
    passes checkpoints over. One that could not be written is reported to `say` and tried again with the next; after
    three failures in a row every call raises StorageFailed.

    `beside` is called with each snapshot, and what it returns before that one is written, in the saver's thread: it
    brings what belongs to the checkpoint to its place, as it was at the snapshot.
    """

    def __init__(
        self,
        store: CheckpointStore,
        journal: Journal,
        say: Callable[[str], None],
        beside: Callable[[], Callable[[], None]] = lambda: lambda: None,
    ) -> None:
        self.store = store
        self._journal, self._say, self._beside = journal, say, beside
        self._waiting: dict[bool, _Snapshot] = {}  # by whether it is the best
        self._lock = threading.Lock()
        self._calls: queue.Queue[bool] = queue.Queue(maxsize=1)  # True: write all that waits; False: end
        self._failures = 0
        self._slow_said = False
        self._fatal: Exception | None = None
        self._thread = threading.Thread(target=self._serve, name="metadist-saver", daemon=True)
        self._thread.start()

    def save(self, checkpoint: Checkpoint, theta: np.ndarray, *, best: bool) -> None:
        """Hand over a snapshot, of which nothing may change from now on; `theta` [P] is what its hash is of."""
        self.check()
        with self._lock:
            passed_over = self._waiting.get(best)
            self._waiting[best] = checkpoint, theta, self._beside()
        if passed_over and not self._failures and not self._slow_said:
            self._slow_said = True
            self._say(
                f"the checkpoint of step {passed_over[0].step} was passed over for that of step {checkpoint.step}: "
                "writing takes longer than the steps between (said once), set checkpoint.every higher"
            )
        with suppress(queue.Full):  # a call is to come that will see this one
            self._calls.put_nowait(True)

    def check(self) -> None:
        """Raises what ended saving, if anything did."""
        if self._fatal is not None:
            raise self._fatal

    def flush(self) -> None:
        """Wait until everything is written; what fails is tried again, until it is given up with StorageFailed."""
        self._calls.join()
        while self._waiting and self._fatal is None:
            time.sleep(PAUSE_S)
            self._try_again()
        self.check()

    def close(self) -> None:
        """Wait for what is being written, try once what could not be, and end the thread."""
        self._calls.join()
        if self._waiting and self._fatal is None:
            self._try_again()
        if self._thread.is_alive():
            self._calls.put(False)
            self._thread.join()

    def _try_again(self) -> None:
        self._calls.put(True)
        self._calls.join()

    def _serve(self) -> None:
        going_on = True
        while going_on:
            going_on = self._calls.get()
            if going_on:
                self._write_waiting()
            self._calls.task_done()

    def _write_waiting(self) -> None:
        """Writes what waits, the earliest step first, until nothing does or one fails, which then waits again."""
        while self._waiting and self._fatal is None:
            with self._lock:
                best = min(self._waiting, key=lambda best: self._waiting[best][0].step)
                snapshot = self._waiting.pop(best)
            try:
                self._write(*snapshot, best)
                self._failures = 0
            except Exception as error:  # noqa: BLE001 - raised in the driver's thread, by `check`
                with self._lock:
                    self._waiting.setdefault(best, snapshot)
                self._count_failure(error, snapshot[0].step)
                return

    def _write(self, checkpoint: Checkpoint, theta: np.ndarray, bring: Callable[[], None], best: bool) -> None:
        bring()
        hashed = theta_sha256(theta)
        self.store.save(replace(checkpoint, run={**checkpoint.run, "theta_sha256": hashed, "best": best}), best=best)
        record = {"done": checkpoint.step, "theta_sha256": hashed, "time": round(time.time(), 3)}
        self._journal.append(record, sync=True)

    def _count_failure(self, error: Exception, step: int) -> None:
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
            f"checkpoint.location, then {doing_it_again()} goes on from the newest checkpoint there"
        )
