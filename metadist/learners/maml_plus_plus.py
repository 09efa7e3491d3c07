"""MAML++: what makes MAML train stably, each part of it by itself."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metadist.learners.learner import Context, Differentiation, Fast, Tensors
from metadist.learners.maml import MAML
from metadist.task import Examples, Task

LEAST = 0.03  # of a step's equal share in the multi-step loss, as in the published code


@dataclass(frozen=True, kw_only=True)
class MAMLPlusPlus(MAML):
    """MAML with the parts of Antoniou et al. 2019, section 4 (https://arxiv.org/abs/1810.09502), each with its switch.

    - `multi_step_until`: for so many meta-steps the outer loss is sum_k w_k L_query(phi_k), k = 1, ..., K. All w_k are
      1 / K at first; those before the last fall linearly to 0.03 / K, the last one has the rest. 0: never.
    - `first_order_until`: so many meta-steps are first-order, those after them second-order. 0: none.
    - `rate_per_step`: a learned rate for each adapted tensor and inner step (the paper's: for each layer and step).
    - `per_step_norm`: scale and shift of normalisation layers for each inner step, learned but not adapted.
    - The cosine meta-rate is the outer optimizer's: optimizer.schedule=cosine.

    More inner steps than trained with use what belongs to the last of those. Normalisation is by the batch at hand, as
    in the published code, which collects running statistics, per step or not, and never uses them.
    """

    multi_step_until: int = 0
    first_order_until: int = 0
    rate_per_step: bool = True
    per_step_norm: bool = True
    trained_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trained_steps is None:  # evaluation may take other steps; theta has those of training
            object.__setattr__(self, "trained_steps", max(1, self.inner_steps))
        if min(self.multi_step_until, self.first_order_until, self._sets - 1) < 0:
            raise ValueError("multi_step_until and first_order_until must be 0 or more, trained_steps 1 or more")

    @property
    def learned_rates(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rate_per_step

    @property
    def _sets(self) -> int:
        return self.trained_steps or 1

    def _norms(self) -> list[str]:
        """The parameters that theta holds once for each step."""
        return self.model.norm_parameters if self.per_step_norm else []

    def layout(self) -> Tensors:
        theta, norms, like = {}, set(self._norms()), next(iter(self.model.parameters.values()))
        for name, value in self.model.parameters.items():
            if name in norms:
                theta[f"per_step/{name}"] = value.expand(self._sets, *value.shape).clone()
            else:
                theta[name] = value
        if self.rate_per_step:
            rate = like.new_full((self._sets,), self.inner_lr)
            theta |= {f"inner_lr/{name}": rate for name in self.adapted_names()}
        return theta

    def with_model(self, weights: Tensors) -> Tensors:
        own = {f"per_step/{name}": weights[name].expand(self._sets, *weights[name].shape) for name in self._norms()}
        return super().with_model(weights) | own

    def adapted_names(self) -> list[str]:
        norms = set(self._norms())
        return [name for name in super().adapted_names() if name not in norms]

    def is_first_order(self, context: Context) -> bool:
        return self.first_order or (self.first_order_until > 0 and context.step < self.first_order_until)

    def begin(self, theta: Tensors, support: Examples, context: Context) -> Fast:
        fast = self._with_norms(theta, super().begin(theta, support, context), 0)
        if not self.multi_step_until or not self.inner_steps:
            return fast
        weights = step_weights(self.inner_steps, context.step / self.multi_step_until)
        like = next(iter(fast.weights.values()))
        return fast._replace(
            state=fast.state | {"step_weights": torch.tensor(weights, dtype=like.dtype, device=like.device)}
        )

    def inner_loss(self, theta: Tensors, fast: Fast, support: Examples, k: int) -> Tensor:
        return super().inner_loss(theta, self._with_norms(theta, fast, k), support, k)

    def update(self, theta: Tensors, fast: Fast, gradient: Tensors, k: int) -> Fast:
        return self._with_norms(theta, super().update(theta, fast, gradient, k), k)

    def rate(self, theta: Tensors, fast: Fast, name: str, k: int) -> Tensor | float:
        return theta[f"inner_lr/{name}"][min(k, self._sets - 1)] if self.rate_per_step else self.inner_lr

    def predict(self, theta: Tensors, fast: Fast, inputs: tuple[Tensor, ...]) -> Tensor:
        return super().predict({**theta, **{name: fast.state[name] for name in self._norms()}}, fast, inputs)

    def step_loss(self, theta: Tensors, fast: Fast, query: Examples, k: int) -> Tensor:
        return fast.state["step_weights"][k] * super().step_loss(theta, fast, query, k)

    def meta_gradient(
        self, ops: Differentiation, theta: Tensors, task: Task, context: Context
    ) -> tuple[Tensor, Tensors]:
        if not self.multi_step_until or context.step >= self.multi_step_until or not self.inner_steps:
            return super().meta_gradient(ops, theta, task, context)

        def objective(theta: Tensors) -> Tensor:
            return ops.adapt_and_judge(self, theta, task, context)

        return ops.value_and_gradient(objective, theta)

    def _with_norms(self, theta: Tensors, fast: Fast, k: int) -> Fast:
        """Fast weights that are judged with the normalisation parameters of step k."""
        place = min(k, self._sets - 1)
        return fast._replace(state=fast.state | {name: theta[f"per_step/{name}"][place] for name in self._norms()})


def step_weights(steps: int, done: float) -> list[float]:
    """w_1, ..., w_K, which sum to 1, when the part `done` of the annealing is over."""
    least = LEAST / steps
    early = max(least, (1 - done) / steps)
    return [early] * (steps - 1) + [1 - (steps - 1) * early]
