"""How much may go wrong, and how long anything may take, before a controller does something about it."""

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from statistics import median

from metadist.fleet.events import Kind


class TooManyLosses(RuntimeError):
    """Workers fail faster than replacing them can help."""


@dataclass(frozen=True)
class Patience:
    """Times in seconds.

    most_losses: workers that may be lost within `window_s`, by what became of them (or four times as many as the run
    should have, where they died or did not answer). Those of draining nodes do not count.
    copy_after, copy_after_s: so many times as long as is usual, and at least so long, a chunk may take before an idle
    worker gets a copy of it. give_up_after, give_up_after_s: likewise before its worker counts as hung; first_s: for a
    worker that has yet to return its first chunk (where it compiles, or maps data from a slow disk).
    quiet_s: how much longer than what is copied a chunk may take before it is said who is waited for; of first chunks,
    which nobody can judge, `first_quiet_s`. answer_s: within which a worker gives a sign of life, or counts as not
    reachable; unreachable_s: after so long, it counts as lost.
    back_off_s: before the second replacement in a row that returned nothing; then twice as long each time.
    node_losses: so many in a row on one node keep replacements away from it for `quarantine_s`.
    """

    most_losses: Mapping[Kind, int] = field(
        default_factory=lambda: {"died": 20, "unavailable": 20, "out of memory": 3, "error": 0}
    )
    window_s: float = 600.0
    notice_s: float = 10.0
    copy_after: float = 2.0
    copy_after_s: float = 1.0
    give_up_after: float = 30.0
    give_up_after_s: float = 60.0
    first_s: float = 900.0
    quiet_s: float = 5.0
    first_quiet_s: float = 30.0
    answer_s: float = 2.0
    unreachable_s: float = 30.0
    back_off_s: float = 2.0
    longest_back_off_s: float = 20.0
    node_losses: int = 3
    quarantine_s: float = 300.0

    def pause_s(self, losses: int) -> float:
        """Before the next replacement, after so many in a row that returned nothing."""
        longer = self.back_off_s * 2 ** min(losses - 2, 16)
        return min(self.longest_back_off_s, longer) if losses > 1 else 0.0


PATIENT = Patience()


class Budgets:
    """Counts losses of each kind within the window. Raises TooManyLosses with the last reason."""

    def __init__(self, patience: Patience):
        self._patience = patience
        self._times: dict[Kind, deque[float]] = defaultdict(deque)

    def charge(self, kind: Kind, reason: str, target: int, now: float) -> None:
        """One more loss at time `now`, of a run that should have `target` workers."""
        times, window_s = self._times[kind], self._patience.window_s
        times.append(now)
        while times[0] < now - window_s:
            times.popleft()
        allowed = self._patience.most_losses[kind]
        if kind in ("died", "unavailable"):
            allowed = max(allowed, 4 * target)
        if len(times) > allowed:
            raise TooManyLosses(
                f"{len(times)} workers were lost within {window_s:.0f} s ({kind}), the last one because: {reason}"
            )


class Nodes:
    """Which nodes replacements should keep away from: draining ones, and those where workers keep dying."""

    def __init__(self, patience: Patience):
        self._patience = patience
        self._in_a_row: dict[str, int] = defaultdict(int)
        self._until: dict[str, float] = {}
        self.draining: frozenset[str] = frozenset()

    def lost(self, node: str, now: float) -> bool:
        """A worker died there; whether that puts it into quarantine."""
        self._in_a_row[node] += 1
        if not node or self._in_a_row[node] < self._patience.node_losses:
            return False
        self._in_a_row[node], self._until[node] = 0, now + self._patience.quarantine_s
        return True

    def returned(self, node: str) -> None:
        """A worker there has returned a chunk."""
        self._in_a_row[node] = 0

    def avoided(self, now: float) -> frozenset[str]:
        return self.draining | {node for node, until in self._until.items() if until > now}

    def next_end(self, now: float) -> float:
        """When the next quarantine ends; 0 if there is none."""
        return min((until for until in self._until.values() if until > now), default=0.0)


class Silence:
    """When to say again that workers are missing: every `notice_s` seconds while the run stands still for want of them,
    else a sixth as often."""

    def __init__(self, patience: Patience):
        self._patience = patience
        self._since: float | None = None

    @property
    def ends(self) -> float:
        return 0.0 if self._since is None else self._since + self._patience.notice_s

    def is_over(self, missing: bool, paused: bool, busy: bool, now: float) -> bool:
        if not missing:
            self._since = None
            return False
        if self._since is None:
            self._since = now
        if not busy or now < self._since + self._patience.notice_s * (1 if paused else 6):
            return False
        self._since = now
        return True


class Pace:
    """How long chunks usually take, by the kind of batch."""

    def __init__(self, patience: Patience):
        self._patience = patience
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=64))
        self._usual: dict[str, float | None] = {}

    def took(self, kind: str, cost: float, seconds: float) -> None:
        self._recent[kind].append(seconds / cost)
        self._usual[kind] = None

    def limits(self, kind: str, cost: float, proven: bool) -> tuple[float, float]:
        """After how many seconds an idle worker should get a copy, and the worker at it counts as hung."""
        patience, usual = self._patience, self._usual.get(kind)
        if not self._recent[kind]:
            return inf, patience.first_s
        if usual is None:
            usual = self._usual[kind] = median(self._recent[kind])
        copied = max(patience.copy_after_s, patience.copy_after * cost * usual)
        return copied, max(
            patience.give_up_after_s, patience.give_up_after * cost * usual
        ) if proven else patience.first_s
