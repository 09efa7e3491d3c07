"""What becomes of workers whose calls fail."""

import pytest

pytestmark = pytest.mark.ray


def test_failures_are_told_apart(ray_cluster):
    from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, OutOfMemoryError, RayTaskError

    from metadist.fleet.ray.fleet import failure_of

    kinds = {
        ActorDiedError(): "died",
        ActorUnavailableError("no answer", None): "unavailable",
        OutOfMemoryError("killed"): "out of memory",
        RayTaskError("f", "traceback", OSError("flaky")): "error",
        RayTaskError("f", "traceback", ActorDiedError()): "lost",
        ObjectLostError("0" * 56, "", ""): "lost",
    }
    for error, kind in kinds.items():
        assert failure_of(error).kind == kind, error
    memory = (
        "1 worker(s) were killed due to the node running low on memory. Memory on the node was 9GB / 10GB\nRefer to"
    )
    assert failure_of(OutOfMemoryError(memory)).reason == "OutOfMemoryError: Memory on the node was 9GB / 10GB"
