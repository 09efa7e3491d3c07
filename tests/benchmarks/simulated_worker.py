"""A worker that sleeps instead of computing: what is left of a step's time is the system's own."""

import threading
import time

import numpy as np

from metadist.core.messages import PHASES, Chunk, ChunkReport, Weights

SIZE = 2  # elements of theta that say what to simulate


def instructions(parameters: int, chunk_s: float, rows: bool) -> np.ndarray:
    """A theta [P] that tells simulated workers what to do, so that one fleet serves every measurement."""
    theta = np.zeros(max(parameters, SIZE), np.float32)
    theta[:SIZE] = chunk_s, rows
    return theta


class SimulatedWorker:
    """Takes as long for any chunk as theta says, one at a time, and returns gradients of theta's size: per task,
    float32 [n, P], or their sum, float64 [P]. It has no torch, and makes one gradient of each shape."""

    def __init__(self) -> None:
        self._computing = threading.Lock()
        self._gradients: dict[tuple[int, ...], np.ndarray] = {}

    def meta_gradients(self, weights: Weights, chunk: Chunk) -> tuple[ChunkReport, np.ndarray]:
        """As `Worker.meta_gradients`, after the time a chunk takes."""
        chunk_s, rows = float(weights.theta[0]), bool(weights.theta[1])
        count, size = chunk.stop - chunk.start, len(weights.theta)
        with self._computing:
            time.sleep(chunk_s)
        seconds = dict.fromkeys(PHASES, 0.0) | {"adapt": chunk_s}
        norms = np.full(count, 1e-3 * size**0.5)
        shape, dtype = ((count, size), np.float32) if rows else ((size,), np.float64)
        if shape not in self._gradients:
            self._gradients[shape] = np.full(shape, 1e-3, dtype)
        return ChunkReport(chunk, np.zeros(count), norms, seconds), self._gradients[shape]

    def proof(self) -> str:
        """All simulated workers are equal."""
        return "simulated"
