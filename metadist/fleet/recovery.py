"""A parameter server that outlives its actors: what they had computed is computed again, to the same bits.

A meta-step is a pure function of theta, the optimizer's state and its number. So a server that died is rebuilt from a
snapshot of some steps ago; the steps since then are computed again.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from metadist.core.errors import doing_it_again
from metadist.core.messages import Weights
from metadist.fleet.actors import join_weights
from metadist.fleet.executor import Actor, Executor, Failure, Ref
from metadist.fleet.server import Optimization, Stats, cut_state, join_states, shares, slices

SNAPSHOT_EVERY = 20  # meta-steps
MOST_IN_A_ROW = 5
TRIES = 3  # of a call whose answer is lost on the way

Result = Sequence[Ref]
"""Of a bundle of chunks: the reports, then of each slice of theta that slice of their gradients."""
Then = Callable[[tuple[Ref, ...]], None]
"""What follows a meta-step, given references to weights that are still to come."""


class ServerLost(RuntimeError):
    """An actor that owns theta, or a slice of it, died."""


class ResultsLost(RuntimeError):
    """Meta-gradients were lost before the server had added them up."""


class WeightsLost(RuntimeError):
    """Weights were lost that workers were to compute with."""


class Snapshot(NamedTuple):
    """What a server is rebuilt from: theta after `step` meta-steps, its optimizer's state, and where gradients are of
    the weights one step before, those too."""

    step: int
    theta: np.ndarray
    state: dict[str, Any] | None
    behind: np.ndarray | None = None


class ShardedServer:
    """theta in `servers` shards (fewer where it is small), each an actor with a slice of it: the bits are those of one.

    Weights are one reference per slice, which is how workers get them and how they cut their gradients.
    """

    def __init__(
        self, executor: Executor, theta: np.ndarray, optimization: Optimization, state: dict[str, Any] | None,
        servers: int = 1, admit: Callable[[list[str]], None] = lambda proofs: None,
    ):  # fmt: skip
        """`admit` is given every shard's `server_proof` before the first meta-step, and raises where it must not be."""
        self._executor = executor
        pieces = slices(len(theta), servers)
        self._shards: list[Actor] = executor.start_shards([
            (theta[piece], share, cut_state(state, piece) if state else None)
            for piece, share in zip(pieces, shares(optimization, pieces), strict=True)
        ])  # fmt: skip
        self._sent: list[Ref] = []  # reports of the results that were sent ahead
        self._takes: list[Ref] = []
        self._admit: Callable[[list[str]], None] | None = admit

    def send(self, step: int, first: int, results: Sequence[Result]) -> None:
        """Have the shards add up results number `first` and on of a step, in task order, while others are still being
        computed. `apply` needs no such head start, and of results sent ahead only the reports: so that the gradients
        of a step need not all be stored at once."""
        if first == 0:
            self._sent, self._takes = [], []
        for shard, parts in zip(self._shards, self._parts(results), strict=True):
            self._takes += self._executor.call(shard, "take", step, not self._sent, *parts)
        self._sent += [result[0] for result in results]

    def apply(
        self, step: int, *results: Result, num_tasks: int | None = None, then: Then | None = None
    ) -> tuple[tuple[Ref, ...], Stats]:
        """As `Server.apply`: references to the slices of the new weights, and the statistics. `then` is called as
        soon as the weights have been asked for.

        Raises ServerLost or ResultsLost where there is no telling whether it was applied, or it was not; doing it again
        is safe."""
        if self._admit is not None:
            self._admit(self._ask("proof"))
            self._admit = None
        sent = len(self._sent) if self._sent == [result[0] for result in results[: len(self._sent)]] else 0
        parts, call = self._parts(results[sent:]), self._executor.call
        moved: list[list[Ref]] = []

        def step_all() -> list[Ref]:
            if len(self._shards) == 1:
                moved[:] = [call(self._shards[0], "apply", step, not sent, num_tasks, *parts[0], returns=2)]
            else:
                folded = [
                    ref for shard, own in zip(self._shards, parts, strict=True)
                    for ref in call(shard, "fold", step, not sent, num_tasks, *own)
                ]  # fmt: skip
                trials = [ref for shard in self._shards for ref in call(shard, "attempt", step, *folded)]
                moved[:] = [call(shard, "move", step, *folded, *trials, returns=2) for shard in self._shards]
            return [stats for _, stats in moved]

        asked = step_all()
        if then is not None:
            then(tuple(weights for weights, _ in moved))
        stats = self._get(step_all, asked=asked)
        return tuple(weights for weights, _ in moved), stats[0]

    def weights(self) -> tuple[Ref, ...]:
        """References to the slices of theta."""
        return tuple(self._call_all("weights"))

    def snapshot(self) -> dict[str, Any]:
        """As `Server.snapshot`, whatever the number of shards."""
        return join_states(self._ask("snapshot"))

    def copy(self, step: int, behind: Sequence[Ref] | None) -> Callable[[], Snapshot | None]:
        """Ask for a snapshot after `step` meta-steps: a function that returns it once it is there, until then None."""
        refs, count = [*self.weights(), *self._call_all("snapshot"), *(behind or ())], len(self._shards)

        def poll() -> Snapshot | None:
            if len(self._executor.wait(refs, 0.0)) < len(refs):
                return None
            parts = self._get(lambda: refs)
            theta, states = join_weights(parts[:count])[0].theta.copy(), join_states(parts[count : 2 * count])
            before = join_weights(parts[2 * count :])[0].theta.copy() if behind else None
            return Snapshot(step, theta, states, before)

        return poll

    def pids(self) -> list[int]:
        """The actors' processes."""
        return self._ask("pid")

    def close(self) -> None:
        """End the actors."""
        for shard in self._shards:
            self._executor.end(shard)

    def _parts(self, results: Sequence[Result]) -> list[list[Ref]]:
        """For each shard, all reports and its own gradients."""
        reports = [result[0] for result in results]
        return [[*reports, *(result[1 + number] for result in results)] for number in range(len(self._shards))]

    def _call_all(self, method: str) -> list[Ref]:
        return [ref for shard in self._shards for ref in self._executor.call(shard, method)]

    def _ask(self, method: str) -> list[Any]:
        return self._get(lambda: self._call_all(method))

    def _get(self, call: Callable[[], list[Ref]], tries: int = TRIES, asked: list[Ref] | None = None) -> list[Any]:
        """What the calls return, which have been `asked` or are made now. Where an answer is lost on the way they are
        made again, which changes nothing."""
        values = self._executor.get(asked or call())
        failures = [value for value in values if isinstance(value, Failure)]
        if not failures:
            return values
        of_actors = [failure for failure in failures if failure.kind not in ("lost", "error")]
        failure = next(iter(of_actors or failures))  # where a shard died, the others lack what it should have returned
        if failure.kind == "unavailable" and tries > 1:
            return self._get(call, tries - 1)
        if of_actors:
            raise ServerLost(failure.name)
        if failure.error is None:
            raise ResultsLost(failure.name)
        if isinstance(failure.error, ValueError):  # it lacks what an earlier call should have brought?
            for value in self._executor.get(self._takes):
                if isinstance(value, Failure):
                    raise ResultsLost(value.name)
        raise failure.error


