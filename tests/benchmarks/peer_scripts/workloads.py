"""What is computed: the table of workloads, and the fixed tasks and initial weights each is run on.

Cross-entropy (classification) and squared error (regression) are means over examples. All figures of a workload are
per meta-step: the meta-gradient of the whole meta-batch, and one Adam step on its mean.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import build

META_LR = 1e-3


@dataclass(frozen=True)
class Workload:
    """One row of the table. `queries` are per class; regression has one class."""

    name: str
    network: str
    input_shape: tuple[int, ...]
    ways: int
    shots: int
    queries: int
    inner_steps: int
    inner_lr: float
    meta_batch: int
    first_order: bool = False
    metadist: tuple[str, ...] = ()  # settings of metadist that this shape of work needs

    @property
    def regression(self) -> bool:
        return self.ways == 1

    def describe(self) -> str:
        shape, order = "x".join(map(str, self.input_shape)), "first" if self.first_order else "second"
        kind = f"{self.ways}-way {self.shots}-shot" if self.ways > 1 else f"{self.shots} points"
        queries = f"{self.queries} {'query' if self.queries == 1 else 'queries'}{' per class' * (self.ways > 1)}"
        steps = f"{self.inner_steps} inner step{'s' * (self.inner_steps > 1)} of {self.inner_lr}"
        return f"{self.network} on {shape}, {kind}, {queries}, {steps}, {order} order, meta-batch {self.meta_batch}"

    def asdict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Workload":
        return cls(**{**fields, "input_shape": tuple(fields["input_shape"]), "metadist": tuple(fields["metadist"])})


HEADLINE = Workload("conv4", "conv4-64-strided", (1, 28, 28), 5, 1, 15, 1, 0.4, 32)
WORKLOADS = (
    HEADLINE,
    replace(HEADLINE, name="conv4-first-order", first_order=True),
    replace(HEADLINE, name="conv4-5-steps", inner_steps=5, inner_lr=0.1),
    replace(HEADLINE, name="conv4-20-way", ways=20, queries=5, inner_lr=0.1),
    replace(HEADLINE, name="conv4-pooled", network="conv4-32-pooled", inner_lr=0.01),
    # Chunks of metadist's default size would leave one of its two workers idle in these two.
    Workload("resnet12", "resnet12", (3, 84, 84), 5, 1, 5, 1, 0.01, 2, metadist=("engine.chunk_size=1",)),
    Workload("sinusoid", "mlp-40-40", (1,), 1, 10, 10, 1, 0.01, 25, metadist=("engine.chunk_size=13",)),
)
MEMORY_STEPS = (1, 5, 10, 20, 50)
MEMORY = tuple(
    replace(
        HEADLINE,
        name=f"memory-{steps}",
        queries=5,
        inner_steps=steps,
        inner_lr=0.01,
        meta_batch=1,
        metadist=("engine.chunk_size=1",),
    )
    for steps in MEMORY_STEPS
)
# As in learn2learn's example maml_omniglot: twice the shots are sampled, one half of them is the query set.
OMNIGLOT = replace(HEADLINE, name="omniglot", queries=1)


def write_inputs(workload: Workload, path: Path, seed: int = 0) -> Path:
    """The tasks of one meta-batch and the initial weights, as arrays support_x [T, n, ...], ..., theta/NAME."""
    rng = np.random.default_rng(seed)
    arrays = _sinusoids(workload, rng) if workload.regression else _images(workload, rng)
    network = build(workload.network, workload.input_shape, workload.ways)
    for name, value in network.state_dict().items():
        arrays[f"theta/{name}"] = _initial(name, tuple(value.shape), rng)
    np.savez(path, **arrays)
    return path


def _images(workload: Workload, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Each class of each task is a random image; its examples are that image with noise. Values of about 0 to 1."""
    tasks, ways, shape = workload.meta_batch, workload.ways, workload.input_shape
    classes = rng.uniform(size=(tasks, ways, 1, *shape))
    arrays: dict[str, np.ndarray] = {}
    for part, each in (("support", workload.shots), ("query", workload.queries)):
        x = classes + 0.3 * rng.normal(size=(tasks, ways, each, *shape))
        arrays[f"{part}_x"] = x.reshape(tasks, ways * each, *shape).astype(np.float32)
        arrays[f"{part}_y"] = np.tile(np.arange(ways).repeat(each), (tasks, 1))
    return arrays


def _sinusoids(workload: Workload, rng: np.random.Generator) -> dict[str, np.ndarray]:
    amplitude, phase = (
        rng.uniform(0.1, 5, (workload.meta_batch, 1, 1)),
        rng.uniform(0, np.pi, (workload.meta_batch, 1, 1)),
    )
    arrays: dict[str, np.ndarray] = {}
    for part, each in (("support", workload.shots), ("query", workload.queries)):
        x = rng.uniform(-5, 5, (workload.meta_batch, each, 1))
        arrays[f"{part}_x"] = x.astype(np.float32)
        arrays[f"{part}_y"] = (amplitude * np.sin(x + phase)).astype(np.float32)
    return arrays


def _initial(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """He's normal initialisation of convolutions, torch's own variance for linear layers;
    normalisation starts as the identity, biases at zero."""
    if len(shape) > 1:
        gain = 2 if len(shape) == 4 else 1 / 3
        return (rng.normal(size=shape) * math.sqrt(gain / math.prod(shape[1:]))).astype(np.float32)
    return np.full(shape, 1.0 if name.endswith("weight") else 0.0, np.float32)


def read_tasks(path: str) -> list[tuple[torch.Tensor, ...]]:
    """(support_x, support_y, query_x, query_y) of each task."""
    with np.load(path) as arrays:
        parts = [torch.from_numpy(arrays[name]) for name in ("support_x", "support_y", "query_x", "query_y")]
    return list(zip(*parts, strict=True))


def read_weights(path: str) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return {name.removeprefix("theta/"): arrays[name] for name in arrays.files if name.startswith("theta/")}
