"""The fleet as Ray actors: carries out the controller's actions and tells it what happened."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from metadist.core.errors import InputError, Interrupted
from metadist.core.messages import Chunk, ChunkReport, Weights, plan
from metadist.fleet import events
from metadist.fleet.controller import KEPT, Controller
from metadist.fleet.dispatch import Ahead, Batch, Call, Deal, cut_deals
from metadist.fleet.events import Action, Attempt
from metadist.fleet.limits import PATIENT, Patience
from metadist.fleet.ray.actors import join_weights
from metadist.fleet.ray.calls import TICK_S, RayCalls, Told
from metadist.fleet.ray.head import GIVE_UP_S, HeadWatch
from metadist.fleet.ray.server import RayServer, Ref, Result, forgotten
from metadist.fleet.ray.workers import RayWorkers, Resources
from metadist.fleet.recovery import Kept, RecoveringServer, ServerLost, WeightsLost
from metadist.fleet.server import Optimization, slices

SEND_AHEAD = 16


class RayFleet:
    """Computes chunks on worker actors; Ray must be initialised. The driver owns every actor and every reference.

    `make_worker` makes a `Worker`, or anything with its methods, in the actor's process. `proof`, `server_proof`: of
    the workers and servers that the run has had before, if any.
    """

    def __init__(
        self,
        make_worker: Callable[[], Any],
        target: int,
        min_workers: int = 1,
        resources: Resources = Resources(),  # noqa: B008
        mixed_devices: bool = False,
        asked_to_stop: Callable[[], int | None] = lambda: None,
        asked_target: Callable[[], int | None] = lambda: None,
        say: Callable[[str], None] = lambda text: None,
        servers: int = 1,
        patience: Patience = PATIENT,
        proof: str | None = None,
        server_proof: str | None = None,
        head_give_up_s: float = GIVE_UP_S,
    ):
        self._asked_to_stop, self._asked_target = asked_to_stop, asked_target
        self._say = say
        self._head = HeadWatch(say, head_give_up_s)
        self._workers = RayWorkers(make_worker, resources, mixed_devices, proof)
        self._controller = Controller(target, min_workers, patience=patience, cost=len)
        self._calls = RayCalls(self._workers, self._take, patience, lambda: self._head.draining)
        self.servers = servers
        self.server_proof = server_proof
        """What shows that servers compute the same bits, once one has."""
        self._applied = False
        self._server: RecoveringServer | None = None
        self._batches: dict[int, Batch] = {}
        self._under_way: dict[tuple[str, int], int] = {}
        """Split and step -> batch, of steps that are to be computed or have been begun ahead of their time."""
        self._newest: Sequence[Ref] = ()
        self._computed: Batch | None = None
        self._version = 0
        self.staleness: Counter[int] = Counter()
        """Tasks by how many meta-steps old the weights were that their gradients are of."""
        self._chunk_size = 1
        self._told = Told()
        self._perform(self._controller.on(events.Tick(), time.monotonic()))

    @property
    def num_workers(self) -> int:
        """Workers that have joined."""
        return self._controller.num_workers

    @property
    def target(self) -> int:
        """How many workers the run should have."""
        return self._controller.target

    @property
    def head_lost(self) -> bool:
        """Whether the head of the cluster has been given up: then Ray ends this process before long."""
        return self._head.lost

    @property
    def proof(self) -> str | None:
        """What shows that workers compute the same bits (see `Worker.proof`), once one has joined."""
        return self._workers.proof

    @property
    def pids(self) -> dict[int, int]:
        """Process of each worker that has joined."""
        return self._workers.pids

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

        def start(theta: np.ndarray, state: dict[str, Any] | None) -> RayServer:
            server = RayServer(theta, optimization, state, self.servers, self._admit_server)
            if self._server is not None:
                server.pids()  # nobody must wait for weights that cannot come before its processes are there
            return server

        def put(weights: Weights) -> tuple[Ref, ...]:
            pieces = slices(len(weights.theta), self.servers)
            return tuple(ray.put(Weights(weights.version, weights.theta[piece])) for piece in pieces)

        kept = Kept(state["step"] if state else 0, theta, state, behind)
        self._server = RecoveringServer(start, kept, self._recompute, put, lag, self._say)
        return self._server

    def meta_gradients(
        self, weights: Sequence[Ref], chunks: Sequence[Chunk], ahead: Ahead | None = None
    ) -> list[Result]:
        """References to reports and gradients, in the order of `chunks`, all computed: what `RayServer.apply` takes.

        Meanwhile, where workers have nothing else to do, those of the steps `ahead` are begun.
        """
        self._version, self._chunk_size = chunks[0].step, max(self._chunk_size, chunks[0].stop - chunks[0].start)
        while True:
            self._newest = weights
            try:
                step = chunks[0][:2]
                number = self._under_way[step] = self._under_way.get(step) or self._begin_step(weights, chunks)
                if ahead:
                    self._begin_ahead(ahead)
                results = self._finish(number)
                del self._under_way[step]
                self.staleness += self._batches[number].staleness()
                return results
            except WeightsLost as error:
                weights = self._renew(error, weights)
                ahead = ahead and ahead._replace(weights=self._server.weights())  # pyright: ignore

    def evaluate(
        self, weights: Sequence[Ref] | Weights, chunks: Sequence[Chunk], baselines: tuple[str, ...] = ()
    ) -> list[dict[str, np.ndarray]]:
        """What `Worker.evaluate` returns for each chunk, in order."""
        given: Sequence[Ref] = (ray.put(weights),) if isinstance(weights, Weights) else weights
        while True:

            def submit(call: int, worker: int, deal: Deal, given: Sequence[Ref] = given) -> Result:
                return (
                    self._workers.actors[worker].evaluate.remote(
                        call, deal[0], baselines, *self._told.news(worker, tuple(given))
                    ),
                )

            try:
                number = self._begin([(chunk,) for chunk in chunks], submit, f"evaluate {baselines}")
                self._finish(number)
                return self._batches[number].values()
            except WeightsLost as error:
                given = (ray.put(weights),) if isinstance(weights, Weights) else self._renew(error, given)

    def reports(self) -> list[ChunkReport]:
        """The reports of the last meta-step's chunks, in task order: those that came with the results, as references to
        these may be lost, or replaced by others, once the server has been rebuilt."""
        return self._computed.reports() if self._computed else []

    def account(self) -> list[list[Any]]:
        """Of each deal of the last meta-step: first task, the task after the last, worker, attempts, seconds, who."""
        return self._computed.account() if self._computed else []

    def fetch(self, weights: Sequence[Ref] | Weights) -> Weights:
        """Weights as the server returned them."""
        if isinstance(weights, Weights):
            return weights
        try:
            return join_weights(ray.get(list(weights)))[0]
        except RayError as error:
            why = WeightsLost(type(forgotten(error)).__name__)
        return self.fetch(self._renew(why, weights))

    def resize(self, target: int) -> None:
        """Have `target` workers from now on."""
        self._perform(self._controller.on(events.Target(target), time.monotonic()))

    def close(self) -> None:
        """End every actor of this fleet."""
        self._head.close()
        self._workers.close()
        if self._server is not None:
            self._server.close()

    def _admit_server(self, proofs: list[str]) -> None:
        """As workers are let in: another machine is refused at the start, and is no place to rebuild a server."""
        self.server_proof = self.server_proof or proofs[0]
        other = next((proof for proof in proofs if proof != self.server_proof), None)
        if other is not None and not self._workers.mixed_devices:
            text = (
                f"a parameter server ({other}) does not compute the same bits as those before it ({self.server_proof})"
            )
            if self._applied:
                raise ServerLost(text)
            one = "fleet.servers=1, " if self.servers > 1 else ""
            raise InputError(f"{text}: use equal machines, {one}or set fleet.mixed_devices=true")
        self._applied = True

    def _recompute(self, weights: Sequence[Ref], step: int, num_tasks: int) -> list[Result]:
        """A step's results once more, for a server that was lost. Raises WeightsLost."""
        return self._finish(self._begin_step(weights, plan("train", step, num_tasks, self._chunk_size)))

    def _renew(self, error: WeightsLost, weights: Sequence[Ref]) -> Sequence[Ref]:
        """Weights of equal bits in the place of lost ones."""
        if self._server is None:
            raise error
        return self._server.renew(error, weights)

    def _begin_step(self, weights: Sequence[Ref] | None, chunks: Sequence[Chunk]) -> int:
        """Start a meta-step's batch, at `weights` (None: at the newest there are when a deal is made); its number."""

        def submit(call: int, worker: int, deal: Deal) -> Result:
            used = tuple(weights or self._newest)
            method = self._workers.actors[worker].meta_gradients.options(num_returns=1 + len(used))
            return method.remote(call, deal, *self._told.news(worker, used))

        return self._begin(cut_deals(chunks, self.target), submit, "train")

    def _begin_ahead(self, ahead: Ahead) -> None:
        self._newest = ahead.weights
        for chunks in ahead.steps:
            if chunks[0][:2] not in self._under_way:
                weights = None if ahead.stale else ahead.weights
                self._under_way[chunks[0][:2]] = self._begin_step(weights, chunks)

    def _begin(self, deals: Sequence[Deal], submit: Callable[[int, int, Deal], Result], kind: str) -> int:
        number = self._controller.batch + 1
        kept = {*range(number - KEPT + 1, number), *self._under_way.values()}
        for old in [old for old in self._batches if old not in kept and self._controller.finished(old)]:
            del self._batches[old]
        self._batches[number] = Batch(deals, submit, kind)
        self._perform(self._controller.begin(deals, time.monotonic(), kind))
        return number

    def _finish(self, number: int) -> list[Result]:
        """Results of a batch's deals, in order."""
        batch, sent = self._batches[number], 0
        while not self._controller.finished(number):
            self._head.check()
            for event in self._calls.wait(TICK_S):
                self._perform(self._controller.on(event, time.monotonic()))
            if why := self._calls.lost_weights():
                self._perform(self._controller.drop(time.monotonic()))
                self._under_way.clear()
                raise WeightsLost(why)
            if self._controller.state == "waiting":
                if (signal := self._asked_to_stop()) is not None:
                    raise Interrupted(signal)
                self.resize(self._asked_target() or self.target)
            sent = self._send(sent, batch)
        self._workers.proved = True
        results = [batch.results[deal] for deal in batch.deals]
        batch.results = dict.fromkeys(batch.results, ())  # gradients must not stay in the object store
        if batch.kind == "train":
            self._computed = batch
        return results

    def _take(self, call: Call, value: Any) -> None:
        """What an attempt brought; the first results of a deal are the ones that count."""
        batch, attempt = self._batches.get(call.attempt.batch), call.attempt
        if batch is not None:
            batch.results.setdefault(attempt.chunk, call.refs)
            batch.told[attempt] = value

    def _send(self, sent: int, batch: Batch) -> int:
        """Let the server add up, while others are being computed, the first results of the step; how many it has."""
        ready, deals = sent, batch.deals
        if self._server is None or batch.kind != "train":
            return 0
        while ready < len(deals) and deals[ready] in batch.results:
            ready += 1
        if ready - sent < SEND_AHEAD:
            return sent
        self._server.send(deals[0][0].step, sent, [batch.results[deal] for deal in deals[sent:ready]])
        batch.results |= {deal: batch.results[deal][:1] for deal in deals[sent:ready]}
        return ready

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case events.Spawn(worker, avoid):
                    self._workers.spawn(worker, avoid if self._head.answers else frozenset())
                case events.Ask(worker):
                    self._workers.ask(worker)
                case events.Probe(worker, successor):
                    self._workers.probe(worker, successor)
                case events.Assign(attempt):
                    batch = self._batches[attempt.batch]
                    batch.lags[attempt] = attempt.chunk[0].step - self._version
                    batch.attempts[attempt.chunk] = batch.attempts.get(attempt.chunk, 0) + 1
                    self._calls.make(attempt, batch.submit)
                case events.Cancel(attempt):
                    self._calls.cancel(attempt)
                case events.Retire(worker) | events.Abandon(worker):
                    self._calls.end(worker)
                case events.Compare(first, second):
                    self._compare(first, second)
                case events.Say(text):
                    self._say(text)
                case events.Waiting(joined, target, paused):
                    doing = "waiting for workers" if paused else "computing with fewer workers"
                    why = self._workers.shortage() if self._head.answers else "Ray's head does not answer"
                    self._say(f"{doing}: {joined} of {target} have joined; {why}")

    def _compare(self, first: Attempt, second: Attempt) -> None:
        equal_machines = not self._workers.mixed_devices
        if equal_machines and first.batch in self._batches and self._batches[first.batch].differ(first, second):
            self._say(f"workers {first.worker} and {second.worker} computed {second.chunk} differently: one of them is "
                      "faulty, or something in the model, loss or source is not a function of its inputs")  # fmt: skip