class RecoveringServer:
    """The parameter server of a run. Starts a `ShardedServer`, and another one whenever that raises ServerLost.

    `start(theta, state)` makes one; `put(weights)` stores weights; `recompute(weights, step, num_tasks)` returns a
    meta-step's results at weights. `lag` is 1 where gradients are of the weights one step before. Raises ServerLost
    where rebuilding does not help either.
    """

    def __init__(
        self,
        start: Callable[[np.ndarray, dict[str, Any] | None], ShardedServer],
        snapshot: Snapshot,
        recompute: Callable[[Any, int, int], Sequence[Result]],
        put: Callable[[Weights], tuple[Ref, ...]],
        lag: int = 0,
        say: Callable[[str], None] = lambda text: None,
    ):
        self._start, self._recompute, self._put, self._lag, self._say = start, recompute, put, lag, say
        self._snapshot = snapshot
        self._next_snapshot: Callable[[], Snapshot | None] | None = None
        self._tasks: dict[int, int] = {}  # of each step since the snapshot
        self._failures = 0
        self.whole = True  # not in the middle of being rebuilt
        self._restart()

    def weights(self) -> tuple[Ref, ...]:
        """theta as it is now."""
        return self._recent[-1]

    def used(self) -> tuple[Ref, ...]:
        """The weights that the next meta-step's gradients are of."""
        return self._recent[0]

    def send(self, step: int, first: int, results: Sequence[Result]) -> None:
        """See `ShardedServer.send`."""
        self._server.send(step, first, results)

    def apply(
        self, step: int, *results: Result, num_tasks: int | None = None, then: Then | None = None
    ) -> tuple[tuple[Ref, ...], Stats]:
        """As `Server.apply`, whatever becomes of actors and results meanwhile; `then`: see `ShardedServer.apply`."""
        present: Sequence[Result] | None = results
        while True:
            try:
                present = self._recompute(self.used(), step, num_tasks or 0) if present is None else present
                weights, stats = self._server.apply(step, *present, num_tasks=num_tasks, then=then)
                break
            except (ServerLost, WeightsLost) as error:
                self._rebuild(error, step)
            except ResultsLost as error:
                self._fail(error)
                self._say(f"results of meta-step {step} were lost ({error}); they are computed again")
            present, then = None, None
        self._failures = 0
        self._advance(step, weights, num_tasks or stats.num_tasks)
        return weights, stats

    def snapshot(self) -> dict[str, Any]:
        """As `Server.snapshot`."""
        while True:
            try:
                return self._server.snapshot()
            except (ServerLost, ResultsLost) as error:
                self._rebuild(error, self.done())

    def renew(self, why: Exception, weights: Any) -> tuple[Ref, ...]:
        """Weights in the place of lost ones of this server: those of the same step, computed again."""
        behind = weights is self._recent[0] and weights is not self._recent[-1]
        self._rebuild(why, self.done())
        return self.used() if behind else self.weights()

    def pids(self) -> list[int]:
        """Processes of the shards."""
        return self._server.pids()

    def close(self) -> None:
        """End the shards."""
        self._server.close()

    def done(self) -> int:
        """How many meta-steps it has applied."""
        return max(self._tasks, default=self._snapshot.step - 1) + 1

    def _fail(self, error: Exception) -> None:
        self._failures += 1
        if self._failures > MOST_IN_A_ROW:
            raise ServerLost(
                f"the parameter server was lost {self._failures} times in a row ({error}): "
                f"{doing_it_again()} goes on from the checkpoint"
            ) from error

    def _restart(self) -> None:
        self._server = self._start(self._snapshot.theta, self._snapshot.state)
        self._recent = deque([self._server.weights()], maxlen=self._lag + 1)
        if self._snapshot.behind is not None:
            self._recent.appendleft(self._put(Weights(self._snapshot.step - 1, self._snapshot.behind)))

    def _rebuild(self, error: Exception, until: int) -> None:
        """A new server that has applied the meta-steps before `until`."""
        while True:
            self._fail(error)
            self._next_snapshot = None
            again = until - self._snapshot.step
            self._say(f"the parameter server was lost ({error}); it is rebuilt, {again} meta-steps are computed again")
            self.whole = False
            try:
                self._server.close()
                self._restart()
                for step in range(self._snapshot.step, until):
                    num_tasks = self._tasks[step]
                    results = self._recompute(self.used(), step, num_tasks)
                    weights, _ = self._server.apply(step, *results, num_tasks=num_tasks)
                    self._advance(step, weights, num_tasks)
                self.whole = True
                return
            except (ServerLost, ResultsLost, WeightsLost) as another:
                error = another.with_traceback(None)  # which holds this frame, with all results, in a cycle

    def _advance(self, step: int, weights: tuple[Ref, ...], num_tasks: int) -> None:
        """Go on to the next step. Every so often ask for a snapshot, and take it when it has come, so that nobody waits
        for it."""
        self._tasks[step] = num_tasks
        self._recent.append(weights)
        if self._next_snapshot is not None:
            try:
                snapshot = self._next_snapshot()
            except (ServerLost, ResultsLost):
                self._next_snapshot = None  # if it was the server, the next call will notice
                return
            if snapshot is not None:
                self._snapshot, self._next_snapshot, self._failures = snapshot, None, 0
                self._tasks = {step: tasks for step, tasks in self._tasks.items() if step >= snapshot.step}
        elif (step + 1) % SNAPSHOT_EVERY == 0:
            self._next_snapshot = self._server.copy(step + 1, self._recent[0] if self._lag else None)
