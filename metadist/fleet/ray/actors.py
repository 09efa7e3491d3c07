"""The worker actor on Ray. Light to import, as `metadist.fleet.actors` is."""

import inspect
import os
import socket
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any

import ray

from metadist.fleet import actors


def prints_errors(kind: type) -> type:
    """A class whose methods print what they raise, before their caller hears of it: into the actor's own log file."""
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        if not name.startswith("_"):
            setattr(kind, name, _printing(method))
    return kind


def _printing(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return method(*arguments, **options)
        except Exception:
            traceback.print_exc()
            raise

    return call


def print_start(what: str) -> None:
    """A first line in the actor's own log file, by which it is found in the dashboard."""
    name = ray.get_runtime_context().get_actor_name() or "without a name"
    print(f"metadist {what} {name}: process {os.getpid()} on {socket.gethostname()}", flush=True)


@prints_errors
class WorkerActor(actors.WorkerActor):
    """Knows the node of the cluster that it runs on."""

    def ready(self) -> actors.Ready:
        print_start("worker")
        ready = super().ready()
        print(f"ready: {ready.proof}", flush=True)
        return ready

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()
