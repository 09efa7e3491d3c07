import warnings
from itertools import cycle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from metadist.core.errors import InputError
from metadist.core.task import Task
from metadist.engine import Engine, Method
from metadist.engine.gradient_check import check_gradient, claims_derivative, plain
from metadist.learners import IMAML, LEARNERS, MAML, Reptile
from metadist.models import Model
from metadist.models.losses import cross_entropy
from tests.engine.reference import meta_gradient

KINDS = ["loop", "vmap"]


def task_of(*shape: int, integers: int = 0, seed: int = 0) -> Task:
    """3 ways, 2 shots, 2 queries; inputs [6, *shape] in float64, or whole numbers below `integers`."""
    draws = np.random.default_rng(seed)
    inputs = [draws.integers(0, integers, (6, *shape)) if integers else draws.normal(size=(6, *shape)) for _ in "ab"]
    labels = torch.arange(6) % 3
    return Task.of(torch.from_numpy(inputs[0]), labels, torch.from_numpy(inputs[1]), labels)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class LoRA(nn.Module):
    """A frozen layer with a trained difference of rank 2, whose second factor is zero to begin with."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 5).requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 5, bias=False)
        nn.init.zeros_(self.up.weight)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(x) + self.up(self.down(x))))


class Siren(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        nn.init.uniform_(self.one.weight, -1 / 4, 1 / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sin(3.0 * self.one(x)))


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x).mean(dim=1)))


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(4, 4) / 2, torch.randn(4, 3) / 2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weights[0]) @ self.weights[1]


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))


def orthogonal() -> nn.Module:
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3))


def normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))


def normed_by_column() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5), dim=1), nn.Tanh(), nn.Linear(5, 3))


def normed_as_before() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 5), dim=None), nn.Tanh(), nn.Linear(5, 3))


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))


ARCHITECTURES = {
    "tied": (Tied, (4,), 0), "attention": (Attention, (3, 4), 0), "lstm": (Recurrent, (3, 2), 0),
    "group norm": (grouped, (1, 4, 4), 0), "lora": (LoRA, (4,), 0), "siren": (Siren, (4,), 0),
    "embedding": (Embedded, (3,), 7), "parameter list": (Listed, (4,), 0), "orthogonal": (orthogonal, (4,), 0),
    "weight norm": (normed, (4,), 0), "weight norm by column": (normed_by_column, (4,), 0),
    "old weight norm": (normed_as_before, (4,), 0),
}  # fmt: skip


def learner_of(make, inner_steps: int = 2, **options) -> MAML:
    torch.manual_seed(0)
    return MAML(model=Model(make()), loss=cross_entropy, inner_lr=0.1, inner_steps=inner_steps, **options)


def theta_of(make, **options) -> np.ndarray:
    return Engine(learner_of(make, **options)).initial_theta().numpy()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_common_architectures_are_differentiated_as_a_plain_module_says(name):
    make, shape, integers = ARCHITECTURES[name]
    task = task_of(*shape, integers=integers)
    torch.manual_seed(0)
    expected = meta_gradient(make(), cross_entropy, task, 0.1, 2)
    for kind in KINDS if name != "lstm" else ["loop"]:
        engine = Engine(learner_of(make), kind, dtype=torch.float64)
        found = engine.meta_gradients(engine.initial_theta(), [task]).rows[0]
        assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize(("name", "kind"), [*zip(ARCHITECTURES, cycle(KINDS[::-1])), ("dropout", "loop")])
def test_and_the_check_lets_them_pass(name, kind):
    make, shape, integers = ARCHITECTURES.get(name, (dropping, (4,), 0))
    kind = "loop" if name == "lstm" else kind
    found = check_gradient(learner_of(make), Method(kind), theta_of(make), task_of(*shape, integers=integers))
    assert found.tensor is None and found.error < 1e-6


class HalfGradient(torch.autograd.Function):
    """x, with half of its derivative: no error anywhere."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        del ctx, inputs, output

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        del ctx
        return gradient / 2


class OnceOnly(torch.autograd.Function):
    """x ** 2 whose first derivative is right and, as it is computed apart from autograd, has no second one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * 2 * x.detach()


class Wrong(nn.Module):
    """`function` after the first layer."""

    def __init__(self, function):
        super().__init__()
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.function(self.one(x)))


class HiddenWeightNorm(nn.Module):
    """torch's own, called directly, so that nobody can put another in its place."""

    def __init__(self):
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.rand(5, 1) + 0.5)
        self.two = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(x @ torch._weight_norm(self.v, self.g, 0).T))


