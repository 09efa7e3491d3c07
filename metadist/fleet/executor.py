"""What a fleet asks of the place where its actors run: a Ray cluster, or this process under a virtual clock."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from metadist.fleet.events import Kind

Ref = Any
"""A reference to an object: the result of a call, or what was put. Hashable; may be an argument of another call."""
Actor = Any


class Failure(NamedTuple):
    """Why there is no object behind a reference.

    lost: an argument of the call, or its result, is gone, and the actor is well; error: the code that was called raised
    `error`; the other kinds are about the actor, see `events.Kind`.
    """

    kind: Kind | Literal["lost"]
    name: str
    details: str = ""
    error: Exception | None = None

    @property
    def reason(self) -> str:
        return f"{self.name}: {self.details}" if self.details else self.name


class Executor(Protocol):
    """Runs actors and stores objects. It decides nothing: that is the controller's and the fleet's."""

    def now(self) -> float:
        """Seconds, on a clock that never goes back."""
        ...

    def check(self) -> None:
        """Raises HeadLost once the cluster's head has been given up."""
        ...

    def draining(self) -> frozenset[str]:
        """Ids of the nodes that will be taken away."""
        ...

    def shortage(self, unplaced: int, building: int, silent: int, joined: int = 0) -> str:
        """Why so many workers have not joined: those without a place to run, being built, and not answering; `joined`:
        those that have."""
        ...

    def start_worker(self, worker: int, avoid: frozenset[str]) -> Actor:
        """Start a `WorkerActor`, elsewhere than on the nodes to avoid, if there are others."""
        ...

    def start_shards(self, arguments: Sequence[tuple[Any, ...]]) -> list[Actor]:
        """Start a `Shard` of the parameter server from each of these arguments."""
        ...

    def call(self, actor: Actor, method: str, *arguments: Any, returns: int = 1, control: bool = False) -> list[Ref]:
        """Call a method of an actor: after the calls it already has, or, with `control`, while it computes."""
        ...

    def wait(self, refs: Sequence[Ref], longest_s: float) -> list[Ref]:
        """References whose objects exist or have failed: at least one, unless `longest_s` seconds go by first."""
        ...

    def get(self, refs: Sequence[Ref]) -> list[Any]:
        """The object behind each reference, or its Failure."""
        ...

    def put(self, value: Any) -> Ref:
        """Store an object."""
        ...

    def end(self, actor: Actor) -> None:
        """End an actor, whatever it does."""
        ...

    def close(self) -> None:
        """Release what the executor itself holds."""
        ...
