"""The seam for algorithms: a learner declares mathematics, an engine computes and differentiates it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from metadist.core.errors import InputError
from metadist.core.measure import Better
from metadist.core.random import Draws
from metadist.core.task import Examples, Task
from metadist.models import Model
from metadist.models.losses import Loss
from metadist.models.model import DROPOUT

Tensors = dict[str, Tensor]


class Fast(NamedTuple):
    """What the inner loop changes: `weights` (phi; the inner gradient is taken with respect to these) and `state`
    that belongs to the inner optimizer or the method (moments, counters)."""

    weights: Tensors
    state: Tensors


class Context(NamedTuple):
    """What a task knows beside its examples: the meta-step, how many there are, what `draw` drew for it, for a learner
    that `needs_ways` how many classes its support set has (0: its targets are not class numbers), and its `phase`."""

    step: int
    meta_steps: int
    draws: Tensors
    ways: int = 0
    phase: Hashable = None


class Differentiation(Protocol):
    """What an engine offers to a learner that computes its own meta-gradient."""

    def value_and_gradient(self, f: Callable[[Tensors], Tensor], at: Tensors) -> tuple[Tensor, Tensors]:
        """f(at) and its gradient, exact through every inner step inside f."""
        ...

    def hessian_vector_product(self, f: Callable[[Tensors], Tensor], at: Tensors, vector: Tensors) -> Tensors:
        """The second derivative of f at `at`, times a vector."""
        ...

    def each(self, f: Callable[[Tensors, Task], Tensor], stacked: Tensors, task: Task) -> Tensor:
        """f(weights, task), a scalar, of each slice of the weights [n, ...]: [n], at once where the engine can."""
        ...

    def adapt(self, learner: "Learner", theta: Tensors, support: Examples, context: Context) -> Fast:
        """The inner loop: `begin`, then `inner_steps` times `inner_loss`, its gradient, `update`."""
        ...

    def multi_step_loss(self, learner: "Learner", theta: Tensors, task: Task, context: Context) -> Tensor:
        """The inner loop, and the sum over its steps of the learner's `step_loss` after each of them."""
        ...


