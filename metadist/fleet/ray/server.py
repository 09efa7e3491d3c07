"""The driver's view of the parameter server: references go in, references to the new weights come out."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from metadist.fleet.ray.actors import ServerActor, join_weights
from metadist.fleet.recovery import Kept, ResultsLost, ServerLost
from metadist.fleet.server import Optimization, Stats, cut_state, join_states, shares, slices

ANSWER_S = 600.0
Ref = ray.ObjectRef
Result = Sequence[Ref]  # the reports of a deal of chunks, and of each shard its slices of their gradients


class RayServer:
    """theta in `servers` actors, each with a slice of it (fewer where theta is small): the bits are those of one.

    Weights are one reference per slice, which is how workers get them and how they cut their gradients.
    """

    def __init__(
        self, theta: np.ndarray, optimization: Optimization, state: dict[str, Any] | None, servers: int = 1,
        admit: Callable[[list[str]], None] = lambda proofs: None,
    ):  # fmt: skip
        """`admit` is given every shard's `server_proof` before the first meta-step, and raises where it must not be."""
        pieces = slices(len(theta), servers)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        where: Any = "SPREAD" if len(pieces) > 1 else here  # the driver's node, without which there is no run
        remote = ray.remote(ServerActor).options(num_cpus=0, max_restarts=0, scheduling_strategy=where)
        self._shards: list[Any] = [
            remote.remote(theta[piece], share, cut_state(state, piece) if state else None)
            for piece, share in zip(pieces, shares(optimization, pieces), strict=True)
        ]
        self._sent: list[Ref] = []  # reports of what this step's `take` calls were given
        self._takes: list[Ref] = []
        self._admit: Callable[[list[str]], None] | None = admit

    def send(self, step: int, first: int, results: Sequence[Result]) -> None:
        """Have the shards add up results number `first` and on of a step, in task order, while others are still being
        computed. `apply` needs no such head start, and of results sent ahead only the reports: so that the gradients
        of a step need not all be kept at once."""
        if first == 0:
            self._sent, self._takes = [], []
        fresh = not self._sent
        self._sent += [result[0] for result in results]
        for shard, (reports, gradients) in zip(self._shards, self._per_shard(results), strict=True):
            self._takes.append(shard.take.remote(step, fresh, *reports, *gradients))

    def apply(self, step: int, *results: Result, num_tasks: int | None = None) -> tuple[tuple[Ref, ...], Stats]:
        """As `Server.apply`: references to the slices of the new weights, and the statistics."""
        if self._admit is not None:
            self._admit(self._get(lambda: [shard.proof.remote() for shard in self._shards]))
            self._admit = None
        sent = self._sent if self._sent == [result[0] for result in results[: len(self._sent)]] else []
        parts = [
            (step, not sent, num_tasks, *reports, *gradients)
            for reports, gradients in self._per_shard(results[len(sent) :])
        ]
        weights: list[Ref] = []

        def call() -> list[Ref]:
            if len(self._shards) == 1:
                moved = [self._shards[0].apply.options(num_returns=2).remote(*parts[0])]
            else:
                folded = [shard.fold.remote(*own) for shard, own in zip(self._shards, parts, strict=True)]
                tried = [shard.attempt.remote(step, *folded) for shard in self._shards]
                moved = [shard.move.options(num_returns=2).remote(step, *folded, *tried) for shard in self._shards]
            weights[:] = [slices for slices, _ in moved]
            return [told for _, told in moved]

        stats = self._get(call)
        return tuple(weights), stats[0]

    def pids(self) -> list[int]:
        """The actors' processes."""
        return self._get(lambda: [shard.pid.remote() for shard in self._shards])

    def weights(self) -> tuple[Ref, ...]:
        """References to the slices of theta."""
        return tuple(shard.weights.remote() for shard in self._shards)

    def snapshot(self) -> dict[str, Any]:
        """As `Server.snapshot`, whatever the number of shards."""
        return join_states(self._get(lambda: [shard.snapshot.remote() for shard in self._shards]))

    def copy(self, step: int, behind: Sequence[Ref] | None) -> Callable[[], Kept | None]:
        """What there is after `step` meta-steps: a function that returns it once it has come."""
        weights, count = list(self.weights()), len(self._shards)
        states = [shard.snapshot.remote() for shard in self._shards]
        refs = [*weights, *states, *(behind or ())]

        def come() -> Kept | None:
            if len(ray.wait(refs, num_returns=len(refs), timeout=0)[0]) < len(refs):
                return None
            told = self._get(lambda: refs)
            before = join_weights(told[2 * count :])[0].theta.copy() if behind else None
            theta = join_weights(told[:count])[0].theta.copy()
            return Kept(step, theta, join_states(told[count : 2 * count]), before)

        return come

    def close(self) -> None:
        """End the actors."""
        for shard in self._shards:
            ray.kill(shard)

    def _per_shard(self, results: Sequence[Result]) -> list[tuple[list[Ref], list[Ref]]]:
        """For each shard, all reports and its own gradients."""
        reports = [result[0] for result in results]
        return [(reports, [result[1 + number] for result in results]) for number in range(len(self._shards))]

    def _get(self, call: Callable[[], list[Ref]], tries: int = 3) -> list[Any]:
        """What the calls return. Where an answer is lost on the way they are made again, which changes nothing."""
        try:
            return ray.get(call(), timeout=ANSWER_S)
        except RayError as raised:
            error = forgotten(raised)
        name = type(error).__name__
        if isinstance(error, GetTimeoutError):
            raise ServerLost(f"no answer within {ANSWER_S:g} s") from error
        if isinstance(error, ActorUnavailableError) and tries > 1:
            return self._get(call, tries - 1)
        if isinstance(error, RayActorError | OutOfMemoryError):
            raise ServerLost(name) from error
        if not isinstance(error, RayTaskError):
            raise ResultsLost(name) from error
        if isinstance(error.cause, RayError):  # of an argument
            raise ResultsLost(type(error.cause).__name__) from error
        if isinstance(error.cause, ValueError):  # it lacks what an earlier call should have brought?
            self._check(self._takes)
        raise error.cause from error

    def _check(self, refs: list[Ref]) -> None:
        """Raise what went wrong in calls whose answers nobody waited for."""
        for ref in refs:
            try:
                ray.get(ref)
            except RayError as error:
                raise ResultsLost(type(error).__name__) from forgotten(error)


def forgotten(error: RayError) -> RayError:
    """The error without its traceback: a cycle with the frames of `ray.get`, which keeps whatever their callers held,
    such as references to the gradients of a step, until Python looks for cycles."""
    return error.with_traceback(None)
