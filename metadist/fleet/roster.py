"""The worker actors of a fleet: started, admitted by their proof, asked for signs of life, ended."""

from typing import Any

from metadist.core.errors import InputError
from metadist.fleet.actors import Ready
from metadist.fleet.events import Answered, Event, Joined, Lost
from metadist.fleet.executor import Actor, Executor, Failure, Ref
from metadist.fleet.limits import Patience


class Roster:
    """Worker actors by the numbers that the controller gives them. The first proof that comes is that of the run,
    unless it has one from before."""

    def __init__(self, executor: Executor, patience: Patience, mixed_devices: bool, proof: str | None):
        self.proof = proof
        self.run_has_begun = False  # then a worker that is not equal costs itself, not the run
        self.actors: dict[int, Actor] = {}
        self.pids: dict[int, int] = {}
        self._executor, self._mixed_devices = executor, mixed_devices
        self._forgives_errors, self._first_s = patience.most_losses["error"] > 0, patience.first_s
        self._placing: dict[Ref, int] = {}
        self._joining: dict[Ref, int] = {}
        self._asked: dict[Ref, int] = {}
        self._placed_at: dict[int, float] = {}
        self._probed: set[int] = set()

    @property
    def refs(self) -> list[Ref]:
        """Answers that are waited for."""
        return [*self._joining, *self._placing, *self._asked]

    def missing(self, count: int) -> tuple[int, int, int]:
        """Of `count` workers that have not joined or cannot be reached: how many wait for a place to run, how many have
        a process that builds them, and how many do not answer or are yet to be replaced."""
        unplaced = {*self._placing.values()}
        building = {*self._joining.values()} - unplaced - self._probed
        return len(unplaced), len(building), max(count - len(unplaced) - len(building), 0)

    def spawn(self, worker: int, avoid: frozenset[str]) -> None:
        """Start an actor, elsewhere than on the nodes to avoid, if there are others."""
        actor = self.actors[worker] = self._executor.start_worker(worker, avoid)
        self._placing[self._call(actor, "node")] = worker
        self._joining[self._call(actor, "ready")] = worker

    def probe(self, worker: int, successor: int) -> None:
        """Ask the actor of a worker again; if it answers it joins as its successor."""
        actor = self.actors[worker]
        self._forget(worker)
        self.actors[successor], self._placed_at[successor] = actor, self._executor.now()
        self._joining[self._call(actor, "still_there", control=True)] = successor
        self._probed.add(successor)

    def ask(self, worker: int) -> None:
        """Ask a worker for a sign of life, which its actor gives while it computes."""
        if worker in self.actors:
            self._asked[self._call(self.actors[worker], "still_there", control=True)] = worker

    def end(self, worker: int) -> None:
        """End its actor, if it is there."""
        actor = self.actors.get(worker)
        self._forget(worker)
        if actor is not None:
            self._executor.end(actor)

    def close(self) -> None:
        """End all."""
        for worker in list(self.actors):
            self.end(worker)

    def hung(self) -> list[Event]:
        """Those that have been getting ready for too long, since their processes began, are lost."""
        now = self._executor.now()
        late = {worker for worker, since in self._placed_at.items() if now - since > self._first_s}
        lost: list[Event] = []
        for worker in [worker for worker in self._joining.values() if worker in late]:
            self.end(worker)
            lost.append(Lost(worker, f"not ready {self._first_s:.0f} s after it was started", "unavailable"))
        return lost

    def event(self, ref: Ref, value: Any) -> Event | None:
        """The event that an answer is, if any."""
        if ref in self._placing:
            self._placed_at[self._placing.pop(ref)] = self._executor.now()  # what failed fails `ready` too
        elif ref in self._asked:
            worker = self._asked.pop(ref)
            return None if isinstance(value, Failure) else Answered(worker)
        elif ref in self._joining:
            worker = self._joining.pop(ref)
            if not isinstance(value, Failure):
                return self._admit(worker, value)
            if value.error is not None and not self.run_has_begun:
                raise value.error
            return self.lost(worker, value)
        return None

    def lost(self, worker: int, failure: Failure) -> Lost:
        """End a worker that cannot be trusted any more. Raises what its code raised, unless that is forgiven."""
        if failure.error is not None and not self._forgives_errors:
            raise failure.error
        self.end(worker)
        return Lost(worker, failure.reason, "died" if failure.kind == "lost" else failure.kind)

    def _call(self, actor: Actor, method: str, control: bool = False) -> Ref:
        return self._executor.call(actor, method, control=control)[0]

    def _admit(self, worker: int, ready: Ready) -> Joined | Lost:
        """Let a worker in that computes what those before it did; another is refused, or stops a run not yet begun."""
        self.proof = self.proof or ready.proof
        if ready.proof != self.proof and not self._mixed_devices:
            text = (
                f"worker {worker} ({ready.proof}) does not compute the same bits as those before it ({self.proof}): "
                "use equal machines, packages and data, or set fleet.mixed_devices=true"
            )
            if not self.run_has_begun:
                raise InputError(text)
            self.end(worker)
            return Lost(worker, text, node=ready.node)
        self.pids[worker] = ready.pid
        return Joined(worker, ready.node, ready.host)

    def _forget(self, worker: int) -> None:
        for by_worker in (self.actors, self.pids, self._placed_at):
            by_worker.pop(worker, None)
        self._probed.discard(worker)
        for answers in (self._placing, self._joining, self._asked):
            for ref in [ref for ref, other in answers.items() if other == worker]:
                del answers[ref]
