"""Why a run ends before its last meta-step: signals, a time limit, no more improvement."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from metadist.core.errors import Interrupted

STOPPING = b"stopping after this meta-step, then saving; a second signal exits at once\n"


class Signals:
    """SIGINT and SIGTERM as a request: while `deferred` they wait for the step's end, otherwise they raise Interrupted
    where the program is; a second one exits at once. Use as a context, after ray.init (which sets handlers too)."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Meanwhile a signal is only noted in `received`."""
        self._deferred = True
        yield  # after an error signals stay deferred while all is closed
        self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        if not self._deferred:
            raise Interrupted(number)
        with suppress(OSError):  # of a terminal that is gone: an error here would end the run before it has saved
            os.write(2, STOPPING)  # which takes no lock


class Stop:
    """Why to stop after a meta-step, if at all."""

    def __init__(self, signals: Signals, max_time_s: float | None, patience: int | None):
        self._signals = signals
        self._deadline = None if max_time_s is None else time.monotonic() + max_time_s
        self._patience = patience

    def reason(self, validations_without_improvement: int) -> str | None:
        """ "signal", "time limit", "no improvement" or None."""
        if self._signals.received is not None:
            return "signal"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "time limit"
        if self._patience is not None and validations_without_improvement >= self._patience:
            return "no improvement"
        return None
