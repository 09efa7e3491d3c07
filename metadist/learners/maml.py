"""Model-agnostic meta-learning and its relatives by order and by name pattern."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor

from metadist.core.errors import InputError
from metadist.core.task import Examples
from metadist.learners.inner_optimizers import SGD, InnerOptimizer
from metadist.learners.learner import Context, Fast, Learner, Tensors

SLOT = "inner optimizer/"


@dataclass(frozen=True, kw_only=True)
class MAML(Learner):
    """phi_0 = theta;  phi_{k+1} = phi_k - inner_lr * grad L_support(phi_k);  meta-gradient d L_query(phi_K) / d theta.

    Finn, Abbeel, Levine 2017, Algorithm 2 (https://arxiv.org/abs/1703.03400). `first_order=True` is FOMAML, section
    5.2: the inner gradients are constants, so it is the query gradient at phi_K. `adapted` is a shell-style
    pattern (or several, separated by commas) over parameter names: "head.*" is ANIL (Raghu et al. 2020,
    https://arxiv.org/abs/1909.09157), "body.*" is BOIL (Oh et al. 2021); the rest is meta-learned but not adapted.
    `inner_optimizer`: what takes the place of plain gradient descent; see `metadist.learners.inner_optimizers`.

    Losses are means over examples. The published code sums cross-entropy over the N*K support examples and divides by
    K, so its inner rate of 0.4 for 5 ways is 2.0 here.

    Args:
        model, loss, inner_lr, inner_steps, first_order: see `Learner`.
        adapted: pattern of the parameters that the inner loop changes.
        inner_optimizer: `SGD()`, `Adam()`, or anything with their methods.

    Raises:
        InputError: where a pattern of `adapted` matches no parameter; the message lists them.

    Example:
        >>> from metadist import MAML, Model
        >>> from metadist.models import MLP
        >>> from metadist.models.losses import cross_entropy
        >>> anil = MAML(model=Model(MLP([[4]], 3)), loss=cross_entropy, inner_lr=0.5, inner_steps=5, adapted="head.*")
        >>> anil.adapted_names()
        ['head.weight', 'head.bias']
    """

    adapted: str = "*"
    inner_optimizer: InnerOptimizer = field(default_factory=SGD)

    def __post_init__(self) -> None:
        super().__post_init__()
        for pattern in self._patterns():
            if not any(fnmatchcase(name, pattern) for name in self.model.parameters):
                names = ", ".join(self.model.parameters)
                raise InputError(f"learner.adapted: {pattern!r} matches no parameter of the model; it has: {names}")
        if "adapted" in self.refused and set(self.adapted_names()) != set(self.model.parameters):
            raise ValueError(f"learner.adapted: leave it out for {type(self).__name__}: {self.refused['adapted']}")

    def adapted_names(self) -> list[str]:
        """Names of the parameters that the inner loop changes, in the model's order."""
        return [n for n in self.model.parameters if any(fnmatchcase(n, pattern) for pattern in self._patterns())]

    def _patterns(self) -> list[str]:
        return [pattern.strip() for pattern in self.adapted.split(",")]

    def begin(self, theta: Tensors, support: Examples, context: Context) -> Fast:
        del support, context
        return self.start({name: theta[name] for name in self.adapted_names()})

    def start(self, weights: Tensors, **state: Tensor) -> Fast:
        """Fast weights before the first step, with what the inner optimizer remembers and `state` beside them."""
        slots = {name: self.inner_optimizer.begin(weight) for name, weight in weights.items()}
        named = {f"{SLOT}{slot}/{name}": x for name, own in slots.items() for slot, x in own.items()}
        return Fast(weights, state | named)

    def rate(self, theta: Tensors, fast: Fast, name: str, k: int) -> Tensor | float:
        """The inner rate of a tensor at step k: one number, or one for each of its elements."""
        del theta, fast, name, k
        return self.inner_lr

    def update(self, theta: Tensors, fast: Fast, gradient: Tensors, k: int) -> Fast:
        weights, state = {}, dict(fast.state)
        slots = [key for key in fast.state if key.startswith(SLOT)]
        for name, weight in fast.weights.items():
            keys = {key.removeprefix(SLOT).removesuffix(f"/{name}"): key for key in slots if key.endswith(f"/{name}")}
            own, rate = {slot: fast.state[key] for slot, key in keys.items()}, self.rate(theta, fast, name, k)
            weights[name], own = self.inner_optimizer.step(weight, gradient[name], own, rate, k)
            state |= {keys[slot]: value for slot, value in own.items()}
        return Fast(weights, state)
