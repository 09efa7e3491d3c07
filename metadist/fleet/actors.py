"""The worker actor. Light to import: a process pays for torch only when its worker computes."""

import os
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from metadist.core.messages import Chunk, Weights

CACHED = 4  # weights, and numbers of cancelled calls: more than a worker ever has calls in flight for

Bundle = tuple[Chunk, ...]
"""Consecutive chunks that one worker computes in one call."""


class Ready(NamedTuple):
    """A worker's process, node, host, and proof of computing what the others compute."""

    pid: int
    node: str
    host: str
    proof: str


class WorkerActor:
    """A worker in a process of its own, which is asked for two bundles at once: it may sample one's tasks while it
    computes the other.

    Weights have a number and travel once to each worker, with the first call that needs them: fetching them costs as
    much as the rest of a call. Calls have a number too, by which they can be cancelled.
    """

    def __init__(self, make_worker: Callable[[], Any], threads: int | None):
        """`threads` is the number of torch threads; None for a worker without torch."""
        self._make_worker = make_worker
        self._threads = threads
        self._changed = threading.Condition()
        self._weights: dict[int, tuple[Weights, list[slice]]] = {}
        self._cancelled: set[int] = set()
        self._map: Callable[[Callable[[Chunk], Any], Bundle], Iterable[Any]] = ThreadPoolExecutor(2).map

    def ready(self) -> Ready:
        """Build the worker (here, so that what goes wrong is this call's own exception) and compute the reference
        chunk."""
        if self._threads is not None:
            from metadist.fleet.worker import set_up_process

            set_up_process(self._threads)
        self._worker = self._make_worker()
        self._ready = Ready(os.getpid(), self.node(), socket.gethostname(), self._worker.proof())
        return self._ready

    def node(self) -> str:
        """Id of the node that it runs on."""
        return ""

    def still_there(self) -> Ready:
        """What `ready` returned."""
        return self._ready

    def cancel(self, call: int) -> None:
        """Skip what is left of a call: nobody wants its result any more."""
        with self._changed:
            self._cancelled = {*sorted(self._cancelled)[1 - CACHED :], call}
            self._changed.notify_all()

    def meta_gradients(self, call: int, number: int, bundle: Bundle, num_slices: int, *parts: Weights) -> list[Any]:
        """Reports of the bundle's chunks, and for each slice of theta as it came that slice of their gradients. None in
        the place of all of these where the call was cancelled before it was done."""
        cached = self._weights_of(call, number, parts)
        if cached is None:
            return [None] * (1 + num_slices)
        weights, pieces = cached
        computed = self._compute(call, bundle, lambda chunk: self._worker.meta_gradients(weights, chunk))
        if computed is None:
            return [None] * (1 + num_slices)
        slices = [[np.ascontiguousarray(gradient[..., piece]) for _, gradient in computed] for piece in pieces]
        return [[report for report, _ in computed], *slices]

    def evaluate(
        self, call: int, number: int, bundle: Bundle, baselines: tuple[str, ...], *parts: Weights
    ) -> list[dict[str, np.ndarray]] | None:
        """What `Worker.evaluate` returns for each chunk; None where the call was cancelled before it was done."""
        cached = self._weights_of(call, number, parts)
        if cached is None:
            return None
        return self._compute(call, bundle, lambda chunk: self._worker.evaluate(cached[0], chunk, baselines))

    def _compute(self, call: int, bundle: Bundle, compute: Callable[[Chunk], Any]) -> list[Any] | None:
        """Of each chunk, two at once; None where the call has been cancelled."""

        def unless_cancelled(chunk: Chunk) -> Any:
            return None if call in self._cancelled else compute(chunk)

        computed = list((self._map if len(bundle) > 1 else map)(unless_cancelled, bundle))
        return None if any(result is None for result in computed) else computed

    def _weights_of(self, call: int, number: int, parts: Sequence[Weights]) -> tuple[Weights, list[slice]] | None:
        """Weights `number` and where each of their parts lies, from `parts` or from a call made before this one; None
        where the call is cancelled before they come. A few are cached, as calls with the next ones may come meanwhile.
        """
        with self._changed:
            if parts:
                self._weights[number] = join_weights(parts)
                for old in sorted(self._weights)[:-CACHED]:
                    del self._weights[old]
                self._changed.notify_all()
            self._wait_until(lambda: number in self._weights or call in self._cancelled)
            return self._weights.get(number)

    def _wait_until(self, holds: Callable[[], bool]) -> None:
        self._changed.wait_for(holds)


class WeightCache:
    """Which weights each worker has: they travel to it once, from then on their number stands for them."""

    def __init__(self):
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._sent: set[tuple[int, int]] = set()

    def send(self, worker: int, weights: tuple[Any, ...]) -> tuple[int, tuple[Any, ...]]:
        """The number of the weights and, if the worker does not have them yet, the weights."""
        if weights not in self._numbers:
            self._numbers[weights] = max(self._numbers.values(), default=0) + 1
            for old in list(self._numbers)[:-CACHED]:
                del self._numbers[old]
            self._sent = {pair for pair in self._sent if pair[1] in self._numbers.values()}
        number = self._numbers[weights]
        if (worker, number) in self._sent:
            return number, ()
        self._sent.add((worker, number))
        return number, weights


def join_weights(parts: Sequence[Weights]) -> tuple[Weights, list[slice]]:
    """Slices of theta, in order, as one; and where each lies."""
    edges = [0, *np.cumsum([len(part.theta) for part in parts])]
    pieces = [slice(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]
    whole = parts[0] if len(parts) == 1 else Weights(parts[0].version, np.concatenate([part.theta for part in parts]))
    return whole, pieces
