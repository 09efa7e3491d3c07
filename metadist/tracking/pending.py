"""What waits to be sent to MLflow: bounded, in the form MLflow accepts."""

import functools
import math
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path

_MOST_METRICS = 20_000
_KEY_CHARS, _PARAM_CHARS, _TAG_CHARS = 250, 6000, 8000


class Pending:
    """Numbers, settings and files not yet sent. Not thread-safe: its owner holds a lock."""

    def __init__(self, nonfinite: int = 0, dropped: int = 0) -> None:
        self.metrics: list[tuple[str, float, int, int]] = []
        """(key, value, milliseconds since 1970, step), oldest first; the oldest are dropped when there are too many."""
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.datasets: dict[tuple[str, str, str, str], None] = {}
        """(name, digest, source, context)"""
        self.artifacts: dict[tuple[Path, str], int] = {}
        """(path, folder) and how often it was tried"""
        self._nonfinite, self._dropped, self._dropped_before = nonfinite, dropped, dropped

    def add_params(self, values: Mapping[str, str]) -> None:
        self.params.update({metric_key(key): str(value)[:_PARAM_CHARS] for key, value in values.items()})

    def add_tags(self, values: Mapping[str, str]) -> None:
        self.tags.update({metric_key(key): tag_value(str(value)) for key, value in values.items()})

    def add_metrics(self, values: Mapping[str, float], step: int, at_ms: int) -> None:
        finite = {key: float(value) for key, value in values.items() if math.isfinite(value)}
        self.metrics += [(metric_key(key), value, at_ms, step) for key, value in finite.items()]
        if len(finite) < len(values):
            self._nonfinite += len(values) - len(finite)
            self.metrics.append(("tracking/nonfinite", float(self._nonfinite), at_ms, step))
        self._drop_oldest()

    def sent(self, metrics: int) -> None:
        """The first so many metrics, the params and the tags have arrived."""
        del self.metrics[:metrics]
        self.params.clear()
        self.tags.clear()

    def successor(self) -> "Pending":
        """An empty one that goes on counting; what was dropped from this one becomes its last metric."""
        if self._dropped > self._dropped_before:
            _, _, at_ms, step = self.metrics[-1]
            self.metrics.append(("tracking/dropped", float(self._dropped), at_ms, step))
        return Pending(self._nonfinite, self._dropped)

    def put_back(self, older: "Pending") -> None:
        """Takes over what `older`, whose successor this is, did not get sent."""
        self.metrics[:0] = older.metrics
        self.params = older.params | self.params
        self.tags = older.tags | self.tags
        self.datasets = older.datasets | self.datasets
        self.artifacts = older.artifacts | self.artifacts
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        over = len(self.metrics) - _MOST_METRICS
        if over > 0:
            self._dropped += over
            del self.metrics[:over]


@functools.lru_cache(maxsize=4096)
def metric_key(key: str) -> str:
    """The nearest name MLflow accepts for a metric, parameter or tag: `loss@5` becomes `loss_5`."""
    clean = re.sub(r"[^\w\-. :/]", "_", key)[:_KEY_CHARS]
    return posixpath.normpath(clean).lstrip("./") or "_"


def tag_value(value: str) -> str:
    return value[:_TAG_CHARS]
