"""The controller: which worker computes which chunk. A pure state machine, `on(event, now) -> actions`, without Ray.

Chunks are assigned as workers return others, so a slower worker gets fewer. Those of a worker that is lost go to the
front of the queue; an idle worker gets a copy of a chunk that another takes too long for, and the first result counts.
A result is accepted only under its attempt: a batch, a chunk and a worker, none of whose numbers are used twice.
"""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from metadist.fleet import events
from metadist.fleet.events import Action, Attempt, Event, Worker
from metadist.fleet.limits import PATIENT, Budgets, Nodes, Pace, Patience, Silence

Key = tuple[int, Hashable]  # batch and chunk
REMEMBERED = 4  # batches of which results that come late are compared with the first ones


@dataclass
class Member:
    """A worker that has joined: its attempts in flight, since when it computes the first of them, whether it ever
    returned anything; when it was asked for a sign of life and answered, and how long the run had waited for it when
    that was last reported."""

    node: str
    host: str = ""
    attempts: list[Attempt] = field(default_factory=list)
    since: float = 0.0
    proven: bool = False
    asked: float | None = None
    answered: float | None = None
    reported_s: float = 0.0


class Controller:
    """Keeps `target` workers and gets every chunk of every batch computed once.

    A worker is `starting`, then `working`, and `leaving` where its node will be taken away; in the end none of them. At
    most `depth` chunks are in flight per worker; with fewer than `min_workers` working none is assigned. `cost` says
    how long a chunk should take, in any unit. Raises TooManyLosses.
    """

    def __init__(
        self,
        target: int,
        min_workers: int = 1,
        depth: int = 2,
        patience: Patience = PATIENT,
        cost: Callable[[Any], float] = lambda chunk: 1.0,
    ):
        self.target = target
        self.min_workers = min_workers
        self.depth = depth
        self.patience = patience
        self.starting: dict[Worker, frozenset[str]] = {}
        self.working: dict[Worker, Member] = {}
        self.leaving: dict[Worker, Member] = {}
        self.unreachable: set[Worker] = set()
        """Of those that have joined, who gave no sign of life when asked for one."""
        self.queue: deque[Key] = deque()
        self.batch = 0
        self.num_lost = self.num_copies = 0
        """Workers that were lost, but for those of draining nodes; chunks given to a second worker."""
        self._cost = cost
        self._attempts: dict[Key, list[Attempt]] = {}  # in flight, of every chunk without a result
        self._left: dict[int, int] = {}
        self._kinds: dict[int, str] = {}
        self._winners: dict[int, dict[Hashable, Attempt]] = {}
        self._budgets, self._nodes, self._pace = Budgets(patience), Nodes(patience), Pace(patience)
        self._next_worker = 0
        self._fruitless = 0  # losses in a row of workers that never returned anything
        self._spawn_at = 0.0
        self._silence = Silence(patience)
        self._copy_at = 0.0  # nothing is late before

    @property
    def state(self) -> Literal["idle", "computing", "waiting"]:
        """Whether there is anything to compute, and whether anything is being computed or it waits for workers."""
        if not self._attempts:
            return "idle"
        reached = (at.worker not in self.unreachable for attempts in self._attempts.values() for at in attempts)
        return "computing" if any(reached) else "waiting"

    @property
    def num_workers(self) -> int:
        """Workers that have joined and can be reached."""
        return len(self.working) + len(self.leaving) - len(self.unreachable)

    def finished(self, batch: int) -> bool:
        """Every chunk of the batch has been returned."""
        return batch not in self._left

    def begin(self, chunks: Sequence[Hashable], now: float, kind: str = "") -> list[Action]:
        """Start a batch, number `self.batch` from then on; others may be under way. Those of a `kind` are alike."""
        self.batch += 1
        self._kinds[self.batch], self._winners[self.batch] = kind, {}
        for old in [old for old in self._kinds if old <= self.batch - REMEMBERED and self.finished(old)]:
            del self._kinds[old], self._winners[old]
        if chunks:
            self._left[self.batch] = len(chunks)
        self._copy_at, keys = 0.0, [(self.batch, chunk) for chunk in chunks]
        self.queue.extend(keys)
        self._attempts |= {key: [] for key in keys}
        return self._settle(now)

    def drop(self, now: float) -> list[Action]:
        """Forget every chunk without a result: what is in flight is not wanted any more."""
        unwanted = [events.Cancel(attempt) for attempts in self._attempts.values() for attempt in attempts]
        for entries in (self.queue, self._attempts, self._left):
            entries.clear()
        return [*unwanted, *self._settle(now)]

    def on(self, event: Event, now: float) -> list[Action]:
        """What to do about an event at time `now` (seconds on any clock that never goes back)."""
        done: list[Action] = []
        match event:
            case events.Done(attempt):
                member = self._member(attempt.worker)
                if member is None or attempt not in member.attempts:
                    return []
                done = [*self._hear(attempt.worker, member, now), *self._return(attempt, member, now)]
                if attempt.worker in self.working and len(self.working) <= self.target:
                    one = [attempt.worker]  # the others have what they had: with more of them it takes no longer
                    return [
                        *done,
                        *self._assign_queued(one, now),
                        *(self._copy(one, now) if now >= self._copy_at else []),
                    ]
            case events.Joined(worker, node, host) if worker in self.starting:
                del self.starting[worker]
                (self.leaving if node in self._nodes.draining else self.working)[worker] = Member(node, host)
            case events.Answered(worker) if member := self._member(worker):
                done = self._hear(worker, member, now)
            case events.Lost(worker) if worker in self.starting or self._member(worker):
                done = self._lose(event, now)
            case events.Unreachable(worker, reason) if self._member(worker):
                done = self._probe(worker, reason)
            case events.Draining(nodes) if nodes != self._nodes.draining:
                done = self._drain(nodes)
            case events.Target(count):
                self.target = count
            case events.Tick():
                done = [*self._give_up(now), *self._listen(now)]
            case _:
                pass
        return [*done, *self._settle(now)]

    def wakes_in(self, now: float) -> float | None:
        """Seconds until a Tick may matter; None: not before something else happens."""
        times = [self._spawn_at, self._nodes.next_end(now), self._silence.ends]
        idle = not self.queue and not all(member.attempts for member in self.working.values())
        for member in self._members().values():
            if member.attempts:
                times += [member.since + limit for limit in self._limits(member)[0 if idle else 1 :]]
                times += self._listens_at(member)
        return min((time - now for time in times if now < time < inf), default=None)

    def _members(self) -> dict[Worker, Member]:
        return self.working | self.leaving

    def _member(self, worker: Worker) -> Member | None:
        return self.working.get(worker) or self.leaving.get(worker)

    def _return(self, attempt: Attempt, member: Member, now: float) -> list[Action]:
        """Accept a result: the first of a chunk counts, another must be equal."""
        batch, chunk, _ = attempt
        if member.attempts[0] == attempt and batch in self._kinds:
            self._pace.took(self._kinds[batch], self._cost(chunk), now - member.since)
        if member.attempts[0] == attempt:
            member.since, member.asked, member.reported_s = now, None, 0.0
        member.attempts.remove(attempt)
        if not member.proven:
            member.proven, self._fruitless = True, 0
        self._nodes.returned(member.node)
        attempts = self._attempts.pop((batch, chunk), None)
        if attempts is None:
            first = self._winners.get(batch, {}).get(chunk)
            return [events.Compare(first, attempt)] if first else []
        self._left[batch] -= 1
        if not self._left[batch]:
            del self._left[batch]
        self._winners.get(batch, {})[chunk] = attempt
        return [events.Cancel(other) for other in attempts if other != attempt]

    def _let_go(self, worker: Worker) -> Member:
        """Forget a worker, and put what it had in flight at the front of the queue."""
        self.starting.pop(worker, None)
        self.unreachable.discard(worker)
        member = self.working.pop(worker, None) or self.leaving.pop(worker, None) or Member("")
        for attempt in reversed(member.attempts):
            attempts = self._attempts.get(attempt[:2], [])
            if attempt in attempts:
                attempts.remove(attempt)
                if not attempts:
                    self.queue.appendleft(attempt[:2])
        return member

    def _probe(self, worker: Worker, reason: str) -> list[Action]:
        self._let_go(worker)
        self.starting[self._next_worker] = frozenset()
        self._next_worker += 1
        return [
            events.Say(f"worker {worker} cannot be reached ({reason}); its chunks are computed again"),
            events.Probe(worker, self._next_worker - 1),
        ]

    def _lose(self, lost: events.Lost, now: float) -> list[Action]:
        worker, reason, kind, node = lost
        foretold, member = worker in self.leaving, self._let_go(worker)
        node = member.node or node
        if foretold or node in self._nodes.draining:
            return [events.Say(f"worker {worker} left with its node; its chunks are computed again")]
        self.num_lost += 1
        said: list[Action] = [events.Say(f"worker {worker} was lost ({reason}); its chunks are computed again")]
        if not member.proven:
            self._fruitless += 1
            self._spawn_at = now + self.patience.pause_s(self._fruitless)
        if self._nodes.lost(node, now):
            said.append(events.Say(f"workers keep dying on node {node[:8]}: for a while others go elsewhere"))
        self._budgets.charge(kind, reason, self.target, now)
        return said

    def _drain(self, nodes: frozenset[str]) -> list[Action]:
        self._nodes.draining = nodes
        leaving = [worker for worker, member in self.working.items() if member.node in nodes]
        self.leaving |= {worker: self.working.pop(worker) for worker in leaving}
        return [events.Say(f"worker {worker} gets no new chunks: its node is being taken away") for worker in leaving]

    def _give_up(self, now: float) -> list[Action]:
        """Lose the workers whose chunk takes so long that they must be hung."""
        done: list[Action] = []
        for worker, member in self._members().items():
            if member.attempts and now >= member.since + (limit := self._limits(member)[1]):
                lost = events.Lost(worker, f"no result in {limit:.0f} s", "unavailable")
                done += [events.Abandon(worker), *self._lose(lost, now)]
        return done

    def _listen(self, now: float) -> list[Action]:
        """Ask workers whose chunk takes long for a sign of life, report which are waited for, and lose those that have
        given none for long."""
        done: list[Action] = []
        for worker, member in self._members().items():
            if not member.attempts or now < member.since + self._late_s(member):
                continue
            waited_s, patience = now - member.since, self.patience
            if member.asked is None or (
                member.answered is not None and now >= max(member.asked, member.answered) + patience.quiet_s
            ):
                member.asked, member.answered = now, None
                done.append(events.Ask(worker))
            elif member.answered is None and now >= member.asked + patience.answer_s:
                self.unreachable.add(worker)
            gone = worker in self.unreachable
            due_s = self._late_s(member) + patience.quiet_s if not member.reported_s else 2 * member.reported_s
            if waited_s >= due_s and (gone or member.answered is not None):
                member.reported_s = waited_s
                life = "does not answer and is not counted" if gone else "answers and computes"
                where = f" on {member.host}" if member.host else ""
                done.append(
                    events.Say(f"no result for {waited_s:.0f} s, waiting for worker {worker}{where}, which {life}")
                )
            if gone and member.proven and now >= member.asked + patience.unreachable_s:
                lost = events.Lost(worker, f"no sign of life for {now - member.asked:.0f} s", "unavailable")
                done += [events.Abandon(worker), *self._lose(lost, now)]
        return done

    def _listens_at(self, member: Member) -> list[float]:
        """When a member whose chunk takes long is to be asked, reported or lost."""
        late, patience, asked = member.since + self._late_s(member), self.patience, member.asked
        report_at = late + patience.quiet_s if not member.reported_s else member.since + 2 * member.reported_s
        if asked is None:
            return [late, report_at]
        if member.answered is not None:
            return [max(asked, member.answered) + patience.quiet_s, report_at]
        return [asked + patience.answer_s, asked + patience.unreachable_s, report_at]

    def _hear(self, worker: Worker, member: Member, now: float) -> list[Action]:
        """Note a sign of life."""
        member.answered = now
        if worker not in self.unreachable:
            return []
        self.unreachable.discard(worker)
        return [events.Say(f"worker {worker} answers again")]

    def _late_s(self, member: Member) -> float:
        """After how many seconds a member's chunk takes longer than is usual."""
        copied_s = self._limits(member)[0]
        return copied_s if member.proven and copied_s < inf else self.patience.first_quiet_s - self.patience.quiet_s

    def _limits(self, member: Member) -> tuple[float, float]:
        """After how many seconds a member's chunk is copied, and the member given up."""
        batch, chunk, _ = member.attempts[0]
        return self._pace.limits(self._kinds.get(batch, self._kinds[self.batch]), self._cost(chunk), member.proven)

    def _settle(self, now: float) -> list[Action]:
        """Bring the number of workers to the target, then assign what can be assigned."""
        actions = [*self._retire(), *self._respawn(now)]
        able = [worker for worker in sorted(self.working)[: self.target] if worker not in self.unreachable]
        return [*actions, *self._assign_queued(able, now), *self._copy(able, now), *self._notice(now)]

    def _retire(self) -> list[Action]:
        """End surplus workers: those not yet there, then the newest, each when it holds no chunk."""
        surplus = len(self.working) + len(self.starting) - self.target
        gone = sorted(self.starting, reverse=True)[: max(surplus, 0)]
        unwanted = {worker: self.working[worker] for worker in sorted(self.working)[self.target :]} | self.leaving
        gone += [worker for worker, member in unwanted.items() if not member.attempts]
        for worker in gone:
            for group in (self.starting, self.working, self.leaving):
                group.pop(worker, None)
            self.unreachable.discard(worker)
        return [events.Retire(worker) for worker in gone]

    def _respawn(self, now: float) -> list[Action]:
        """Start missing workers, and restart those not yet there that avoid a node whose quarantine has ended."""
        avoid = self._nodes.avoided(now)
        stale = [worker for worker, avoided in self.starting.items() if avoided - avoid]
        actions: list[Action] = [events.Retire(worker) for worker in stale]
        for worker in stale:
            del self.starting[worker]
        while len(self.working) + len(self.starting) < self.target and now >= self._spawn_at:
            self.starting[self._next_worker] = avoid - self._nodes.draining  # which will not come back
            actions.append(events.Spawn(self._next_worker, avoid))
            self._next_worker += 1
        return actions

    def _assign_queued(self, workers: Sequence[Worker], now: float) -> list[Action]:
        if not self.queue or self._is_paused():
            return []
        return [
            self._assign(self.queue.popleft(), worker, now)
            for filled in range(self.depth)
            for worker in workers
            if self.queue and len(self.working[worker].attempts) == filled
        ]

    def _assign(self, key: Key, worker: Worker, now: float) -> events.Assign:
        member, attempt = self.working[worker], Attempt(*key, worker)
        if not member.attempts:
            member.since, member.asked, member.reported_s = now, None, 0.0
        member.attempts.append(attempt)
        self._attempts[key].append(attempt)
        return events.Assign(attempt)

    def _copy(self, workers: Sequence[Worker], now: float) -> list[Action]:
        """Have idle workers compute copies of the chunks that take too long, the longest first."""
        idle = [worker for worker in workers if worker in self.working and not self.working[worker].attempts]
        if self.queue or not self._attempts or not idle or self._is_paused():
            return []
        busy = [member for member in self._members().values() if member.attempts]
        late = [member for member in busy if now >= member.since + self._limits(member)[0]]
        self._copy_at = min((m.since + self._limits(m)[0] for m in busy if m not in late), default=0.0)
        alone = (a for m in sorted(late, key=lambda m: m.since) for a in m.attempts if self._attempts.get(a[:2]) == [a])
        copies = [self._assign(attempt[:2], worker, now) for worker, attempt in zip(idle, list(alone), strict=False)]
        self.num_copies += len(copies)
        return [*copies]

    def _notice(self, now: float) -> list[Action]:
        """While workers are missing, say so now and then."""
        working = self._reached()
        due = self._silence.is_over(working < self.target, self._is_paused(), bool(self._attempts), now)
        return [events.Waiting(working, self.target, self._is_paused())] if due else []

    def _is_paused(self) -> bool:
        return self._reached() < min(self.min_workers, self.target)

    def _reached(self) -> int:
        return len(self.working) - sum(worker in self.working for worker in self.unreachable)
