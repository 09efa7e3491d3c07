"""Progress of an import for the person watching."""

import sys
import time


class RowProgress:
    """Writes `letters: 6400 of 31820 rows` to stderr: a live line on a terminal, else a line every few seconds.

    Args:
        what: is being made.
        after_s: what takes less is not shown at all.
    """

    def __init__(self, what: str, after_s: float = 0) -> None:
        self._what, self._after_s = what, after_s
        self._live = sys.stderr.isatty()
        self._began = self._shown = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._began < self._after_s or (done < total and now - self._shown < (0.2 if self._live else 5)):
            return
        self._shown = now
        text = f"{self._what}: {done} of {total} rows"
        print(f"\r{text}" if self._live else text, end="" if self._live and done < total else "\n", file=sys.stderr)
