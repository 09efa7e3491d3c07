"""The worker actor on Ray. Light to import, as `metadist.fleet.actors` is."""

import ray

from metadist.fleet import actors


class WorkerActor(actors.WorkerActor):
    """Knows the node of the cluster that it runs on."""

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()
