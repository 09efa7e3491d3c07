"""The fleet that a job asks for, opened and closed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from metadist.config import Config
from metadist.core.files import here
from metadist.fleet.events import Kind
from metadist.fleet.limits import Patience
from metadist.fleet.local import LocalFleet
from metadist.run.build import worker_factory
from metadist.run.directory import asked_target
from metadist.run.prepare import Prepared
from metadist.run.signals import Signals

Say = Callable[[str], None]


@contextmanager
def open_fleet(
    config: Config, prepared: Prepared, target: int, say: Say, signals: Signals, proof: str | None = None,
    server_proof: str | None = None, writes: bool = False,
) -> Iterator[Any]:  # fmt: skip
    """The fleet a job asks for, closed at the end (with Ray, if it was started here). The proofs: see
    `RayFleet`.

    `writes`: it trains, so that `scale` is followed, and checkpoints are written, which one driver of a cluster may do
    in one place.
    """
    own = config.fleet
    constants = {name: value.cpu().numpy() for name, value in prepared.engine.learner.model.constants.items()}
    make_worker = worker_factory(config, constants)
    if own.backend == "local":
        yield LocalFleet(make_worker, target, own.min_workers, say=say)
        return
    from metadist.fleet.ray.cluster import check_gpus, claim, connect, disconnect, joins
    from metadist.fleet.ray.fleet import RayFleet, Resources
    from metadist.fleet.ray.head import GIVE_UP_S, OWN_GIVE_UP_S

    fleet: RayFleet | None = None
    with ExitStack() as stack:
        started = connect(own.address, target * own.cpus_per_worker, say)
        if started:
            stack.callback(lambda: disconnect(fleet is not None and fleet.head_lost))
        check_gpus(own.gpus_per_worker, started, say)
        place = config.checkpoint.location or ""
        claimed = claim(place, here()) if writes and "://" in place else None
        stack.callback(lambda: claimed)  # which ends with its last reference
        resources = Resources(own.cpus_per_worker, own.gpus_per_worker, own.threads_per_worker, own.resources)
        fleet = RayFleet(
            make_worker, target, own.min_workers, resources, own.mixed_devices, lambda: signals.received,
            lambda: asked_target(Path(config.run_dir or "")) if writes else None, say, own.servers, patience_of(config),
            proof, server_proof, GIVE_UP_S if joins(own.address) else OWN_GIVE_UP_S,
        )  # fmt: skip
        stack.callback(fleet.close)
        yield fleet


def patience_of(config: Config) -> Patience:
    """How much may go wrong, and how long a first result may take."""
    own = config.fleet
    most: dict[Kind, int] = {"died": own.max_losses, "unavailable": own.max_losses}
    most |= {"out of memory": own.max_out_of_memory, "error": own.max_errors}
    return Patience(most, first_s=own.first_result_s)
