"""The calls that worker actors are at: what became of them, as events for the controller."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayError, RayTaskError

from metadist.fleet.dispatch import Call
from metadist.fleet.events import Answered, Attempt, Done, Draining, Event, Lost, Tick, Unreachable
from metadist.fleet.limits import Patience
from metadist.fleet.ray.actors import HELD
from metadist.fleet.ray.server import forgotten
from metadist.fleet.ray.workers import RayWorkers

TICK_S = 0.5


class RayCalls:
    """Calls under way. `returned(call, value)` is told of each that brought something. Where patience allows for
    errors, an exception of the user's code costs the worker, not the run."""

    def __init__(
        self, workers: RayWorkers, returned: Callable[[Call, Any], None], patience: Patience,
        draining: Callable[[], frozenset[str]],
    ):  # fmt: skip
        self._workers, self._returned, self._draining = workers, returned, draining
        self._again, self._first_s = patience.most_losses["error"] > 0, patience.first_s
        self._calls: dict[ray.ObjectRef, Call] = {}
        self._number = 0
        self._cancelled: set[int] = set()
        self._lost_weights: str | None = None
        self._ticked = 0.0

    def make(self, attempt: Attempt, submit: Callable[..., Sequence[Any]]) -> None:
        """Have the attempt's worker compute, by `submit(number of the call, worker, deal)`. One that has just been
        found lost, of which the controller is about to hear, computes nothing."""
        if attempt.worker not in self._workers.actors:
            return
        self._number += 1
        refs = submit(self._number, attempt.worker, attempt.chunk)
        self._calls[refs[0]] = Call(self._number, attempt, refs)

    def cancel(self, attempt: Attempt) -> None:
        """Its result is not wanted any more."""
        for call in self._calls.values():
            if call.attempt == attempt:
                self._cancelled.add(call.number)
                self._workers.cancel(attempt.worker, call.number)

    def forget(self, worker: int) -> None:
        """Wait no more for what a worker is at."""
        self._cancelled -= {call.number for call in self._calls.values() if call.attempt.worker == worker}
        self._calls = {ref: call for ref, call in self._calls.items() if call.attempt.worker != worker}

    def end(self, worker: int) -> None:
        """End a worker, with its calls."""
        self.forget(worker)
        self._workers.end(worker)

    def lost_weights(self) -> str | None:
        """Why, since the last time, a call could not get what it was to compute with."""
        why, self._lost_weights = self._lost_weights, None
        return why

    def wait(self, longest_s: float) -> list[Event]:
        """What happened, after so many seconds at most."""
        refs = [*self._calls, *self._workers.joining, *self._workers.placing, *self._workers.asked]
        done: list[ray.ObjectRef] = []
        if refs:
            done, rest = ray.wait(refs, num_returns=1, timeout=longest_s, fetch_local=False)
            if done and rest:
                done += ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]
        else:
            time.sleep(longest_s)
        found = [self._event(ref, value) for ref, value in zip(done, _values(done), strict=True)]
        events: list[Event] = [event for event in found if event is not None]
        now = time.monotonic()
        if now - self._ticked >= TICK_S:
            self._ticked = now
            events += [self._hung(worker) for worker in self._workers.hung(now, self._first_s)]
            events += [Draining(self._draining()), Tick()]
        return events

    def _hung(self, worker: int) -> Event:
        self.end(worker)
        return Lost(worker, f"not ready {self._first_s:.0f} s after it was started", "unavailable")

    def _event(self, ref: ray.ObjectRef, value: Any) -> Event | None:
        """What a finished call means. An exception of our own or the user's code is raised here, as it was there."""
        if ref in self._workers.placing:
            self._workers.placed(ref, time.monotonic())  # what failed fails `ready` too
            return None
        if (asked := self._workers.asked.pop(ref, None)) is not None:
            return None if isinstance(value, RayError) else Answered(asked)
        joining, call = self._workers.joining.pop(ref, None), self._calls.pop(ref, None)
        unwanted = call is not None and call.number in self._cancelled
        if call is not None:
            self._cancelled.discard(call.number)
        of_argument = isinstance(value, RayTaskError) and isinstance(value.cause, RayError)
        forgiven = unwanted or of_argument or (self._again and (call or self._workers.proved))
        if isinstance(value, RayTaskError) and not forgiven:
            raise value.cause from value
        if joining is not None:
            failed = isinstance(value, RayError)
            return self._workers.lost(joining, value) if failed else self._workers.admit(joining, *value)
        if call is None:
            return None
        if of_argument or isinstance(value, ObjectLostError):  # what the call was to use is gone: the worker is well
            self._lost_weights = self._lost_weights if unwanted else type(value).__name__
        elif unwanted and isinstance(value, RayTaskError):
            pass
        elif isinstance(value, ActorUnavailableError):
            self.forget(call.attempt.worker)
            return Unreachable(call.attempt.worker, type(value).__name__)
        elif isinstance(value, RayError):
            self.end(call.attempt.worker)
            return self._workers.lost(call.attempt.worker, value)
        elif value is not None:
            self._returned(call, value)
        return Done(call.attempt)


class Told:
    """Which weights each worker has: they travel to it once, from then on their number stands for them."""

    def __init__(self):
        self._numbers: dict[tuple[ray.ObjectRef, ...], int] = {}
        self._pairs: set[tuple[int, int]] = set()

    def news(self, worker: int, weights: tuple[ray.ObjectRef, ...]) -> tuple[Any, ...]:
        """The number of the weights and, the first time that this worker is told, the weights."""
        if weights not in self._numbers:
            self._numbers[weights] = max(self._numbers.values(), default=0) + 1
            for old in list(self._numbers)[:-HELD]:
                del self._numbers[old]
            self._pairs = {pair for pair in self._pairs if pair[1] in self._numbers.values()}
        number = self._numbers[weights]
        told = (worker, number) in self._pairs
        self._pairs.add((worker, number))
        return (number,) if told else (number, *weights)


def _values(refs: Sequence[ray.ObjectRef]) -> list[Any]:
    """What finished calls returned, or the error of each that failed."""
    try:
        return ray.get(list(refs))
    except RayError as raised:
        error = forgotten(raised)
        return [error] if len(refs) == 1 else [value for ref in refs for value in _values([ref])]