@pytest.mark.parametrize(("make", "tensors"), [
    (lambda: Wrong(HalfGradient.apply), {"one.weight", "one.bias"}),
    (lambda: Wrong(lambda x: torch.tanh(x.detach()) + 0 * x), {"one.weight", "one.bias"}),
    (lambda: Wrong(OnceOnly.apply), {"one.weight", "one.bias", "two.weight"}),
    (HiddenWeightNorm, {"v", "g", "two.weight"}),
], ids=["half", "detached", "once", "torch._weight_norm"])  # fmt: skip
def test_a_wrong_derivative_is_found_and_its_tensor_named(make, tensors):
    found = check_gradient(learner_of(make), Method("loop"), theta_of(make), task_of(4))
    assert found.error > 5e-5 and found.tensor in tensors


class Scaled(nn.Module):
    """Features so large that the classes of a task are told apart without doubt."""

    def __init__(self, scale: float):
        super().__init__()
        self.body, self.head, self.scale = nn.Linear(4, 16), nn.Linear(16, 3), scale

    def features(self, x: Tensor) -> Tensor:
        return self.scale * torch.tanh(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@pytest.mark.parametrize(("scale", "seed"), [(3, 0), (3, 7), (3, 9), (3, 11), (4, 1), (6, 0)])
def test_a_loss_of_nearly_0_is_too_coarse_to_tell_or_right_but_never_wrong(scale, seed):
    """Differences of losses of 1e-14 to 1e-9 are off by up to 100 % by rounding alone."""
    draws, labels = np.random.default_rng(seed), torch.arange(6) % 3
    means = 2 * draws.normal(size=(3, 4))
    support, query = (torch.from_numpy(means[labels] + 0.1 * draws.normal(size=(6, 4))) for _ in "ab")
    torch.manual_seed(seed)
    learner = LEARNERS["protonet"][0](model=Model(Scaled(scale)), loss=cross_entropy)
    theta = Engine(learner).initial_theta().numpy()
    found = check_gradient(learner, Method("loop"), theta, Task.of(support, labels, query, labels))
    assert found.tensor is None


@pytest.mark.parametrize("seed", range(3))
def test_a_derivative_that_is_off_by_a_ten_thousandth_is_wrong_all_the_same(seed):
    """As differences of all sizes agree on it."""
    torch.manual_seed(seed)
    learner = MAML(model=Model(HiddenWeightNorm()), loss=cross_entropy, inner_lr=0.1, inner_steps=2)
    theta = Engine(learner).initial_theta().numpy()
    found = check_gradient(learner, Method("loop"), theta, task_of(4, seed=seed))
    assert found.tensor and 5e-5 < found.error < 1e-3


def test_a_wrong_second_derivative_does_no_harm_to_what_is_of_first_order():
    learner = learner_of(lambda: Wrong(OnceOnly.apply), first_order=True)
    theta = Engine(plain(learner)).initial_theta().numpy()
    assert not claims_derivative(learner, 1)
    assert check_gradient(plain(learner), Method("loop"), theta, task_of(4)).tensor is None
    wrong = learner_of(lambda: Wrong(HalfGradient.apply), first_order=True)
    assert check_gradient(plain(wrong), Method("loop"), theta, task_of(4)).tensor


def test_which_learners_claim_the_derivative_of_their_outer_loss():
    model = Model(nn.Linear(4, 3))
    assert claims_derivative(MAML(model=model, loss=cross_entropy), 10)
    assert not claims_derivative(MAML(model=model, loss=cross_entropy, first_order=True), 10)
    assert not claims_derivative(Reptile(model=model, loss=cross_entropy), 10)
    assert not claims_derivative(IMAML(model=model, loss=cross_entropy), 10)
    estimate = LEARNERS["policy_gradient"][0](model=model, loss=cross_entropy, environment=None)  # type: ignore
    assert not claims_derivative(estimate, 10)
    assert plain(Reptile(model=model, loss=cross_entropy)).inner_steps == 0
    assert plain(IMAML(model=model, loss=cross_entropy)).inner_steps == 1
    annealed = LEARNERS["maml++"][0](model=model, loss=cross_entropy, first_order_until=5)  # type: ignore
    assert claims_derivative(annealed, 10) and not claims_derivative(annealed, 4)


def in_float32(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs.float(), target)


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_in_float32_is_checked_as_well_as_that_allows(seed):
    def made(function) -> tuple[MAML, np.ndarray]:
        torch.manual_seed(seed)
        return (learner := MAML(model=Model(Wrong(function)), loss=in_float32, inner_lr=0.1, inner_steps=2)), Engine(
            learner
        ).initial_theta().numpy()

    _, theta = made(torch.relu)
    found = check_gradient(made(torch.relu)[0], Method("loop"), theta, task_of(4))
    assert found.tensor is None and found.error < 0.1
    wrong = check_gradient(made(HalfGradient.apply)[0], Method("loop"), theta, task_of(4))
    assert wrong.tensor and wrong.error > 0.1


def test_a_model_that_computes_in_bfloat16_in_between_is_too_coarse_to_be_checked():
    def make() -> nn.Module:
        return Wrong(lambda x: torch.tanh(x.to(torch.float16).to(x.dtype)))

    found = check_gradient(learner_of(make), Method("loop"), theta_of(make), task_of(4))
    assert found.tensor is None and np.isnan(found.error)


class Checkpointed(nn.Module):
    """The second layer is computed again on the way back; `direct`: by its weights, not as a layer."""

    def __init__(self, again: bool = True, direct: bool = False):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.again, self.direct = again, direct

    def block(self, x: Tensor) -> Tensor:
        inner = F.linear(x, self.two.weight, self.two.bias) if self.direct else self.two(x)
        return torch.tanh(inner)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.one(x))
        return self.head(checkpoint(self.block, x, use_reentrant=False) if self.again else self.block(x))


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(("mode", "first_order"), [("remat", False), ("unroll", True), ("remat", True)])
def test_activation_checkpointing_is_right_where_weights_stay_in_place(mode, first_order, direct):
    task, rows = task_of(4), []
    for again in (False, True):
        learner = learner_of(lambda again=again: Checkpointed(again, direct), first_order=first_order)
        engine = Engine(learner, Method("loop", mode), dtype=torch.float64)
        rows.append(engine.meta_gradients(engine.initial_theta() + 0.1, [task]).rows)
        curve = engine.evaluate(engine.initial_theta() + 0.1, [task], {"loss": cross_entropy})["loss"]
        rows.append(curve)
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[1], rows[3])
    own = learner.model.module
    assert all(isinstance(each, nn.Parameter) for each in (own.one.weight, own.two.weight, own.head.bias))


