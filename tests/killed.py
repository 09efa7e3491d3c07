"""A job's theta by two workers on Ray, of which one is killed."""

import os
import signal

from metadist.checkpoint.format import theta_sha256
from metadist.config import Config
from metadist.core.messages import plan
from metadist.run.build import Job
from metadist.run.prepare import prepare


def theta_with_a_worker_killed(config: Config, at_step: int) -> tuple[str, int]:
    """The hash of theta after all meta-steps, a worker killed before `at_step`; and how many were said to be lost."""
    from metadist.fleet.ray.fleet import RayFleet

    said: list[str] = []
    prepared = prepare(Job(config), [])
    fleet = RayFleet(lambda: Job(config).worker(), 2, say=said.append)
    server = fleet.start_server(prepared.theta, Job(config).optimization(prepared.engine), None)
    weights = server.weights()
    for step in range(config.meta_steps):
        if step == at_step:
            os.kill(next(iter(fleet.pids.values())), signal.SIGKILL)
        chunks = plan("train", step, config.batch_size(2), prepared.chunk_size)
        weights, _ = server.apply(step, *fleet.meta_gradients(weights, chunks))
    theta = fleet.fetch(weights).theta
    fleet.close()
    return theta_sha256(theta), sum("was lost" in text for text in said)
