"""The chunks of a step put into calls, and what has come of these."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from metadist.core.messages import Chunk, ChunkReport, bits
from metadist.fleet.events import Attempt

MOST_CHUNKS = 8  # of a deal: so much, of each of two deals, a death has computed again

Deal = tuple[Chunk, ...]
"""Consecutive chunks that one worker computes in one call."""


class Ahead(NamedTuple):
    """Steps that may be begun before it is their turn, with these weights; `stale`: with newer ones where a deal is
    made when there are newer ones."""

    weights: Any
    steps: Sequence[Sequence[Chunk]]
    stale: bool = False


class Call(NamedTuple):
    """A call under way: its number, what it is an attempt at, and references to what it will return."""

    number: int
    attempt: Attempt
    refs: Sequence[Any]


@dataclass
class Batch:
    """Deals under way: how to have a worker compute one of them (`submit(call, worker, deal)`), references to the first
    results, what was told of each attempt, how many of these there were, and of how old weights, in steps, each is."""

    deals: Sequence[Deal]
    submit: Callable[[int, int, Deal], Sequence[Any]]
    kind: str = "train"
    results: dict[Deal, Sequence[Any]] = field(default_factory=dict)
    told: dict[Attempt, Any] = field(default_factory=dict)
    attempts: dict[Deal, int] = field(default_factory=dict)
    lags: dict[Attempt, int] = field(default_factory=dict)

    def differ(self, first: Attempt, second: Attempt) -> bool:
        """Whether two attempts at one deal gave different bits."""
        both = first in self.told and second in self.told and self.lags.get(first) == self.lags.get(second)
        return both and bits(self.told[first]) != bits(self.told[second])

    def values(self) -> list[Any]:
        """What was told first of each deal, in order."""
        first = self._first()
        return [self.told[first[deal]] for deal in self.deals]

    def reports(self) -> list[ChunkReport]:
        """Of a meta-step's chunks, in task order."""
        return [report for reports in self.values() for report in reports]

    def staleness(self) -> Counter[int]:
        """Tasks by how many meta-steps old the weights were that their gradients are of."""
        tasks: Counter[int] = Counter()
        for deal, attempt in self._first().items():
            tasks[self.lags[attempt]] += deal[-1].stop - deal[0].start
        return tasks

    def account(self) -> list[list[Any]]:
        """Of each deal of a meta-step: its first task, the task after its last, worker, attempts, seconds, and the
        worker's host and process."""
        first = self._first()
        rows = [(deal, first[deal].worker, self.attempts[deal], self.told[first[deal]]) for deal in self.deals]
        return [
            [deal[0].start, deal[-1].stop, worker, attempts, _seconds(reports), reports[0].worker]
            for deal, worker, attempts, reports in rows
        ]

    def _first(self) -> dict[Any, Attempt]:
        """Of each deal the attempt whose result counts."""
        return {attempt.chunk: attempt for attempt in reversed(self.told)}


def _seconds(reports: Sequence[ChunkReport]) -> float:
    return round(sum(sum(report.seconds.values()) for report in reports), 4)


def cut_deals(chunks: Sequence[Chunk], workers: int) -> list[Deal]:
    """Chunks in rounds of one call per worker: half of what remains in each, single chunks at the end (factoring,
    Hummel et al. 1992), so that there are few calls, and a slow worker holds nobody up."""
    deals: list[Deal] = []
    start, size = 0, 1
    while start < len(chunks):
        if len(deals) % workers == 0:
            size = min(MOST_CHUNKS, max(1, (len(chunks) - start) // (2 * workers)))
        deals.append(tuple(chunks[start : start + size]))
        start += size
    return deals
