"""The fleet that a job asks for, opened and closed."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from metadist.config import Config
from metadist.core.files import bare, here, is_uri
from metadist.fleet.events import Kind
from metadist.fleet.limits import Patience
from metadist.fleet.local import LocalFleet
from metadist.run.mirror import asked_target, working_folder
from metadist.run.prepare import Prepared
from metadist.run.saved import location
from metadist.run.signals import Signals

Say = Callable[[str], None]


@contextmanager
def open_fleet(
    prepared: Prepared, target: int, say: Say, signals: Signals, proof: str | None = None,
    server_proof: str | None = None, writes: bool = False,
) -> Iterator[Any]:  # fmt: skip
    """The fleet a job asks for, closed at the end (with Ray, if it was started here). The proofs: see `Fleet`.

    `writes`: it trains, so that `scale` is followed, and checkpoints are written, which one driver of a cluster may do
    in one place.
    """
    config, own = prepared.job.config, prepared.job.config.fleet
    if own.backend == "local":
        worker = prepared.job.worker(prepared.constants)  # what is wrong with it is told before the run begins
        yield LocalFleet(lambda: worker, target, own.min_workers, say=say)
        return
    from metadist.fleet.ray.capacity import Resources, announce
    from metadist.fleet.ray.cluster import GIVE_UP_S, OWN_GIVE_UP_S, claim, connect, disconnect, joins
    from metadist.fleet.ray.fleet import RayFleet

    fleet: RayFleet | None = None
    with ExitStack() as stack:
        started = joins(own.address) is None
        if connect(own.address, target * own.cpus_per_worker, say):
            stack.callback(lambda: disconnect(fleet is not None and fleet.head_lost))
        resources = Resources(own.cpus_per_worker, own.gpus_per_worker, own.threads_per_worker, own.resources)
        announce(target, resources, started, say)
        place = location(config)
        claimed = claim(bare(place), here()) if writes and is_uri(place) else None
        stack.callback(lambda: claimed)  # which ends with its last reference
        fleet = RayFleet(
            prepared.job.worker_factory(prepared.constants), target, own.min_workers, resources, say,
            GIVE_UP_S if joins(own.address) else OWN_GIVE_UP_S, working_folder(config.run_dir or "").name,
            alone=started, mixed_devices=own.mixed_devices,
            asked_to_stop=lambda: signals.received,
            asked_target=lambda: asked_target(working_folder(config.run_dir or "")) if writes else None,
            servers=own.servers, patience=patience_of(config), proof=proof, server_proof=server_proof,
        )  # fmt: skip
        stack.callback(fleet.close)
        yield fleet


def check_cluster(config: Config) -> None:
    """Raises InputError, within ten seconds, where the Ray cluster that a job would join cannot be reached."""
    own = config.fleet
    if own.backend == "ray" or (own.backend == "auto" and (own.address or os.environ.get("RAY_ADDRESS"))):
        from metadist.fleet.ray.cluster import check_cluster as check

        check(own.address)


def patience_of(config: Config) -> Patience:
    """How much may go wrong, and how long a first result may take."""
    own = config.fleet
    most: dict[Kind, int] = {"died": own.max_losses, "unavailable": own.max_losses}
    most |= {"out of memory": own.max_out_of_memory, "error": own.max_errors}
    return Patience(most, first_s=own.first_result_s)