def test_and_refused_with_the_remedy_where_they_do_not():
    engine = Engine(learner_of(Checkpointed), "loop", dtype=torch.float64)
    with pytest.raises(InputError, match=r"\(torch.utils.checkpoint\).*: set engine.differentiation=remat"):
        engine.meta_gradients(engine.initial_theta(), [task_of(4)])


def test_checkpointing_under_vmap_and_the_reentrant_kind_name_what_to_set():
    engine = Engine(learner_of(Checkpointed), "vmap", dtype=torch.float64)
    with pytest.raises(InputError, match=r"engine.kind=loop and engine.differentiation=remat"):
        engine.meta_gradients(engine.initial_theta(), [task_of(4)])

    class Reentrant(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.block, torch.tanh(self.one(x)), use_reentrant=True))

    engine = Engine(learner_of(Reentrant), Method("loop", "remat"), dtype=torch.float64)
    with pytest.raises(InputError, match="use_reentrant=True, set it to False"):
        engine.meta_gradients(engine.initial_theta(), [task_of(4)])


class Distances(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.one(x), self.two.weight) + self.two.bias


@pytest.mark.parametrize("kind", KINDS)
def test_an_operation_without_a_second_derivative_is_named_with_the_remedy(kind):
    engine = Engine(learner_of(Distances), kind, dtype=torch.float64)
    with pytest.raises(InputError, match=r"uses cdist, .*set learner.first_order=true"):
        engine.meta_gradients(engine.initial_theta(), [task_of(4)])
    first = Engine(learner_of(Distances, first_order=True), kind, dtype=torch.float64)
    assert first.meta_gradients(first.initial_theta(), [task_of(4)]).rows.isfinite().all()


def test_functional_dropout_under_vmap_names_what_draws_from_the_tasks_key():
    engine = Engine(learner_of(lambda: Wrong(F.dropout)), "vmap", dtype=torch.float64)
    with pytest.raises(InputError, match=r"the model \(Wrong\) draws random numbers .* use nn.Dropout"):
        engine.meta_gradients(engine.initial_theta(), [task_of(4)])
