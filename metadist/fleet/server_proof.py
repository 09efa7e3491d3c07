"""What shows that two machines apply meta-updates alike: a hash of some on fixed numbers."""

import hashlib
from functools import cache

import numpy as np

from metadist.core.messages import Chunk, ChunkReport
from metadist.fleet.server import Optimization, Server

SIZE = 10_007  # so few that one thread computes it, and a remainder whatever the width of a machine's vectors
REFERENCE = (
    Optimization("adam", clip_value=0.3, statistics=13),
    Optimization("adamw", weight_decay=0.01, clip_norm=1.0),
    Optimization("sgd", momentum=0.9, schedule="cosine"),
)


@cache
def server_proof() -> str:
    """A hash of theta after three meta-updates of every optimizer: servers with the same one are taken to compute the
    same bits. It does not depend on the job."""
    hashed = hashlib.sha256()
    for optimization in REFERENCE:
        server = Server(_numbers(0), optimization)
        for step in range(3):
            rows = np.stack([_numbers(2 * step + 1), _numbers(2 * step + 2)])
            norms = np.array([float(np.sqrt(np.square(row, dtype=np.float64).sum())) for row in rows])
            report = ChunkReport(Chunk("train", step, 0, 2), np.zeros(2), norms, {})
            weights, stats = server.apply(step, (report, rows))
            hashed.update(weights.theta.tobytes() + np.array(stats).tobytes())
    return hashed.hexdigest()[:16]


def _numbers(stream: int) -> np.ndarray:
    """float32 [SIZE] in -0.5 ... 0.5, by whole-number arithmetic that is the same everywhere."""
    index = np.arange(SIZE, dtype=np.uint64) + np.uint64(stream * SIZE + 1)
    mixed = (index * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return (mixed.astype(np.float64) / 2**24 - 0.5).astype(np.float32)
