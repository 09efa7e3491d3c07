"""How a chunk of tasks is computed and differentiated."""

from metadist.engine.differentiation import Mode
from metadist.engine.engine import Engine, MetaGradients
from metadist.engine.estimate import Memory, estimate
from metadist.engine.method import Kind, Method

__all__ = ["Engine", "Kind", "Memory", "MetaGradients", "Method", "Mode", "estimate"]
