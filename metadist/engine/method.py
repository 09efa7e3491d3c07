"""What can be chosen about how an engine computes."""

from dataclasses import dataclass
from typing import Literal

from metadist.engine.differentiation import Mode

Kind = Literal["loop", "vmap"]


@dataclass(frozen=True)
class Method:
    """How an engine computes; none of it changes a result but for rounding.

    kind: a loop over tasks, or all of a chunk with vmap. differentiation, spacing: see `differentiation.py`.
    compiled, captured: see `graph_cache.py`. autocast: the network in bfloat16, weights and gradients in full (GPUs).
    """

    kind: Kind = "loop"
    differentiation: Mode = "unroll"
    spacing: int = 1
    compiled: bool = False
    captured: bool = False
    autocast: bool = False
