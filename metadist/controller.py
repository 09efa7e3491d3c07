"""Who computes which chunk: a pure state machine, `on(event, now) -> actions`, that knows nothing of Ray.

Chunks are dealt as workers ask for them, so a slower worker gets fewer; the chunks of a worker that dies go to the
front of the queue. No result depends on who computed it.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

Chunk = Any  # a piece of work that can be hashed: the controller does not look inside
MOST_CHUNKS = 8  # of a deal: so much, of each of two deals, a death has computed again
Worker = int  # numbers are never used twice: a replacement is a new worker


class Joined(NamedTuple):
    """A spawned worker is ready."""

    worker: Worker


class Lost(NamedTuple):
    """A worker died, with whatever it had in flight."""

    worker: Worker
    reason: str


class Done(NamedTuple):
    """A worker returned a chunk."""

    worker: Worker
    chunk: Chunk


class Target(NamedTuple):
    """The run should have this many workers from now on."""

    count: int


class Tick(NamedTuple):
    """Nothing happened for a while."""


class Spawn(NamedTuple):
    """Start this worker."""

    worker: Worker


class Retire(NamedTuple):
    """End this worker; nothing of it is in flight."""

    worker: Worker


class Assign(NamedTuple):
    """Have this worker compute this chunk after what it already has."""

    worker: Worker
    chunk: Chunk


class Say(NamedTuple):
    """Tell the user."""

    text: str


class Waiting(NamedTuple):
    """Tell the user that fewer workers have joined than there should be, and whether the run stands still for it."""

    joined: int
    target: int
    paused: bool


Event = Joined | Lost | Done | Target | Tick
Action = Spawn | Retire | Assign | Say | Waiting


class TooManyLosses(RuntimeError):
    """Workers die faster than replacing them can help."""


class Controller:
    """Keeps `target` workers and gets every chunk of the current batch computed once.

    At most `depth` chunks are in flight per worker; with fewer than `min_workers` joined nothing is dealt. More than
    `max_losses` deaths (or four times the target) within `window_s` seconds raise TooManyLosses with the last reason.
    """

    def __init__(
        self,
        target: int,
        min_workers: int = 1,
        depth: int = 2,
        max_losses: int = 20,
        window_s: float = 600.0,
        notice_s: float = 10.0,
    ):
        self.target = target
        self.min_workers = min_workers
        self.depth = depth
        self.max_losses = max_losses
        self.window_s = window_s
        self.notice_s = notice_s
        self.in_flight: dict[Worker, list[Chunk]] = {}
        self.starting: set[Worker] = set()
        self.queue: deque[Chunk] = deque()
        self.remaining: set[Chunk] = set()
        self._next_worker = 0
        self._losses: deque[float] = deque()
        self._waiting_since: float | None = None

    @property
    def finished(self) -> bool:
        """Every chunk of the batch has been returned."""
        return not self.remaining

    @property
    def stands_still(self) -> bool:
        """Nothing is being computed, for want of workers."""
        return not self.finished and not any(self.in_flight.values())

    @property
    def num_workers(self) -> int:
        """Workers that have joined."""
        return len(self.in_flight)

    def begin(self, chunks: Sequence[Chunk], now: float) -> list[Action]:
        """Start a batch; the one before must be finished."""
        assert self.finished, "a batch is still under way"
        self.queue = deque(chunks)
        self.remaining = set(chunks)
        return self._settle(now)

    def on(self, event: Event, now: float) -> list[Action]:
        """What to do about an event at time `now` (seconds on any clock that never goes back)."""
        said: list[Action] = []
        match event:
            case Joined(worker) if worker in self.starting:
                self.starting.remove(worker)
                self.in_flight[worker] = []
            case Lost(worker, reason) if worker in self.in_flight or worker in self.starting:
                said.append(Say(f"worker {worker} was lost ({reason}); its chunks are computed again"))
                self._lose(worker, reason, now)
            case Done(worker, chunk) if chunk in self.in_flight.get(worker, []):
                self.in_flight[worker].remove(chunk)
                self.remaining.discard(chunk)
                if self._is_settled():
                    return self._deal([worker])
            case Target(count):
                self.target = count
            case _:
                pass
        return said + self._settle(now)

    def _lose(self, worker: Worker, reason: str, now: float) -> None:
        self.starting.discard(worker)
        self.queue.extendleft(reversed(self.in_flight.pop(worker, [])))
        self._losses.append(now)
        while self._losses[0] < now - self.window_s:
            self._losses.popleft()
        if len(self._losses) > max(self.max_losses, 4 * self.target):
            raise TooManyLosses(
                f"{len(self._losses)} workers were lost within {self.window_s:.0f} s, the last one because: {reason}"
            )

    def _settle(self, now: float) -> list[Action]:
        """Bring the number of workers to the target, then deal what can be dealt."""
        actions: list[Action] = []
        while len(self.in_flight) + len(self.starting) < self.target:
            self.starting.add(self._next_worker)
            actions.append(Spawn(self._next_worker))
            self._next_worker += 1
        actions += self._retire()
        surplus = set(self._surplus())
        actions += self._deal([worker for worker in self.in_flight if worker not in surplus])
        return actions + self._notice(now)

    def _is_settled(self) -> bool:
        """Every worker there should be has joined: then only one that has just returned a chunk can be dealt another.
        Without this, an event would cost more the more workers there are."""
        return len(self.in_flight) == self.target and not self.starting

    def _retire(self) -> list[Action]:
        """Let surplus workers go: first those not yet there, then the newest, each when it holds no chunk."""
        surplus = len(self.in_flight) + len(self.starting) - self.target
        gone: list[Action] = []
        for worker in sorted(self.starting, reverse=True)[: max(surplus, 0)]:
            self.starting.remove(worker)
            gone.append(Retire(worker))
        for worker in self._surplus():
            if not self.in_flight[worker]:
                del self.in_flight[worker]
                gone.append(Retire(worker))
        return gone

    def _surplus(self) -> list[Worker]:
        return sorted(self.in_flight)[self.target :]

    def _needed(self) -> int:
        return min(self.min_workers, self.target)

    def _deal(self, workers: Sequence[Worker]) -> list[Action]:
        if not self.queue or len(self.in_flight) < self._needed():
            return []
        dealt: list[Action] = []
        for filled in range(self.depth):
            for worker in workers:
                if self.queue and len(self.in_flight[worker]) == filled:
                    chunk = self.queue.popleft()
                    self.in_flight[worker].append(chunk)
                    dealt.append(Assign(worker, chunk))
        return dealt

    def _notice(self, now: float) -> list[Action]:
        """While workers are missing, say so: every `notice_s` seconds if the run is paused, else a sixth as often."""
        if len(self.in_flight) >= self.target:
            self._waiting_since = None
            return []
        if self._waiting_since is None:
            self._waiting_since = now
        paused = len(self.in_flight) < self._needed()
        if self.finished or now - self._waiting_since < self.notice_s * (1 if paused else 6):
            return []
        self._waiting_since = now
        return [Waiting(len(self.in_flight), self.target, paused)]


def cut_deals(chunks: Sequence[Chunk], workers: int) -> list[tuple[Chunk, ...]]:
    """Chunks in rounds of one call per worker: half of what remains in each, single chunks at the end (factoring,
    Hummel et al. 1992), so that there are few calls, and a slow worker holds nobody up."""
    deals: list[tuple[Chunk, ...]] = []
    start, size = 0, 1
    while start < len(chunks):
        if len(deals) % workers == 0:
            size = min(MOST_CHUNKS, max(1, (len(chunks) - start) // (2 * workers)))
        deals.append(tuple(chunks[start : start + size]))
        start += size
    return deals
