"""How near to memory bandwidth the server adds gradients up: `python tests/benchmarks/fold.py`.

128 gradients of a million float32 parameters, in chunks of 4 rows as workers send them, on one core. Bytes are those of
the gradients, read once; of the copy, those copied, counted once. The server also keeps what its diagnostics need.
"""

from collections.abc import Callable
from time import perf_counter

import numpy as np

from metadist.core.messages import PHASES, ChunkReport, fold, plan
from metadist.fleet.server import Optimization, Server
from metadist.fleet.worker import set_up_process

TASKS, PARAMETERS, ROWS = 128, 1_000_000, 4


def fastest(run: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of some runs."""
    times = []
    for _ in range(repeats):
        began = perf_counter()
        run()
        times.append(perf_counter() - began)
    return min(times)


def main() -> None:
    set_up_process(1)
    source = np.ones(TASKS * PARAMETERS // 2, np.float32)
    target = np.empty_like(source)
    copy = source.nbytes / fastest(lambda: np.copyto(target, source))
    chunks = plan("train", 0, TASKS, ROWS)
    rows = np.random.default_rng(0).normal(size=(TASKS, PARAMETERS)).astype(np.float32)
    norms = np.linalg.norm(rows, axis=1).astype(np.float64)
    reports = [ChunkReport(c, np.zeros(ROWS), norms[c.start : c.stop], dict.fromkeys(PHASES, 0.0)) for c in chunks]
    server = Server(np.zeros(PARAMETERS, np.float32), Optimization())

    def take() -> None:
        server.begin(0)
        for report in reports:
            server.take(0, report, rows[report.chunk.start : report.chunk.stop])

    print(f"copy {copy / 1e9:.2f} GB/s")
    for name, run in {"the sum alone": lambda: fold([rows], PARAMETERS), "the server, with diagnostics": take}.items():
        rate = rows.nbytes / fastest(run)
        print(f"{name}: {rate / 1e9:.2f} GB/s, {rate / copy:.0%} of the copy's")


if __name__ == "__main__":
    main()
