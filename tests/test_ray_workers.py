"""What becomes of workers whose calls fail, and where replacements go."""

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError, RayTaskError

from metadist.ray_workers import kind_of


def test_failures_are_told_apart():
    kinds = {
        ActorDiedError(): "died",
        ActorUnavailableError("no answer", None): "unavailable",
        OutOfMemoryError("killed"): "out of memory",
        RayTaskError("f", "traceback", OSError("flaky")): "error",
    }
    for error, kind in kinds.items():
        assert kind_of(error) == kind, error
    assert ray.exceptions.RayActorError in ActorDiedError.__mro__
