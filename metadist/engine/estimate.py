"""How much memory computing a chunk takes, found without computing it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

from metadist.core.task import Task
from metadist.engine.engine import Engine
from metadist.engine.method import Method

KEPT = {"loop": 1, "vmap": 2}
"""torch.func keeps what it computes on the way back as well, to be able to differentiate it once more."""


class Memory(NamedTuple):
    """Bytes, beside what the program itself takes.

    activations: held at the fullest moment, weights, tasks and trajectory included. trajectory: the fast weights that
    are part of these where differentiation is `remat`, K x P x 4. gradients: the chunk's result.
    """

    activations: int
    trajectory: int
    gradients: int


def estimate(engine: Engine, tasks: Sequence[Task]) -> Memory:
    """Of a chunk of these tasks, to within a third.

    Recorded with one and with two inner steps; with `unroll`, each further step is taken to add as much as the second.
    """
    steps, method = engine.learner.inner_steps, engine.method
    few = [KEPT[method.kind] * _fullest(_with_steps(engine, k), tasks) for k in range(min(steps, 1), min(steps, 2) + 1)]
    together = len(tasks) if method.kind == "vmap" else 1
    trajectory = 0
    if method.differentiation == "unroll":
        activations = few[0] + (few[-1] - few[0]) * max(0, steps - 1)
    else:
        adapted = sum(engine.learner.model.parameters[name].numel() for name in engine.learner.adapted_names())
        kept = math.ceil(steps / method.spacing) + min(method.spacing, steps) - 1
        trajectory = kept * adapted * together * engine.dtype.itemsize
        activations = few[0] + trajectory
    return Memory(activations, trajectory, len(tasks) * engine.layout.size * engine.dtype.itemsize)


def _with_steps(engine: Engine, inner_steps: int) -> Engine:
    method = Method(engine.method.kind, engine.method.differentiation, autocast=engine.method.autocast)
    return Engine(replace(engine.learner, inner_steps=inner_steps), method, str(engine.device), engine.dtype)


def _fullest(engine: Engine, tasks: Sequence[Task]) -> int:
    """Bytes held at the fullest moment: every storage from the operation that makes it to the last that reads it."""
    nodes = engine.operations(tasks)
    place = {node: number for number, node in enumerate(nodes)}
    sizes: dict[int, int] = {}
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for node in nodes:
        for tensor in tree_leaves(node.meta.get("val")):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
            first.setdefault(storage._cdata, place[node])
            ends = [last.get(storage._cdata, 0), place[node], *(place[user] for user in node.users)]
            last[storage._cdata] = max(ends)
    changes = [0] * (len(nodes) + 1)
    for key, size in sizes.items():
        changes[first[key]] += size
        changes[last[key] + 1] -= size
    held = fullest = 0
    for change in changes:
        held += change
        fullest = max(fullest, held)
    return fullest
