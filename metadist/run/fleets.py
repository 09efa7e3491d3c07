"""The cluster and the fleet that a job asks for, opened and closed."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from metadist.config import Config
from metadist.core.files import bare, here, is_uri
from metadist.fleet.events import Kind
from metadist.fleet.limits import Patience
from metadist.fleet.local import LocalFleet
from metadist.run.mirror import asked_target, working_folder
from metadist.run.prepare import Prepared
from metadist.run.saved import location
from metadist.run.signals import Signals

if TYPE_CHECKING:
    from metadist.fleet.ray.capacity import Resources

Say = Callable[[str], None]


class Cluster:
    """The Ray of a run: joined, or started on this machine, in a thread, while the job is prepared; left at the end.

    With `fleet.backend=auto` it is begun by `wait`. `say` takes a line from that thread. `head_lost`: its head has been
    given up. `run`: the name of the run.
    """

    def __init__(self, config: Config, target: int, say: Say):
        self.head_lost, self.started = False, False
        self._target, self._own, self._say = target, config.fleet, say
        self.run = working_folder(config.run_dir or "").name
        self._thread, self._environment = ThreadPoolExecutor(1, "ray"), ExitStack()
        self._workers: Future[list[Any]] | None = None
        self._connected = self._begin() if self._own.backend == "ray" else None

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        if self._workers and not self._workers.cancel():
            self._workers.exception()
        if self._connected and not self._connected.exception() and self._connected.result():
            from metadist.fleet.ray.cluster import disconnect

            disconnect(self.head_lost)
        self._thread.shutdown()  # not before: Ray's processes die with the thread that started them
        self._environment.close()

    def wait(self, say: Say) -> "Resources":
        """Until it is there: what each worker asks of it. Says what it has; raises InputError where it cannot be
        reached, or cannot hold a worker."""
        from metadist.fleet.ray.capacity import announce

        self._connected = self._connected or self._begin()
        self._connected.result()
        self._environment.close()
        announce(self._target, self._resources, self.started, say, self._deadline)
        return self._resources

    def begin_workers(self, prepared: Prepared) -> None:
        """Once a task has been computed, before the slower checks: on a Ray that this run starts, start the workers'
        processes too. They end with it."""
        if self._connected and self.started:
            make = prepared.job.worker_factory(prepared.constants)
            self._workers = self._thread.submit(self._start_workers, make)

    def workers(self) -> list[Any]:
        """The actors of the workers that have begun."""
        return self._workers.result() if self._workers else []

    def _start_workers(self, make_worker: Callable[[], Any]) -> list[Any]:
        from metadist.fleet.ray.fleet import begin_workers

        assert self._connected
        if not self._connected.result():  # Ray was there before, and stays
            return []
        return begin_workers(make_worker, self._resources, self.run, self._target)

    def _begin(self) -> Future[bool]:
        from metadist.fleet.ray.cluster import joins, own_environment

        self.started = joins(self._own.address) is None
        if self.started:
            self._environment.enter_context(own_environment())
        return self._thread.submit(self._connect)

    def _connect(self) -> bool:
        """Whether this process had no Ray before."""
        from metadist.fleet.ray.capacity import NODES_WAIT_S, Resources, warn
        from metadist.fleet.ray.cluster import connect

        own = self._own
        connected = connect(own.address, self._target * own.cpus_per_worker, self._say)
        self._resources = Resources(own.cpus_per_worker, own.gpus_per_worker, own.threads_per_worker, own.resources)
        self._deadline = time.monotonic() + NODES_WAIT_S
        if not self.started:
            warn(self._resources, self._say)
        return connected


@contextmanager
def open_fleet(
    cluster: Cluster, prepared: Prepared, target: int, say: Say, signals: Signals, proof: str | None = None,
    server_proof: str | None = None, writes: bool = False,
) -> Iterator[Any]:  # fmt: skip
    """The fleet a job asks for, closed at the end. The proofs: see `Fleet`.

    `writes`: it trains, so that `scale` is followed, and checkpoints are written, which one driver of a cluster may do
    in one place.
    """
    config, own = prepared.job.config, prepared.job.config.fleet
    if own.backend == "local":
        worker = prepared.job.worker(prepared.constants)  # what is wrong with it is told before the run begins
        yield LocalFleet(lambda: worker, target, own.min_workers, say=say)
        return
    from metadist.fleet.ray.cluster import GIVE_UP_S, OWN_GIVE_UP_S, claim
    from metadist.fleet.ray.fleet import RayFleet

    resources = cluster.wait(say)
    with ExitStack() as stack:
        place = location(config)
        claimed = claim(bare(place), here()) if writes and is_uri(place) else None
        stack.callback(lambda: claimed)  # which ends with its last reference
        fleet = RayFleet(
            prepared.job.worker_factory(prepared.constants), target, own.min_workers, resources, say,
            OWN_GIVE_UP_S if cluster.started else GIVE_UP_S, cluster.run,
            alone=cluster.started, begun=cluster.workers(), mixed_devices=own.mixed_devices,
            asked_to_stop=lambda: signals.received,
            asked_target=lambda: asked_target(working_folder(config.run_dir or "")) if writes else None,
            servers=own.servers, patience=patience_of(config), proof=proof, server_proof=server_proof,
        )  # fmt: skip
        stack.callback(fleet.close)
        try:
            yield fleet
        finally:
            cluster.head_lost = fleet.head_lost


def check_cluster(config: Config) -> None:
    """Raises InputError, within ten seconds, where the Ray cluster that a job would join cannot be reached."""
    if config.fleet.backend != "local":
        from metadist.fleet.ray.cluster import check_cluster as check

        check(config.fleet.address)


def patience_of(config: Config) -> Patience:
    """How much may go wrong, and how long a first result may take."""
    own = config.fleet
    most: dict[Kind, int] = {"died": own.max_losses, "unavailable": own.max_losses}
    most |= {"out of memory": own.max_out_of_memory, "error": own.max_errors}
    return Patience(most, first_s=own.first_result_s)
