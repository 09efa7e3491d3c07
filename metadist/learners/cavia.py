"""CAVIA: only context parameters adapt, from zero, in every task."""

from dataclasses import dataclass

from metadist.core.errors import InputError
from metadist.core.task import Examples
from metadist.learners.learner import Context, Fast, Tensors
from metadist.learners.maml import MAML


@dataclass(frozen=True, kw_only=True)
class CAVIA(MAML):
    """c_0 = 0;  c_{k+1} = c_k - inner_lr * grad L_support(c_k, theta);  meta-gradient d L_query(c_K, theta) / d theta.

    Zintgraf et al. 2019, Algorithm 1 (https://arxiv.org/abs/1810.03642). The context is whatever parameters of the
    model `adapted` matches: they are part of no checkpoint, all others are shared by the tasks and not adapted. The
    built-in `mlp` (c joins the inputs, as in its section 4.1) and `conv4` (c scales and shifts the third block's maps,
    section 4.2) have them with `model.context`.
    """

    adapted: str = "context"

    def __post_init__(self) -> None:
        if not self.adapted_names():
            raise InputError(
                "CAVIA adapts only context parameters: set model.context (mlp, conv4) to how many, such as 5 or 100; "
                f"learner.adapted={self.adapted!r} matches none of {', '.join(self.model.parameters)}"
            )
        super().__post_init__()
        if set(self.adapted_names()) == set(self.model.parameters):
            raise InputError("learner.adapted must leave parameters that are not the context: those are meta-learned")

    def layout(self) -> Tensors:
        context = set(self.adapted_names())
        return {name: value for name, value in self.model.parameters.items() if name not in context}

    def begin(self, theta: Tensors, support: Examples, context: Context) -> Fast:
        like = next(iter(theta.values()))
        sizes = {name: self.model.parameters[name].shape for name in self.adapted_names()}
        return self.start({name: like.new_zeros(size) for name, size in sizes.items()})
