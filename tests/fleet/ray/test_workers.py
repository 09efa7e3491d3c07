"""What becomes of workers whose calls fail, and where replacements go."""

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError, RayTaskError

from metadist.fleet.ray.workers import RayWorkers, Resources, kind_of

pytestmark = pytest.mark.ray


def test_failures_are_told_apart(ray_cluster):
    kinds = {
        ActorDiedError(): "died",
        ActorUnavailableError("no answer", None): "unavailable",
        OutOfMemoryError("killed"): "out of memory",
        RayTaskError("f", "traceback", OSError("flaky")): "error",
    }
    for error, kind in kinds.items():
        assert kind_of(error) == kind, error
    memory = (
        "1 worker(s) were killed due to the node running low on memory. Memory on the node was 9GB / 10GB\nRefer to"
    )
    lost = RayWorkers(None, Resources(), False).lost(3, OutOfMemoryError(memory))  # pyright: ignore
    assert lost.reason == "OutOfMemoryError: Memory on the node was 9GB / 10GB"
    assert ray.exceptions.RayActorError in ActorDiedError.__mro__