@dataclass(frozen=True, kw_only=True)
class Learner(ABC):
    """One few-shot learning algorithm over `model` and `loss`. Stateless: everything meta-learned is in theta.

    A subclass implements `begin` and `update` and, where its mathematics differs, any of the others. Every method is a
    pure function of its arguments, so that an engine may run it per task, over a batch of tasks, or twice.

    Args:
        model: the network as a function of named weights; see `Model`.
        loss: `loss(outputs, *targets) -> scalar`, a mean over examples; see `metadist.models.losses`.
        inner_lr: rate of the inner loop, above 0, for a loss that is a mean over examples.
        inner_steps: steps of the inner loop, 0 or more.
        first_order: whether inner gradients are constants for the outer one (no second derivatives).

    Raises:
        ValueError: where an option is out of its range.

    Example, gradient descent whose first step is twice as long:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> from metadist import Engine, Learner, Model, Task
        >>> from metadist.learners import Fast
        >>> from metadist.models.losses import mean_squared_error
        >>> @dataclass(frozen=True, kw_only=True)
        ... class LongFirstStep(Learner):
        ...     def begin(self, theta, support, context):
        ...         return Fast(weights={name: theta[name] for name in self.adapted_names()}, state={})
        ...     def update(self, theta, fast, gradient, k):
        ...         rate = self.inner_lr * (2 if k == 0 else 1)
        ...         return fast._replace(weights={n: w - rate * gradient[n] for n, w in fast.weights.items()})
        >>> learner = LongFirstStep(model=Model(torch.nn.Linear(2, 1)), loss=mean_squared_error, inner_steps=3)
        >>> engine, x = Engine(learner, "vmap"), torch.randn(6, 2)
        >>> engine.meta_gradients(engine.initial_theta(), [Task.of(x, x.sum(1), x, x.sum(1))]).rows.shape
        torch.Size([1, 3])
    """

    model: Model
    loss: Loss
    inner_lr: float = 0.1
    inner_steps: int = 1
    first_order: bool = False

    engines: ClassVar[tuple[str, ...]] = ("loop", "vmap")
    needs_ways: ClassVar[bool] = False
    any_ways: ClassVar[bool] = False
    """Whether it has `context.ways`, and whether it can take more classes than the model has outputs."""
    learned_rates: ClassVar[bool] = False
    """Whether theta has its inner rates, so that another `inner_lr` at evaluation would say nothing."""
    exact_meta_gradient: ClassVar[bool] = True
    """Whether this class's `meta_gradient` is the derivative of the loss it returns: not so, where a loss stands for
    what its gradient estimates (policy gradients). A class that has a `meta_gradient` of its own says so itself:
    otherwise finite differences do not check it."""
    refused: ClassVar[Mapping[str, str]] = {}
    """Options above that would say nothing here, and the reason."""
    diagnostics: ClassVar[tuple[str, ...]] = ()
    """Names of numbers of each task that a `meta_gradient` of its own adds to the gradient it returns. They are no part
    of theta; their means over tasks are logged as train/NAME."""
    measures: ClassVar[Mapping[str, Better]] = {}
    """What tasks are judged by where they have no labelled queries: names of what `measure` gives, each with the side
    on which it is better; the first is the measure of success. Empty: by the job's metrics of `predict_query`."""
    baselines: ClassVar[tuple[str, ...] | None] = None
    """Names of the baselines that it is compared with where the job names none; None: by the kind of its tasks."""
    before: ClassVar[str] = "before adaptation"
    """What results before the first inner step are called: not so, where `begin` already uses the support set."""

    def __post_init__(self) -> None:
        if self.inner_steps < 0 or self.inner_lr <= 0:
            raise ValueError(f"inner_steps={self.inner_steps} must be 0 or more and inner_lr={self.inner_lr} above 0")

    def layout(self) -> Tensors:
        """Everything it meta-learns, by name, with initial values: by default the model's trainable parameters."""
        return self.model.parameters

    def statistics(self) -> list[str]:
        """Names of what `layout` ends with that is not descended but follows what tasks observe, as a moving average.
        The engine finds (statistic - observed) as its gradient where an outer loss has `follow` in it; the server goes
        a tenth of the mean of that, and leaves it out of norms, clipping and the optimizer."""
        return []

    def concern(self, means: Mapping[str, float]) -> str:
        """What a user should know, once, of the means of the diagnostics over a meta-step's tasks; else nothing."""
        del means
        return ""

    def adapted_names(self) -> list[str]:
        """Names of the model's parameters that the inner loop changes: by default all of them. Where all are of the
        module's `head`, an engine computes what comes before it once, and hands the learner rows of that."""
        return list(self.model.parameters)

    def draw(self, draws: Draws, support_size: int) -> dict[str, np.ndarray]:
        """Random numbers this task needs, drawn from its own key; they arrive as `context.draws`."""
        del draws, support_size
        return {}

    def phase(self, step: int, meta_steps: int) -> Hashable:
        """What of the computation depends on the meta-step, where that is but a few cases: it arrives in the context.
        A computation that looks at `context.step` itself is built anew in each call, which is slower."""
        del step, meta_steps
        return None

    def is_first_order(self, context: Context) -> bool:
        """Whether inner gradients are constants for the outer one, in this task."""
        del context
        return self.first_order

    @abstractmethod
    def begin(self, theta: Tensors, support: Examples, context: Context) -> Fast:
        """Fast weights before the first inner step."""

    def inner_loss(self, theta: Tensors, fast: Fast, support: Examples, k: int) -> Tensor:
        """The scalar that inner step k descends: by default the mean loss on the support set."""
        del k
        return self.loss(self.predict(theta, fast, support.inputs), *support.targets)

    @abstractmethod
    def update(self, theta: Tensors, fast: Fast, gradient: Tensors, k: int) -> Fast:
        """Fast weights after inner step k, given the gradient of `inner_loss` with respect to `fast.weights`."""

    def outer_loss(self, theta: Tensors, fast: Fast, query: Examples, context: Context) -> Tensor:
        """The scalar that theta descends: by default the mean loss on the query set after adaptation."""
        del context
        return self.loss(self.predict(theta, fast, query.inputs), *query.targets)

    def step_loss(self, theta: Tensors, fast: Fast, query: Examples, k: int) -> Tensor:
        """What `fast`, as inner step k left it, adds to a multi-step outer loss."""
        del k
        return self.loss(self.predict(theta, fast, query.inputs), *query.targets)

    def predict(self, theta: Tensors, fast: Fast, inputs: tuple[Tensor, ...]) -> Tensor:
        """Model outputs [n, ...] for inputs [n, ...], fast weights taking the place of theta's of the same name."""
        return self.model(self.model_weights(theta, fast), *inputs)

    def model_weights(self, theta: Tensors, fast: Fast) -> Tensors:
        """What the model is called with."""
        key = {DROPOUT: fast.state[DROPOUT]} if DROPOUT in fast.state else {}
        return {**theta, **fast.weights, **key}

    def predict_query(self, theta: Tensors, fast: Fast, task: Task, transductive: bool) -> Tensor:
        """Outputs for the query set: as one batch, or each without the others (by default with the support set)."""
        return predict_query(lambda inputs: self.predict(theta, fast, inputs), task, transductive)

    def measure(self, theta: Tensors, fast: Fast, query: Examples) -> Tensors:
        """A scalar for each of the names of `measures`: how well `fast` does on the query set, without a gradient."""
        raise NotImplementedError(f"{type(self).__name__} has `measures`, and needs a method measure that gives them")

    def check(self, theta: Tensors, task: Task) -> object:
        """Use the model as the learner will, so that the driver finds out before a run whether it can be; the outputs
        for the support set, or None where there are none to look at. By default the model takes the support inputs."""
        return self.model({name: theta[name] for name in self.model.parameters}, *task.support.inputs)

    def meta_gradient(
        self, ops: Differentiation, theta: Tensors, task: Task, context: Context
    ) -> tuple[Tensor, Tensors]:
        """Outer loss and meta-gradient of one task: by default the derivative of the outer loss through adaptation."""

        def objective(theta: Tensors) -> Tensor:
            fast = ops.adapt(self, theta, task.support, context)
            return self.outer_loss(theta, fast, task.query, context)

        return ops.value_and_gradient(objective, theta)


