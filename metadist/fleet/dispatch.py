"""The dispatcher: carries out the controller's actions through an executor, and tells it what happened.

A chunk's way: `Fleet.meta_gradients` puts it into a bundle of a batch, the controller assigns that to a worker, the
executor calls the worker's actor; the references that the call returned go to the server.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from metadist.core.errors import InputError, Interrupted
from metadist.core.messages import Chunk, ChunkReport, Progress, Weights, plan, unseen
from metadist.fleet import events
from metadist.fleet.actors import Bundle, WeightCache, join_weights
from metadist.fleet.controller import REMEMBERED, Controller
from metadist.fleet.events import Action, Attempt, Event
from metadist.fleet.executor import Executor, Failure, Ref
from metadist.fleet.limits import PATIENT, Patience
from metadist.fleet.recovery import RecoveringServer, Result, ServerLost, ShardedServer, Snapshot, WeightsLost
from metadist.fleet.roster import Roster
from metadist.fleet.server import Optimization, Stats, slices
from metadist.fleet.vitals import Machines

MOST_CHUNKS = 8  # of a bundle: so much, of each of two bundles, a death has computed again
SEND_AHEAD = 16  # bundles: results go to the server while others are computed, so many at a time
TICK_S = 0.5


class Ahead(NamedTuple):
    """Steps that may be begun before it is their turn, with these weights. `stale`: each bundle is computed with the
    newest weights there are when it is assigned, not with these."""

    weights: Any
    steps: Sequence[Sequence[Chunk]]
    stale: bool = False


class Call(NamedTuple):
    """A call under way: its number, the attempt it belongs to, and references to its results."""

    number: int
    attempt: Attempt
    refs: Sequence[Ref]


@dataclass
class Batch:
    """Bundles to compute at some weights (None: at the newest when each is assigned), and their results so far.

    results: references, of each bundle's first result; returned: of each attempt the reports, or the measurements;
    lags: of each attempt how many meta-steps old its weights are.
    """

    method: Literal["meta_gradients", "evaluate"]
    bundles: Sequence[Bundle]
    weights: tuple[Ref, ...] | None
    baselines: tuple[str, ...] = ()
    progress: Progress = unseen
    results: dict[Bundle, Result] = field(default_factory=dict)
    returned: dict[Attempt, list[Any]] = field(default_factory=dict)
    num_attempts: Counter[Bundle] = field(default_factory=Counter)
    lags: dict[Attempt, int] = field(default_factory=dict)

    def differ(self, first: Attempt, second: Attempt) -> bool:
        """Whether two attempts at one bundle gave different bits."""
        both = first in self.returned and second in self.returned and self.lags[first] == self.lags[second]
        return both and _bits(self.returned[first]) != _bits(self.returned[second])

    def values(self) -> list[Any]:
        """Of each chunk, in order, what the first attempt at it returned: its report or measurements."""
        first = self._first()
        return [value for bundle in self.bundles for value in self.returned[first[bundle]]]

    @property
    def kind(self) -> str:
        """Those of a kind take equally long."""
        return f"{self.method} {self.baselines}"

    def staleness(self) -> Counter[int]:
        """Tasks by how many meta-steps old the weights were that their gradients are of."""
        tasks: Counter[int] = Counter()
        for bundle, attempt in self._first().items():
            tasks[self.lags[attempt]] += bundle[-1].stop - bundle[0].start
        return tasks

    def account(self) -> list[list[Any]]:
        """Of each bundle of a meta-step: its first task, the task after its last, worker, attempts, seconds, and the
        worker's host and process."""
        first, rows = self._first(), []
        for bundle in self.bundles:
            reports = self.returned[first[bundle]]
            seconds = round(sum(sum(report.seconds.values()) for report in reports), 4)
            attempts = self.num_attempts[bundle]
            rows.append([bundle[0].start, bundle[-1].stop, first[bundle].worker, attempts, seconds, reports[0].worker])
        return rows

    def _first(self) -> dict[Bundle, Attempt]:
        """Of each bundle the attempt whose result counts."""
        return {attempt.chunk: attempt for attempt in reversed(self.returned)}


