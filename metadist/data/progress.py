"""Progress of an import for the person watching."""

import sys
import time

BAR = 20  # characters
REDRAW_S, LINE_S = 0.2, 5.0  # between two looks of the bar; between two lines


class RowProgress:
    """Writes `letters: 6400 of 31320 rows` to stderr: behind a bar on a terminal, else a line every few seconds.

    Args:
        what: is being made.
        after_s: what takes less is not shown at all.
    """

    def __init__(self, what: str, after_s: float = 0) -> None:
        self._what, self._after_s = what, after_s
        self._live = sys.stderr.isatty()
        self._began = self._shown = time.monotonic()

    def __call__(self, done: int, total: int, what: str = "rows") -> None:
        now = time.monotonic()
        every = REDRAW_S if self._live else LINE_S
        if now - self._began < self._after_s or (done < total and now - self._shown < every):
            return
        self._shown = now
        text = f"{self._what}: {done} of {total} {what}"
        if self._live:
            bar = "#" * (BAR * done // max(total, 1))  # less than a MB is 0 MB
            text = f"\r[{bar:.<{BAR}}] {text}\x1b[K"  # to the end: the one before may be longer
        print(text, end="" if self._live and done < total else "\n", file=sys.stderr)
