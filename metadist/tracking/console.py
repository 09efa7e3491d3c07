"""Progress for the person watching: a live line with a bar on a terminal, else one plain line every few seconds."""

import math
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from metadist.core.measure import ACCURACY, LOSS, Measure
from metadist.core.redaction import redact
from metadist.tracking import Status, Tracker
from metadist.tracking.best import Best

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_REDRAW_S = 0.1
_BAR, _LEAST_BAR = 20, 6  # columns of the bar, where the line leaves so many
_SHOWN = {"train/loss", "validation/diverged_tasks", "workers/tasks_per_s", "workers/alive"}


class ConsoleTracker(Tracker):
    """Writes `step 1200/6000 20.0% | loss 0.812 | validation 94.1% (best 94.3% @1100) | 212 tasks/s | ETA 12m`.

    Understands `train/loss`, the `measure` of validation (without one `validation/accuracy`, a fraction, or
    `validation/loss`), `workers/tasks_per_s` and `workers/alive`; what has not been reported is left out. `every_s` is
    the time between plain lines; `quiet` leaves only what `say` prints. No colours. May be called from several threads.
    """

    def __init__(
        self, total_steps: int, stream: TextIO | None = None, every_s: float = 5.0, quiet: bool = False,
        measure: Measure | None = None,
    ) -> None:  # fmt: skip
        self._stream = sys.stderr if stream is None else stream
        self._on_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._live: Live | None = None
        self._every_s = min(every_s, _REDRAW_S) if self._on_terminal else every_s
        self._total, self._quiet = total_steps, quiet
        self._latest: dict[str, float] = {}
        self._measures = (measure,) if measure else (ACCURACY, LOSS)
        self._best = Best(measure)
        self._first: tuple[int, float] | None = None
        self._step = 0
        self._drawn, self._drawn_at = "", -math.inf
        self._changed = False  # since the last line was drawn
        self._phase: _Phase | None = None
        self._lock = threading.Lock()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        with self._lock:
            now = time.monotonic()
            self._first = self._first or (step, now)
            self._changed |= step > self._step or not _SHOWN.isdisjoint(values)
            self._step = max(step, self._step)  # the figures of the end are those of the best step
            self._latest.update(values)
            self._best.offer(values, step)
            if not self._quiet and now - self._drawn_at >= self._every_s:
                self._draw()

    def remember(self, values: Mapping[str, float], step: int) -> None:
        """A validation of an earlier try of this run, of which the best is shown."""
        self._best.offer(values, step)

    def say(self, text: str) -> None:
        """Prints a sentence, without passwords and keys, on a line of its own, after the progress up to it; a live line
        goes on below it."""
        with self._lock:
            if self._changed and not self._quiet and not self._on_terminal:
                self._draw()
            self._print(redact(text))

    def doing(self, what: str, done: int, total: int) -> None:
        """Shows, in the place of the steps, how much is done of something else that takes long: `evaluated tasks`, 80
        of 600. Where lines are plain, once it has taken `every_s`."""
        with self._lock:
            now = time.monotonic()
            if self._phase is None or self._phase.what != what or self._phase.done > done:
                self._phase = _Phase(what, now)
                self._drawn_at = now if not self._on_terminal else -math.inf
            self._phase.done, self._phase.total = done, total
            over = done >= total
            if not self._quiet and (now - self._drawn_at >= self._every_s or (over and self._live)):
                self._draw()
            if over:
                self._phase, self._changed = None, self._changed or bool(self._live and self._first)

    def finish(self, status: Status) -> None:
        """Shows the last state, where that is not done yet, and ends the line."""
        with self._lock:
            if self._changed and not self._quiet:
                self._draw()
            if self._live is not None:
                with suppress(OSError):
                    self._live.stop()
                self._live = None

    def _draw(self) -> None:
        text, before = self._text(), self._drawn
        self._drawn, self._drawn_at, self._changed = text, time.monotonic(), False
        if not self._on_terminal:
            if text != before:
                self._print(text)
            return
        with suppress(OSError):
            self._live = self._live or _live_line(self._stream)
            self._live.update(_with_bar(self._share(), text, self._live.console.width), refresh=True)

    def _print(self, text: str) -> None:
        """A terminal that is gone, or a log on a full disk, is no reason to end a run."""
        with suppress(OSError):
            if self._live is None:
                self._stream.write(text + "\n")
                self._stream.flush()
            else:
                self._live.console.out(text, highlight=False)

    def _share(self) -> float:
        """How much is done, 0 to 1."""
        if self._phase:
            return self._phase.done / max(self._phase.total, 1)
        return self._step / max(self._total, 1)

    def _text(self) -> str:
        if self._phase:
            return self._phase.text(time.monotonic())
        latest, step = self._latest, self._step
        parts = [f"step {step}/{self._total} {100 * step / max(self._total, 1):.1f}%"]
        if "train/loss" in latest:
            parts.append(f"loss {latest['train/loss']:.4g}")
        measure = next((each for each in self._measures if f"validation/{each.name}" in latest), None)
        if measure:
            form, name = (".1%", "") if measure == ACCURACY else (".4g", f" {measure.name}")
            parts.append(f"validation{name} {latest[f'validation/{measure.name}']:{form}}{self._of_best(form)}")
        elif latest.get("validation/diverged_tasks"):
            parts.append(f"validation diverged in {latest['validation/diverged_tasks']:g} tasks")
        if "workers/tasks_per_s" in latest:
            parts.append(f"{latest['workers/tasks_per_s']:.3g} tasks/s")
        if "workers/alive" in latest:
            workers = int(latest["workers/alive"])
            parts.append(f"{workers} worker{'' if workers == 1 else 's'}")
        if self._first and self._first[0] < step < self._total:
            per_step_s = (time.monotonic() - self._first[1]) / (step - self._first[0])
            parts.append(f"ETA {_duration(per_step_s * (self._total - step))}")
        return " | ".join(parts)

    def _of_best(self, form: str) -> str:
        return "" if self._best.step is None else f" (best {self._best.value:{form}} @{self._best.step})"


@dataclass
class _Phase:
    """Something that takes long: what it is, since when, and how much is done of how much."""

    what: str
    began: float
    done: int = 0
    total: int = 0

    def text(self, now: float) -> str:
        left = (now - self.began) / self.done * (self.total - self.done) if self.done else 0
        return f"{self.done} of {self.total} {self.what}" + (f" | ETA {_duration(left)}" if left else "")


def _with_bar(share: float, text: str, width: int) -> "RenderableType":
    """The text, behind a bar where there is room for one."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    line, room = Text(text, no_wrap=True, overflow="ellipsis"), min(_BAR, width - len(text) - 1)
    if room < _LEAST_BAR:
        return line
    both = Table.grid(padding=(0, 1))
    both.add_row(ProgressBar(1.0, min(share, 1.0), width=room), line)
    return both


def _live_line(stream: TextIO) -> "Live":
    """The last line of a terminal, below whatever this process prints to stderr."""
    from rich.console import Console
    from rich.live import Live

    live = Live(console=Console(file=stream, color_system=None), auto_refresh=False, redirect_stdout=False)
    live.start()
    live.console.show_cursor()  # which a process that is killed would leave hidden
    return live


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{seconds / 60:.0f}m"
    if seconds < 86400:
        return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"
    return f"{int(seconds // 86400)}d{int(seconds % 86400 // 3600):02d}h"
