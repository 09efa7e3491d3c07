"""How a run computes where its job says `auto`: a fixed table, never a clock (`metadist bench` is the clock).

| setting | on | auto means |
|---|---|---|
| engine.kind | convolutions of images above 16x16 on a CPU | loop (batched over tasks they are half as fast) |
| | recurrent layers | loop (vmap cannot batch them) |
| | everything else | vmap (one call for many small operations) |
| engine.differentiation | first order, or up to 10 inner steps | unroll (fastest) |
| | second order, more than 10 inner steps | remat (memory does not grow with the steps, a third more time) |
| engine.chunk_size | loop / vmap of convolutions on a CPU / vmap of everything else | 4 / 8 / 32 tasks; with a loop |
| | | no more than a quarter of the meta-batch, or few workers would have all of it |
| engine.aggregate | up to / more than 64 MiB of gradients a chunk | task / chunk |
| engine.device | workers with / without a GPU | cuda / cpu |
| fleet.backend | up to 10,000 parameters times inner steps + 1, on a CPU, no convolutions, recurrence, | |
| | own `measures` or source | local (a step takes less than the 6 ms that Ray adds), by one worker |
| | everything else; or `num_workers`, a cluster's address, what only several processes can do | ray |

A learner that admits one kind of engine only gets that one.
"""

import math
import os
from collections.abc import Sequence
from typing import Literal

from metadist.config.schema import Config
from metadist.core.errors import is_submitted
from metadist.engine import Engine, Kind, Method
from metadist.learners import Learner

LARGE_CHUNK_BYTES = 64 << 20
LONG_LOOP = 10
SMALL_IMAGE = 16 * 16
SMALL_STEP = 10_000  # parameters times inner steps + 1


def worker_device(config: Config) -> str:
    """What kind of device workers compute on, as the job alone decides it."""
    if config.engine.device != "auto":
        return config.engine.device
    return "cuda" if config.fleet.gpus_per_worker else "cpu"


def make_method(config: Config, learner: Learner, inputs: Sequence[Sequence[int]], device: str | None = None) -> Method:
    """The table's rows for an engine; `inputs` are the shapes of an example's input fields. On another `device` than
    the workers' an engine only has to compute, not fast."""
    own, elsewhere = config.engine, device not in (None, worker_device(config))
    long = learner.inner_steps > LONG_LOOP and not learner.first_order
    return Method(
        kind=own.kind if own.kind != "auto" else _kind(config, learner, inputs),
        differentiation=own.differentiation if own.differentiation != "auto" else "remat" if long else "unroll",
        spacing=max(1, math.isqrt(learner.inner_steps)) if own.keep == "sqrt" else 1,
        compiled=own.compile and not elsewhere,
        captured=own.cuda_graphs and not elsewhere,
        autocast=own.autocast and not elsewhere,
    )


def _kind(config: Config, learner: Learner, inputs: Sequence[Sequence[int]]) -> Kind:
    if len(learner.engines) == 1:
        return "loop" if "loop" in learner.engines else "vmap"
    if learner.model.recurrent is not None:
        return "loop"
    large = any(math.prod(shape[-2:]) > SMALL_IMAGE for shape in inputs)
    return "loop" if large and _convolves(learner) and worker_device(config) == "cpu" else "vmap"


def _convolves(learner: Learner) -> bool:
    return any(value.ndim >= 4 for value in learner.model.parameters.values())


def chunk_size(config: Config, engine: Engine) -> int:
    """Tasks per unit of work: never a function of the number of workers."""
    if config.engine.chunk_size:
        return config.engine.chunk_size
    if engine.kind == "loop":
        return min(4, max(1, config.batch_size(1) // 4))
    return 8 if _convolves(engine.learner) and worker_device(config) == "cpu" else 32


def aggregation(config: Config, engine: Engine) -> Literal["task", "chunk"]:
    """Whether a worker sends its tasks' gradients or their sum."""
    if config.engine.aggregate != "auto":
        return config.engine.aggregate
    size = chunk_size(config, engine) * engine.layout.size * 4
    return "task" if size <= LARGE_CHUNK_BYTES else "chunk"


def backend(config: Config, engine: Engine) -> Literal["ray", "local"]:
    """Where the workers of a run are. A submitted job, and one with a cluster's address, is Ray's."""
    own, learner = config.fleet, engine.learner
    if own.backend != "auto":
        return own.backend
    cluster = own.address or os.environ.get("RAY_ADDRESS") or is_submitted()
    several = own.min_workers > 1 or own.servers > 1 or config.tasks_per_worker or config.optimizer.max_staleness
    if cluster or several or "num_workers" in config.model_fields_set:
        return "ray"
    small = engine.layout.size * (learner.inner_steps + 1) <= SMALL_STEP and worker_device(config) == "cpu"
    own_time = _convolves(learner) or learner.model.recurrent is not None or learner.measures or config.data.source
    return "local" if small and not own_time else "ray"


def with_backend(config: Config, engine: Engine) -> Config:
    """The job with what `fleet.backend: auto` stands for."""
    if config.fleet.backend != "auto":
        return config
    chosen = backend(config, engine)
    changes = {"fleet": config.fleet.model_copy(update={"backend": chosen})}
    return config.model_copy(update=changes | ({"num_workers": 1} if chosen == "local" else {}))
