"""What a meta-step costs beside computing, from a few measured steps: where more workers stop helping."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls


class Load(NamedTuple):
    """One meta-step as the cost model sees it: `chunks` of `chunk_s` seconds and `chunk_bytes` each."""

    workers: int
    chunks: int
    chunk_s: float
    chunk_bytes: float
    servers: int = 1

    @property
    def objects(self) -> int:
        """What workers return in a step: of each chunk a report, and a slice of its gradient for each server."""
        return self.chunks * (1 + self.servers)

    @property
    def ideal_s(self) -> float:
        """The step's time if nothing but computing took any: as many chunks in a row as the busiest worker has."""
        return -(-self.chunks // self.workers) * self.chunk_s


class CostModel(NamedTuple):
    """Seconds of a step = step_s + workers * worker_s +
    max(ideal, chunks * ((1 + servers) * object_s + bytes * byte_s / servers)).

    step_s: latency of a step, whatever its size. worker_s: dealing a worker its first chunk and collecting its last,
    which nothing overlaps. object_s and byte_s: what each object of a chunk (its report, its gradient's slice for each
    server) and each byte keep driver and servers busy, which overlaps with computing until it takes longer than that.
    """

    step_s: float
    worker_s: float
    object_s: float
    byte_s: float

    def terms(self, load: Load) -> dict[str, float]:
        """Seconds of a step by cause. Computing, or driver and servers: only the longer of the two counts."""
        busy = {
            "driver": load.objects * self.object_s,
            "server": load.chunks * load.chunk_bytes * self.byte_s / load.servers,
        }
        return {"compute": load.ideal_s, **busy, "ends": self.step_s + load.workers * self.worker_s}

    def predict(self, load: Load) -> float:
        """Seconds of a step."""
        terms = self.terms(load)
        return terms["ends"] + max(terms["compute"], terms["driver"] + terms["server"])

    def binds(self, load: Load) -> str:
        """What takes most of the step: compute, driver (objects), server (bytes) or ends."""
        terms = self.terms(load)
        if terms["driver"] + terms["server"] < terms["compute"]:
            terms |= {"driver": 0.0, "server": 0.0}
        return max(terms, key=lambda name: terms[name])


def fit(loads: Sequence[Load], seconds: Sequence[float]) -> CostModel:
    """Least squares of relative errors with coefficients >= 0.

    Which side of the maximum a measurement is on depends on the coefficients, so they are fitted in turn, at most 50
    times; at first a step without computing is taken to be on the driver's side, and no other.
    """
    measured = np.asarray(seconds, float)
    ideal = np.array([load.ideal_s for load in loads])
    ends = np.array([[1.0, load.workers] for load in loads])
    work = np.array([[load.objects, load.chunks * load.chunk_bytes / load.servers] for load in loads])
    scale = np.abs(np.column_stack([ends, work])).max(axis=0)
    busy = ideal == 0
    for _ in range(50):
        matrix = np.column_stack([ends, work * busy[:, None]]) / scale
        rest = measured - np.where(busy, 0, ideal)
        coefficients = nnls(matrix / measured[:, None], rest / measured)[0] / scale
        now = work @ coefficients[2:] > ideal
        if (now == busy).all():
            break
        busy = now
    return CostModel(*coefficients.tolist())
