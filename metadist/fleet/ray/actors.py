"""What runs inside the actors. Light to import: a process pays for torch only when it holds a worker that computes."""

import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from metadist.core.messages import Chunk, Weights

if TYPE_CHECKING:
    from metadist.fleet.server import Attempt, Folded, Optimization, Stats

HELD = 4  # weights, and numbers of cancelled calls: more than a worker is ever at


class WorkerActor:
    """A worker in a process of its own, which is asked for two chunks at once: it may sample one's tasks while it
    computes the other.

    Weights have a number and travel once to each worker, with the first call that needs them: fetching them costs as
    much as the rest of a call. Calls have a number too, by which they can be cancelled.
    """

    def __init__(self, make_worker: Callable[[], Any], threads: int | None):
        """`threads` is the number of torch threads; None for a worker without torch."""
        self._make_worker = make_worker
        self._threads = threads
        self._two = ThreadPoolExecutor(2)
        self._here = threading.Condition()
        self._weights: dict[int, tuple[Weights, list[slice]]] = {}
        self._unwanted: set[int] = set()

    def ready(self) -> tuple[int, str, str, str]:
        """Build the worker (here, so that what goes wrong is this call's own exception) and compute the reference
        chunk: process id, node, host, and proof of being equal to the others."""
        import ray

        if self._threads is not None:
            from metadist.fleet.worker import set_up_process

            set_up_process(self._threads)
        self._worker = self._make_worker()
        node, host = ray.get_runtime_context().get_node_id(), socket.gethostname()
        self._told = os.getpid(), node, host, self._worker.proof()
        return self._told

    def node(self) -> str:
        """Where it is."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def still_there(self) -> tuple[int, str, str, str]:
        """What `ready` said."""
        return self._told

    def cancel(self, call: int) -> None:
        """Nobody wants the result of that call any more."""
        with self._here:
            self._unwanted = {*sorted(self._unwanted)[1 - HELD :], call}
            self._here.notify_all()

    def meta_gradients(self, call: int, deal: Sequence[Chunk], number: int, *parts: Weights) -> list[Any]:
        """Reports of the deal's chunks, and for each slice of theta as it came that slice of their gradients. None in
        the place of all of these where the call was cancelled before it was done."""
        held = self._hold(call, number, parts)
        if held is None:
            return [None] * (1 + (len(parts) or 1))
        weights, pieces = held
        compute = partial(self._compute, call, weights)
        computed = [compute(deal[0])] if len(deal) == 1 else list(self._two.map(compute, deal))
        if any(each is None for each in computed):
            return [None] * (1 + len(pieces))
        slices = [[np.ascontiguousarray(gradient[..., piece]) for _, gradient in computed] for piece in pieces]
        return [[report for report, _ in computed], *slices]

    def evaluate(
        self, call: int, chunk: Chunk, baselines: tuple[str, ...], number: int, *parts: Weights
    ) -> dict[str, np.ndarray] | None:
        held = self._hold(call, number, parts)
        return None if held is None or call in self._unwanted else self._worker.evaluate(held[0], chunk, baselines)

    def _compute(self, call: int, weights: Weights, chunk: Chunk) -> Any:
        return None if call in self._unwanted else self._worker.meta_gradients(weights, chunk)

    def _hold(self, call: int, number: int, parts: Sequence[Weights]) -> tuple[Weights, list[slice]] | None:
        """Weights `number` and where each of their parts lies, from `parts` or from a call made before this one; None
        where the call is cancelled before they come. A few are held, as calls with the next ones may come meanwhile."""
        with self._here:
            if parts:
                self._weights[number] = join_weights(parts)
                for old in sorted(self._weights)[:-HELD]:
                    del self._weights[old]
                self._here.notify_all()
            self._here.wait_for(lambda: number in self._weights or call in self._unwanted)
            return self._weights.get(number)


def join_weights(parts: Sequence[Weights]) -> tuple[Weights, list[slice]]:
    """Slices of theta, in order, as one; and where each lies."""
    edges = [0, *np.cumsum([len(part.theta) for part in parts])]
    pieces = [slice(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]
    whole = parts[0] if len(parts) == 1 else Weights(parts[0].version, np.concatenate([part.theta for part in parts]))
    return whole, pieces


class ServerActor:
    """A shard of the parameter server, or all of it, in a process of its own.

    Its arguments arrive straight from the workers, as they return them: `parts` are the reports of each deal, then this
    shard's slices of each deal's gradients. `fresh`: these are the first of their step.
    """

    def __init__(self, theta: np.ndarray, optimization: "Optimization", state: dict[str, Any] | None):
        import torch

        from metadist.fleet.server import Shard

        torch.set_num_threads(1)
        self._shard = Shard(theta, optimization, state)

    def take(self, step: int, fresh: bool, *parts: Any) -> None:
        if fresh:
            self._shard.begin(step)
        half = len(parts) // 2
        for reports, gradients in zip(parts[:half], parts[half:], strict=True):
            for report, gradient in zip(reports, gradients, strict=True):
                self._shard.take(step, report, gradient)

    def fold(self, step: int, fresh: bool, num_tasks: int | None, *parts: Any) -> "Folded":
        self.take(step, fresh, *parts)
        return self._shard.fold(step, num_tasks)

    def attempt(self, step: int, *folded: "Folded") -> "Attempt":
        return self._shard.attempt(step, *folded)

    def move(self, step: int, *told: Any) -> tuple[Weights, "Stats"]:
        """What all shards folded, then what all of them tried."""
        half = len(told) // 2
        return self._shard.move(step, *told[:half], attempts=told[half:])

    def apply(self, step: int, fresh: bool, num_tasks: int | None, *parts: Any) -> tuple[Weights, "Stats"]:
        return self._shard.move(step, self.fold(step, fresh, num_tasks, *parts))

    def pid(self) -> int:
        return os.getpid()

    def proof(self) -> str:
        from metadist.fleet.server_proof import server_proof

        return server_proof()

    def weights(self) -> Weights:
        return self._shard.weights()

    def snapshot(self) -> dict[str, Any]:
        return self._shard.snapshot()