def follow(statistic: Tensor, observed: Tensor) -> Tensor:
    """A zero whose derivative by `statistic` is (statistic - observed)."""
    return ((statistic - observed).detach() * (statistic - statistic.detach())).sum()


def predict_query(predict: Callable[[tuple[Tensor, ...]], Tensor], task: Task, transductive: bool) -> Tensor:
    """Outputs [n query, ...] in one batch, or of each example in a batch with the support set."""
    if transductive:
        return one_tensor(predict(task.query.inputs))

    def alone(*query: Tensor) -> Tensor:
        pairs = zip(task.support.inputs, query, strict=True)
        return one_tensor(predict(tuple(torch.cat([support, example.unsqueeze(0)]) for support, example in pairs)))[-1]

    return torch.func.vmap(alone)(*task.query.inputs)


def one_tensor(outputs: object) -> Tensor:
    """A model's outputs, as losses and metrics take them. Raises InputError where they are not one tensor."""
    if isinstance(outputs, Tensor):
        return outputs
    of = f" of {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else ""
    raise InputError(
        f"the model gives a {type(outputs).__name__}{of}, and losses, metrics and predictions need one tensor "
        "[n, outputs]: return the logits or values alone, or name a learner of your own whose `predict` picks them"
    )


def one_by_one(f: Callable[[Tensors, Task], Tensor], stacked: Tensors, task: Task) -> Tensor:
    """f(weights, task), a scalar, of each slice of the weights [n, ...]: [n]."""
    count = len(next(iter(stacked.values())))
    return torch.stack([f({name: value[number] for name, value in stacked.items()}, task) for number in range(count)])


def at_once(f: Callable[[Tensors, Task], Tensor], stacked: Tensors, task: Task) -> Tensor:
    """The same, by vmap; the task too has n rows, as torch's rule for the squared error needs (torch 2.13: where only
    one of its arguments has them, a vmap around this one fails)."""
    count = len(next(iter(stacked.values())))
    return torch.func.vmap(f)(stacked, task.map(lambda tensor: tensor.expand(count, *tensor.shape)))