def _bits(values: Sequence[ChunkReport | Mapping[str, np.ndarray]]) -> bytes:
    """What must be equal of two attempts: losses and gradients' norms, or measurements."""
    pairs = [each.values() if isinstance(each, Mapping) else (each.losses, each.norms) for each in values]
    return b"".join(array.tobytes() for pair in pairs for array in pair)


def cut_bundles(chunks: Sequence[Chunk], workers: int) -> list[Bundle]:
    """Chunks in rounds of one call per worker: half of what remains in each, single chunks at the end (factoring,
    Hummel et al. 1992), so that there are few calls, and a slow worker holds nobody up."""
    bundles: list[Bundle] = []
    start, size = 0, 1
    while start < len(chunks):
        if len(bundles) % workers == 0:
            size = min(MOST_CHUNKS, max(1, (len(chunks) - start) // (2 * workers)))
        bundles.append(tuple(chunks[start : start + size]))
        start += size
    return bundles


class Fleet:
    """The actors of a run: worker actors that compute chunks, and the parameter server. It holds every actor and every
    reference.

    `proof`, `server_proof`: of the workers and servers that the run has had before, if any. Where patience allows for
    errors, an exception of the user's code costs the worker, not the run. `asked_to_stop`, `asked_target`: of a signal,
    or a new number of workers, both heeded also while the fleet waits for workers.
    """

    def __init__(
        self,
        executor: Executor,
        target: int = 1,
        min_workers: int = 1,
        mixed_devices: bool = False,
        asked_to_stop: Callable[[], int | None] = lambda: None,
        asked_target: Callable[[], int | None] = lambda: None,
        say: Callable[[str], None] = lambda text: None,
        servers: int = 1,
        patience: Patience = PATIENT,
        proof: str | None = None,
        server_proof: str | None = None,
    ):
        self.executor = executor
        self.controller = Controller(target, min_workers, patience=patience, cost=len)
        self.roster = Roster(executor, patience, mixed_devices, proof)
        self.servers = servers
        self.machines = Machines()
        self.server_proof = server_proof
        """What shows that servers compute the same bits, once one has."""
        self.staleness: Counter[int] = Counter()
        """Tasks by how many meta-steps old the weights were that their gradients are of."""
        self._asked_to_stop, self._asked_target, self._say = asked_to_stop, asked_target, say
        self._mixed_devices = mixed_devices
        self._server: RecoveringServer | None = None
        self._server_admitted = False
        self._batches: dict[int, Batch] = {}
        self._under_way: dict[tuple[str, int], int] = {}
        """Split and step -> batch, of steps that are to be computed or have been begun ahead of their time."""
        self._calls: dict[Ref, Call] = {}
        self._num_calls = 0
        self._cancelled: set[int] = set()
        self._cache = WeightCache()
        self._newest: tuple[Ref, ...] = ()
        self._lost_weights: str | None = None
        self._last_step: Batch | None = None
        self._version = 0
        self._chunk_size = 1
        self._ticked = executor.now()
        self._perform(self.controller.on(events.Tick(), executor.now()))

    @property
    def num_workers(self) -> int:
        """Workers that have joined and can be reached."""
        return self.controller.num_workers

    @property
    def target(self) -> int:
        """How many workers the run should have."""
        return self.controller.target

    @property
    def proof(self) -> str | None:
        """What shows that workers compute the same bits (see `Worker.proof`), once one has joined."""
        return self.roster.proof

    @property
    def pids(self) -> dict[int, int]:
        """Process of each worker that has joined."""
        return self.roster.pids

    def server_pids(self) -> list[int]:
        """Processes of the parameter server."""
        return self._server.pids() if self._server else []

    def start_server(
        self, theta: np.ndarray, optimization: Optimization, state: dict[str, Any] | None,
        behind: np.ndarray | None = None, lag: int = 0,
    ) -> RecoveringServer:  # fmt: skip
        """The parameter server, in as many actors as it was asked to be; see `RecoveringServer`."""
        if self._server is not None:
            self._server.close()

        def start(theta: np.ndarray, state: dict[str, Any] | None) -> ShardedServer:
            server = ShardedServer(self.executor, theta, optimization, state, self.servers, self._admit_server)
            if self._server is not None:
                server.pids()  # nobody must wait for weights that cannot come before its processes are there
            return server

        snapshot = Snapshot(state["step"] if state else 0, theta, state, behind)
        self._server = RecoveringServer(start, snapshot, self._recompute, self._put, lag, self._say)
        return self._server

    def meta_gradients(
        self, weights: Sequence[Ref] | Weights, chunks: Sequence[Chunk], ahead: Ahead | None = None
    ) -> list[Result]:
        """References to reports and gradients, in the order of `chunks`, all computed: what the server's `apply` takes.

        Meanwhile, where workers have nothing else to do, those of the steps `ahead` are begun.
        """
        self._version, self._chunk_size = chunks[0].step, max(self._chunk_size, chunks[0].stop - chunks[0].start)
        refs, begun = self._refs(weights), self._under_way.get(chunks[0][:2])
        if begun and self._batches[begun].weights not in (None, refs):
            self._forget_begun()  # an answer of the server was lost, and its weights asked for once more
        while True:
            self._newest = refs
            try:
                step = chunks[0][:2]
                number = self._under_way[step] = self._under_way.get(step) or self._begin_step(refs, chunks)
                if ahead:
                    self._begin_ahead(ahead)
                results = self._finish(number)
                del self._under_way[step]
                self.staleness += self._batches[number].staleness()
                return results
            except WeightsLost as error:
                refs = self._renew(error, weights, refs)
                ahead = ahead and ahead._replace(weights=self._server.weights())  # pyright: ignore

    def begin_next(self, chunks: Sequence[Chunk], weights: tuple[Ref, ...]) -> None:
        """Give workers a step's chunks before there are weights for them: as soon as the server has moved them,
        workers go on without the driver."""
        self._version = chunks[0].step
        self._begin_ahead(Ahead(weights, [chunks]))

    def evaluate(
        self, weights: Sequence[Ref] | Weights, chunks: Sequence[Chunk], baselines: tuple[str, ...] = (),
        progress: Progress = unseen,
    ) -> list[dict[str, np.ndarray]]:  # fmt: skip
        """What `Worker.evaluate` returns for each chunk, in order; `progress` is told how many are done."""
        refs, bundles = self._refs(weights), [(chunk,) for chunk in chunks]
        while True:
            try:
                number = self._begin(Batch("evaluate", bundles, refs, baselines, progress))
                self._finish(number)
                return self._batches[number].values()
            except WeightsLost as error:
                refs = self._renew(error, weights, refs)

    def reports(self) -> list[ChunkReport]:
        """The reports of the last meta-step's chunks, in task order: those that came with the results, as references to
        these may be lost, or replaced by others, once the server has been rebuilt."""
        return self._last_step.values() if self._last_step else []

    def account(self) -> list[list[Any]]:
        """Of each bundle of the last meta-step: first task, the task after the last, worker, attempts, seconds, who."""
        return self._last_step.account() if self._last_step else []

    def report(self, stats: Stats, seconds: float) -> None:
        """Show a meta-step's figures where those who look after the cluster watch it; here nowhere."""

    def fetch(self, weights: Sequence[Ref] | Weights) -> Weights:
        """Weights as the server returned them."""
        if isinstance(weights, Weights):
            return weights
        parts = self.executor.get(weights)
        failure = next((part for part in parts if isinstance(part, Failure)), None)
        if failure is None:
            return join_weights(parts)[0]
        return self.fetch(self._renew(WeightsLost(failure.name), weights, weights))

    def resize(self, target: int) -> None:
        """Have `target` workers from now on."""
        self._perform(self.controller.on(events.Target(target), self.executor.now()))

    def close(self) -> None:
        """End every actor of this fleet."""
        self.executor.close()
        self.roster.close()
        if self._server is not None:
            self._server.close()

    def _admit_server(self, proofs: list[str]) -> None:
        """As workers are let in: another machine is refused at the start, and is no place to rebuild a server."""
        self.server_proof = self.server_proof or proofs[0]
        other = next((proof for proof in proofs if proof != self.server_proof), None)
        if other is not None and not self._mixed_devices:
            text = (
                f"a parameter server ({other}) does not compute the same bits as those before it ({self.server_proof})"
            )
            if self._server_admitted:
                raise ServerLost(text)
            one = "fleet.servers=1, " if self.servers > 1 else ""
            raise InputError(f"{text}: use equal machines, {one}or set fleet.mixed_devices=true")
        self._server_admitted = True

    def _put(self, weights: Weights) -> tuple[Ref, ...]:
        """Store weights, cut as the server cuts them."""
        pieces = slices(len(weights.theta), self.servers)
        return tuple(self.executor.put(Weights(weights.version, weights.theta[piece])) for piece in pieces)

    def _refs(self, weights: Sequence[Ref] | Weights) -> tuple[Ref, ...]:
        return self._put(weights) if isinstance(weights, Weights) else tuple(weights)

    def _renew(self, error: WeightsLost, weights: Sequence[Ref] | Weights, refs: Sequence[Ref]) -> tuple[Ref, ...]:
        """References to weights of equal bits in the place of lost ones."""
        if isinstance(weights, Weights):
            return self._put(weights)
        if self._server is None:
            raise error
        return self._server.renew(error, refs)

    def _recompute(self, weights: tuple[Ref, ...], step: int, num_tasks: int) -> list[Result]:
        """A step's results once more, for a server that was lost. Raises WeightsLost."""
        self._forget_begun()  # of weights that it can no longer send
        return self._finish(self._begin_step(weights, plan("train", step, num_tasks, self._chunk_size)))

    def _begin_step(self, weights: tuple[Ref, ...] | None, chunks: Sequence[Chunk]) -> int:
        return self._begin(Batch("meta_gradients", cut_bundles(chunks, self.target), weights))

    def _begin_ahead(self, ahead: Ahead) -> None:
        self._newest = tuple(ahead.weights)
        for chunks in ahead.steps:
            if chunks[0][:2] not in self._under_way:
                weights = None if ahead.stale else self._newest
                self._under_way[chunks[0][:2]] = self._begin_step(weights, chunks)

    def _begin(self, batch: Batch) -> int:
        """Give a batch to the controller; its number."""
        number = self.controller.batch + 1
        needed = {*range(number - REMEMBERED + 1, number), *self._under_way.values()}
        for old in [old for old in self._batches if old not in needed and self.controller.finished(old)]:
            del self._batches[old]
        self._batches[number] = batch
        self._perform(self.controller.begin(batch.bundles, self.executor.now(), batch.kind))
        return number

    def _finish(self, number: int) -> list[Result]:
        """Wait for a batch: the results of its bundles, in order."""
        batch, sent = self._batches[number], 0
        while not self.controller.finished(number):
            self.executor.check()
            for event in self._wait():
                self._perform(self.controller.on(event, self.executor.now()))
            if why := self._lost_weights:
                self._lost_weights = None
                self._forget_begun()
                raise WeightsLost(why)
            if self.controller.state == "waiting":
                if (signal := self._asked_to_stop()) is not None:
                    raise Interrupted(signal)
                self.resize(self._asked_target() or self.target)
            sent = self._send_ahead(sent, batch)
            batch.progress(len(batch.results), len(batch.bundles))
        self.roster.run_has_begun = True
        results = [batch.results[bundle] for bundle in batch.bundles]
        batch.results = dict.fromkeys(batch.results, ())  # gradients must not stay in the object store
        if batch.method == "meta_gradients":
            self._last_step = batch
        return results

    def _forget_begun(self) -> None:
        """Nobody wants what workers have been given."""
        self._perform(self.controller.drop(self.executor.now()))
        self._under_way.clear()

    def _send_ahead(self, sent: int, batch: Batch) -> int:
        """Let the server add up, while others are being computed, the first results of the step; how many it has."""
        ready, bundles = sent, batch.bundles
        if self._server is None or batch.method != "meta_gradients":
            return 0
        while ready < len(bundles) and bundles[ready] in batch.results:
            ready += 1
        if ready - sent < SEND_AHEAD:
            return sent
        self._server.send(bundles[0][0].step, sent, [batch.results[bundle] for bundle in bundles[sent:ready]])
        batch.results |= {bundle: batch.results[bundle][:1] for bundle in bundles[sent:ready]}
        return ready

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case events.Spawn(worker, avoid):
                    self.roster.spawn(worker, avoid)
                case events.Ask(worker):
                    self.roster.ask(worker)
                case events.Probe(worker, successor):
                    self.roster.probe(worker, successor)
                case events.Assign(attempt):
                    self._submit(attempt)
                case events.Cancel(attempt):
                    self._cancel(attempt)
                case events.Retire(worker) | events.Abandon(worker):
                    self._end(worker)
                case events.Compare(first, second):
                    self._compare(first, second)
                case events.Say(text):
                    self._say(text)
                case events.Waiting(joined, target, _):
                    self._say(action.sentence(self.executor.shortage(*self.roster.missing(target - joined), joined)))

    def _submit(self, attempt: Attempt) -> None:
        """Have a worker compute a bundle. One that has just been found lost, of which the controller is about to hear,
        computes nothing."""
        actor, batch = self.roster.actors.get(attempt.worker), self._batches[attempt.batch]
        batch.lags[attempt] = attempt.chunk[0].step - self._version
        batch.num_attempts[attempt.chunk] += 1
        if actor is None:
            return
        weights = batch.weights or self._newest
        number, parts = self._cache.send(attempt.worker, weights)
        self._num_calls += 1
        arguments = (self._num_calls, number, attempt.chunk)
        if batch.method == "meta_gradients":
            num_slices = len(weights)
            refs = self.executor.call(actor, "meta_gradients", *arguments, num_slices, *parts, returns=1 + num_slices)
        else:
            refs = self.executor.call(actor, "evaluate", *arguments, batch.baselines, *parts)
        self._calls[refs[0]] = Call(self._num_calls, attempt, refs)

    def _cancel(self, attempt: Attempt) -> None:
        for call in self._calls.values():
            if call.attempt == attempt:
                self._cancelled.add(call.number)
                self.executor.call(self.roster.actors[attempt.worker], "cancel", call.number, control=True)

    def _end(self, worker: int) -> None:
        self._forget_calls(worker)
        self.roster.end(worker)

    def _forget_calls(self, worker: int) -> None:
        self._cancelled -= {call.number for call in self._calls.values() if call.attempt.worker == worker}
        self._calls = {ref: call for ref, call in self._calls.items() if call.attempt.worker != worker}

    def _wait(self) -> list[Event]:
        """The next events: finished calls, and time going by."""
        done = self.executor.wait([*self._calls, *self.roster.refs], TICK_S)
        found = [self._event(ref, value) for ref, value in zip(done, self.executor.get(done), strict=True)]
        happened: list[Event] = [event for event in found if event is not None]
        now = self.executor.now()
        if now - self._ticked >= TICK_S:
            self._ticked = now
            happened += [*self.roster.hung(), events.Draining(self.executor.draining()), events.Tick()]
        return happened

    def _event(self, ref: Ref, value: Any) -> Event | None:
        """The event that a finished call is. An exception of our own or the user's code is raised here again."""
        call = self._calls.pop(ref, None)
        if call is None:
            return self.roster.event(ref, value)
        attempt, unwanted = call.attempt, call.number in self._cancelled
        self._cancelled.discard(call.number)
        if not isinstance(value, Failure):
            if value is not None:
                self._take(call, value)
        elif value.kind == "lost":  # the worker is well
            self._lost_weights = self._lost_weights if unwanted else value.name
        elif value.kind == "unavailable":
            self._forget_calls(attempt.worker)
            return events.Unreachable(attempt.worker, value.name)
        elif value.kind != "error" or not unwanted:
            self._forget_calls(attempt.worker)
            return self.roster.lost(attempt.worker, value)
        return events.Done(attempt)

    def _take(self, call: Call, value: list[Any]) -> None:
        """Accept what an attempt returned; the first results of a bundle are the ones that count."""
        batch = self._batches.get(call.attempt.batch)
        if batch is not None:
            batch.results.setdefault(call.attempt.chunk, call.refs)
            batch.returned[call.attempt] = value

    def _compare(self, first: Attempt, second: Attempt) -> None:
        batch = self._batches.get(first.batch)
        if batch and not self._mixed_devices and batch.differ(first, second):
            self._say(f"workers {first.worker} and {second.worker} computed {second.chunk} differently: one of them is "
                      "faulty, or something in the model, loss or source is not a function of its inputs")  # fmt: skip
