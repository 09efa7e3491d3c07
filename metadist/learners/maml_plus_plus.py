"""MAML++: what makes MAML train stably, each part of it by itself."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from metadist.core.task import Examples, Task
from metadist.learners.learner import Context, Differentiation, Fast, Tensors, follow
from metadist.learners.maml import MAML

LEAST = 0.03  # of a step's equal share in the multi-step loss, as in the published code


class Phase(NamedTuple):
    """Whether a meta-step is still first-order, and whether its loss is still of all steps."""

    first_order: bool
    multi_step: bool


@dataclass(frozen=True, kw_only=True)
class MAMLPlusPlus(MAML):
    """MAML with the parts of Antoniou et al. 2019, section 4 (https://arxiv.org/abs/1810.09502), each with its switch.

    - `multi_step_until`: for so many meta-steps the outer loss is sum_k w_k L_query(phi_k), k = 1, ..., K. All w_k are
      1 / K at first; those before the last fall linearly to 0.03 / K, the last one has the rest. 0: never.
    - `first_order_until`: so many meta-steps are first-order, those after them second-order. 0: none.
    - `rate_per_step`: a learned rate for each adapted tensor and inner step (the paper's: for each layer and step).
    - `per_step_norm`: scale and shift of normalisation layers for each inner step, learned but not adapted.
    - `per_step_statistics`: moving averages of the batch statistics of the query sets after each inner step, which
      take the place of the batch's own where evaluation.transductive=false. Every step's query loss is then computed in
      all meta-steps, which takes the time of the multi-step loss.
    - The cosine meta-rate is the outer optimizer's: optimizer.schedule=cosine.

    More inner steps than trained with use what belongs to the last of those. In training normalisation is by the batch
    at hand, as in the published code, which collects running statistics and never uses them.
    """

    multi_step_until: int = 0
    first_order_until: int = 0
    rate_per_step: bool = True
    per_step_norm: bool = True
    per_step_statistics: bool = False
    trained_steps: int | None = None

    exact_meta_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trained_steps is None:  # evaluation may take other steps; theta has those of training
            object.__setattr__(self, "trained_steps", max(1, self.inner_steps))
        if min(self.multi_step_until, self.first_order_until, self._sets - 1) < 0:
            raise ValueError("multi_step_until and first_order_until must be 0 or more, trained_steps 1 or more")
        if self.per_step_statistics and not (self._running() and self.inner_steps):
            raise ValueError(
                "per_step_statistics needs inner steps, and metadist.models.layers.BatchNorm in the model (norm: batch)"
            )

    @property
    def learned_rates(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rate_per_step

    @property
    def _sets(self) -> int:
        return self.trained_steps or 1

    def _norms(self) -> list[str]:
        """The parameters that theta holds once for each step."""
        return self.model.norm_parameters if self.per_step_norm else []

    def _running(self) -> list[str]:
        """The statistics that theta holds once for each step."""
        return [name for pair in self.model.running_names for name in pair]

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
        if self.per_step_statistics:
            scales = [path.removesuffix("running_mean") + "weight" for path, _ in self.model.running_names]
            sets = [like.new_zeros(self._sets, len(self.model.parameters[scale])) for scale in scales]
            pairs = zip(self.model.running_names, sets, strict=True)
            theta |= {f"per_step/{n}": z + i for names, z in pairs for i, n in enumerate(names)}  # mean 0, variance 1
        return theta

    def statistics(self) -> list[str]:
        return [f"per_step/{name}" for name in self._running()] if self.per_step_statistics else []

    def adapted_names(self) -> list[str]:
        norms = set(self._norms())
        return [name for name in super().adapted_names() if name not in norms]

    def phase(self, step: int, meta_steps: int) -> Phase:
        del meta_steps
        return Phase(step < self.first_order_until, bool(self.inner_steps) and step < self.multi_step_until)

    def is_first_order(self, context: Context) -> bool:
        return self.first_order or self._phase(context).first_order

    def begin(self, theta: Tensors, support: Examples, context: Context) -> Fast:
        fast = self._at_step(theta, super().begin(theta, support, context), 0)
        if not self._has_multi_step_loss(context):
            return fast
        done = context.step / self.multi_step_until if self._phase(context).multi_step else 1.0
        weights = step_weights(self.inner_steps, done) if done < 1 else [0.0] * (self.inner_steps - 1) + [1.0]
        like = next(iter(fast.weights.values()))
        return fast._replace(
            state=fast.state | {"step_weights": torch.tensor(weights, dtype=like.dtype, device=like.device)}
        )

    def inner_loss(self, theta: Tensors, fast: Fast, support: Examples, k: int) -> Tensor:
        return super().inner_loss(theta, self._at_step(theta, fast, k), support, k)

    def update(self, theta: Tensors, fast: Fast, gradient: Tensors, k: int) -> Fast:
        return self._at_step(theta, super().update(theta, fast, gradient, k), k)

    def rate(self, theta: Tensors, fast: Fast, name: str, k: int) -> Tensor | float:
        return theta[f"inner_lr/{name}"][min(k, self._sets - 1)] if self.rate_per_step else self.inner_lr

    def model_weights(self, theta: Tensors, fast: Fast) -> Tensors:
        return super().model_weights(theta | {name: fast.state[name] for name in self._norms()}, fast)

    def predict_query(self, theta: Tensors, fast: Fast, task: Task, transductive: bool) -> Tensor:
        if transductive or not self.per_step_statistics:
            return super().predict_query(theta, fast, task, transductive)
        return self.predict(theta | {name: fast.state[name] for name in self._running()}, fast, task.query.inputs)

    def step_loss(self, theta: Tensors, fast: Fast, query: Examples, k: int) -> Tensor:
        outputs, observed = self.model.observe(self.model_weights(theta, fast), *query.inputs)
        loss = fast.state["step_weights"][k] * self.loss(outputs, *query.targets)
        return loss + sum(follow(fast.state[name], observed[name]) for name in self._state_names() if name in observed)

    def meta_gradient(
        self, ops: Differentiation, theta: Tensors, task: Task, context: Context
    ) -> tuple[Tensor, Tensors]:
        if not self._has_multi_step_loss(context):
            return super().meta_gradient(ops, theta, task, context)

        def objective(theta: Tensors) -> Tensor:
            return ops.multi_step_loss(self, theta, task, context)

        return ops.value_and_gradient(objective, theta)

    def _phase(self, context: Context) -> Phase:
        given = context.phase
        return given if isinstance(given, Phase) else self.phase(context.step, context.meta_steps)

    def _has_multi_step_loss(self, context: Context) -> bool:
        return self._phase(context).multi_step or self.per_step_statistics

    def _state_names(self) -> list[str]:
        return self._norms() + (self._running() if self.per_step_statistics else [])

    def _at_step(self, theta: Tensors, fast: Fast, k: int) -> Fast:
        """Fast weights that predict with the normalisation parameters and statistics of step k."""
        place = min(k, self._sets - 1)
        return fast._replace(state=fast.state | {n: theta[f"per_step/{n}"][place] for n in self._state_names()})


def step_weights(steps: int, done: float) -> list[float]:
    """w_1, ..., w_K, which sum to 1, when the part `done` of the annealing is over."""
    least = LEAST / steps
    early = max(least, (1 - done) / steps)
    return [early] * (steps - 1) + [1 - (steps - 1) * early]
