"""A parameter server that outlives its actors: what they knew is computed again, to the same bits.

A meta-step is a pure function of theta, the optimizer's state and its number. So of a server that died it takes only a
copy of some steps ago; the steps since then are gone through again.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from metadist.core.messages import Weights
from metadist.fleet.server import Stats

KEEP_EVERY = 20  # meta-steps
MOST_IN_A_ROW = 5


class ServerLost(RuntimeError):
    """An actor that owns theta, or a slice of it, died."""


class ResultsLost(RuntimeError):
    """Meta-gradients were lost before the server had added them up."""


class WeightsLost(RuntimeError):
    """Weights were lost that workers were to compute with."""


class Kept(NamedTuple):
    """What a server is rebuilt from: theta after `step` meta-steps, its optimizer's state, and where gradients are of
    the weights one step before, those too."""

    step: int
    theta: np.ndarray
    state: dict[str, Any] | None
    behind: np.ndarray | None = None


class RecoveringServer:
    """Like the servers it starts, and starts anew when they raise ServerLost.

    `start(theta, state)` makes one; `put(weights)` makes of numpy weights what the fleet takes; `recompute(weights,
    step, num_tasks)` returns a meta-step's results at weights. `lag` is 1 where gradients are of the weights one step
    before. Raises ServerLost where rebuilding does not help either.
    """

    def __init__(
        self,
        start: Callable[[np.ndarray, dict[str, Any] | None], Any],
        kept: Kept,
        recompute: Callable[[Any, int, int], Sequence[Any]],
        put: Callable[[Weights], Any],
        lag: int = 0,
        say: Callable[[str], None] = lambda text: None,
    ):
        self._start, self._recompute, self._put, self._lag, self._say = start, recompute, put, lag, say
        self._kept = kept
        self._keeping: Callable[[], Kept | None] | None = None
        self._tasks: dict[int, int] = {}  # of each step since what is kept
        self._failures = 0
        self.whole = True  # not in the middle of being rebuilt
        self._restart()

    def weights(self) -> Any:
        """theta as it is now."""
        return self._recent[-1]

    def used(self) -> Any:
        """The weights that the next meta-step's gradients are of."""
        return self._recent[0]

    def send(self, step: int, first: int, results: Sequence[Any]) -> None:
        """See `RayServer.send`."""
        self._server.send(step, first, results)

    def apply(self, step: int, *results: Any, num_tasks: int | None = None) -> tuple[Any, Stats]:
        """As `Server.apply`, whatever becomes of actors and results meanwhile."""
        given: Sequence[Any] | None = results
        while True:
            try:
                given = self._recompute(self.used(), step, num_tasks or 0) if given is None else given
                weights, stats = self._server.apply(step, *given, num_tasks=num_tasks)
                break
            except (ServerLost, WeightsLost) as error:
                self._rebuild(error, step)
            except ResultsLost as error:
                self._fail(error)
                self._say(f"results of meta-step {step} were lost ({error}); they are computed again")
            given = None
        self._failures = 0
        self._tasks[step] = num_tasks or stats.num_tasks
        self._recent.append(weights)
        self._keep(step + 1)
        return weights, stats

    def snapshot(self) -> dict[str, Any]:
        """As `Server.snapshot`."""
        while True:
            try:
                return self._server.snapshot()
            except (ServerLost, ResultsLost) as error:
                self._rebuild(error, self.done())

    def renew(self, why: Exception, weights: Any) -> Any:
        """Weights that this server gave away are lost: such of the same step, computed again."""
        behind = weights is self._recent[0] and weights is not self._recent[-1]
        self._rebuild(why, self.done())
        return self.used() if behind else self.weights()

    def pids(self) -> list[int]:
        """Processes of what was started."""
        return self._server.pids()

    def close(self) -> None:
        """End what was started."""
        self._server.close()

    def done(self) -> int:
        """How many meta-steps it has applied."""
        return max(self._tasks, default=self._kept.step - 1) + 1

    def _fail(self, error: Exception) -> None:
        self._failures += 1
        if self._failures > MOST_IN_A_ROW:
            raise ServerLost(
                f"the parameter server was lost {self._failures} times in a row ({error}): "
                "--resume auto goes on from the checkpoint"
            ) from error

    def _restart(self) -> None:
        self._server = self._start(self._kept.theta, self._kept.state)
        self._recent = deque([self._server.weights()], maxlen=self._lag + 1)
        if self._kept.behind is not None:
            self._recent.appendleft(self._put(Weights(self._kept.step - 1, self._kept.behind)))

    def _rebuild(self, error: Exception, until: int) -> None:
        """A new server that has applied the meta-steps before `until`."""
        while True:
            self._fail(error)
            self._keeping = None
            again = until - self._kept.step
            self._say(f"the parameter server was lost ({error}); it is rebuilt, {again} meta-steps are computed again")
            self.whole = False
            try:
                self._server.close()
                self._restart()
                for step in range(self._kept.step, until):
                    results = self._recompute(self.used(), step, self._tasks[step])
                    weights, _ = self._server.apply(step, *results, num_tasks=self._tasks[step])
                    self._recent.append(weights)
                    self._keep(step + 1)
                self.whole = True
                return
            except (ServerLost, ResultsLost, WeightsLost) as another:
                error = another.with_traceback(None)  # which holds this frame, with all results, in a cycle

    def _keep(self, done: int) -> None:
        """Every so often ask for a copy, and take it when it has come, so that nobody waits for it."""
        if self._keeping is not None:
            try:
                kept = self._keeping()
            except (ServerLost, ResultsLost):
                self._keeping = None  # if it was the server, the next call will notice
                return
            if kept is not None:
                self._kept, self._keeping, self._failures = kept, None, 0
                self._tasks = {step: tasks for step, tasks in self._tasks.items() if step >= kept.step}
        elif done % KEEP_EVERY == 0:
            self._keeping = self._server.copy(done, self._recent[0] if self._lag else None)
