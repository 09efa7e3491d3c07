"""How a chunk of tasks is computed and differentiated."""

from metadist.engine.differentiation import Mode
from metadist.engine.engine import Engine, MetaGradients
from metadist.engine.estimate import Memory, estimate
from metadist.engine.gradient_check import Found, check_gradient, claims_derivative, plain
from metadist.engine.method import Kind, Method
from metadist.engine.remedies import CHANGED_EXAMPLES, CHANGED_WEIGHT

__all__ = [
    "CHANGED_EXAMPLES", "CHANGED_WEIGHT", "Engine", "Found", "Kind", "Memory", "MetaGradients", "Method", "Mode",
    "check_gradient", "claims_derivative", "estimate", "plain",
]  # fmt: skip
