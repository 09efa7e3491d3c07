"""Events that a fleet reports to its controller, and the actions with which that answers."""

from typing import Any, Literal, NamedTuple

Worker = int  # numbers are never used twice: a replacement is a new worker
Kind = Literal["died", "unavailable", "out of memory", "error"]


class Attempt(NamedTuple):
    """One worker's go at one chunk of one batch: what a result must be labelled with to be taken."""

    batch: int
    chunk: Any  # can be hashed, is not looked into
    worker: Worker


class Joined(NamedTuple):
    """A spawned worker is ready, on this node of that host."""

    worker: Worker
    node: str = ""
    host: str = ""


class Lost(NamedTuple):
    """A worker is gone or not to be trusted any more, with whatever it had in flight."""

    worker: Worker
    reason: str
    kind: Kind = "died"
    node: str = ""


class Unreachable(NamedTuple):
    """A call to a worker failed on the way; nobody knows what the worker has in flight, or whether it lives."""

    worker: Worker
    reason: str


class Done(NamedTuple):
    """A worker returned a chunk."""

    attempt: Attempt


class Answered(NamedTuple):
    """A worker gave the sign of life that it was asked for."""

    worker: Worker


class Draining(NamedTuple):
    """These are all the nodes that will soon be taken away."""

    nodes: frozenset[str]


class Target(NamedTuple):
    """The run should have this many workers from now on."""

    count: int  # pyright: ignore[reportIncompatibleMethodOverride]


class Tick(NamedTuple):
    """Time went by. Comes at least every second, whatever else happens."""


class Spawn(NamedTuple):
    """Start this worker, not on these nodes if there are others."""

    worker: Worker
    avoid: frozenset[str] = frozenset()


class Ask(NamedTuple):
    """Ask this worker for a sign of life, which it can give while it computes."""

    worker: Worker


class Probe(NamedTuple):
    """If this worker answers, let it join under a new number, so that nothing of before is taken for its result."""

    worker: Worker
    successor: Worker


class Retire(NamedTuple):
    """End this worker; nothing of it is in flight."""

    worker: Worker


class Abandon(NamedTuple):
    """End this worker, which does not answer; nothing of it is waited for any more."""

    worker: Worker


class Assign(NamedTuple):
    """Have this worker compute this chunk after what it already has."""

    attempt: Attempt


class Cancel(NamedTuple):
    """The result is not needed: another copy came first, or nobody wants it any more."""

    attempt: Attempt


class Compare(NamedTuple):
    """Two workers returned the same chunk: they must be equal to the bit."""

    first: Attempt
    second: Attempt


class Say(NamedTuple):
    """Tell the user."""

    text: str


class Waiting(NamedTuple):
    """Tell the user that fewer workers have joined than there should be, and whether the run stands still for it."""

    joined: int
    target: int
    paused: bool

    def sentence(self, why: str) -> str:
        """What it is in words; `why`: what is known of those that are missing."""
        doing = "waiting for workers" if self.paused else "computing with fewer workers"
        if why == f"{self.target} being started":
            return f"starting {self.target} worker{'s' * (self.target > 1)}"
        return f"{doing}: {self.joined} of {self.target} have joined; {why}"


Event = Joined | Lost | Unreachable | Done | Answered | Draining | Target | Tick
Action = Spawn | Ask | Probe | Retire | Abandon | Assign | Cancel | Compare | Say | Waiting
