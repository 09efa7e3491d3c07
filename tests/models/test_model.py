import numpy as np
import pytest
import torch
from torch import nn

from metadist.core.errors import InputError
from metadist.core.task import Task
from metadist.engine import Engine
from metadist.learners import MAML
from metadist.models import MLP, Conv4, Model
from metadist.models.losses import mean_squared_error


def nested(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"inner": layer}))


@pytest.mark.parametrize("module", [MLP([[5]], 3), Conv4([[1, 16, 16]], 3, channels=8)], ids=["mlp", "conv4"])
def test_called_with_its_own_parameters_it_is_the_module(module):
    model = Model(module)
    x = torch.randn(6, *((5,) if isinstance(module, MLP) else (1, 16, 16)))
    assert torch.equal(model(model.parameters, x), module(x))


def test_the_weights_given_decide_not_the_modules_own():
    module = nn.Linear(2, 1)
    model = Model(module)
    before = module.weight.detach().clone()
    outputs = model({"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])}, torch.tensor([[1.0, 1.0]]))
    assert outputs.item() == 6
    assert torch.equal(module.weight, before) and module.weight.requires_grad


def test_initial_parameters_are_copies():
    module = nn.Linear(2, 1)
    model = Model(module)
    module.weight.data.fill_(7)
    assert (model.parameters["weight"] != 7).all()


@pytest.mark.parametrize(("layer", "kind", "remedy"), [
    (nn.BatchNorm1d(4), "BatchNorm1d", "track_running_stats=False"),
    (nn.BatchNorm2d(4), "BatchNorm2d", "track_running_stats=False"),
    (nn.SyncBatchNorm(4), "SyncBatchNorm", "GroupNorm or LayerNorm"),
    (nn.InstanceNorm1d(4, track_running_stats=True), "InstanceNorm1d", "track_running_stats=False"),
    (nn.InstanceNorm3d(4, track_running_stats=True), "InstanceNorm3d", "track_running_stats=False"),
    (nn.AlphaDropout(0.1), "AlphaDropout", "use nn.Dropout"),
    (nn.Dropout(1.0), "Dropout", "p below 1"),
    (nn.LSTM(4, 4, num_layers=2, dropout=0.1), "LSTM", "set its dropout to 0"),
    (nn.GRU(4, 4, num_layers=2, dropout=0.1), "GRU", "set its dropout to 0"),
    (nn.MultiheadAttention(4, 1, dropout=0.1), "MultiheadAttention", "set its dropout to 0"),
    (nn.TransformerEncoderLayer(4, 1, 4), "MultiheadAttention", "set its dropout to 0"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_a_layer_with_state_or_chance_is_refused_by_name(layer, kind, remedy):
    with pytest.raises(InputError) as raised:
        Model(nested(layer))
    assert f"layer '1.inner{'.self_attn' if isinstance(layer, nn.TransformerEncoderLayer) else ''}' ({kind})" in str(
        raised.value
    )
    assert remedy in str(raised.value)


@pytest.mark.parametrize("layer", [
    nn.BatchNorm1d(4, track_running_stats=False), nn.InstanceNorm1d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4),
    nn.Dropout(0.5), nn.Dropout2d(0.1), nn.LSTM(4, 4), nn.TransformerEncoderLayer(4, 1, 4, dropout=0.0),
], ids=lambda layer: type(layer).__name__)  # fmt: skip
def test_the_remedies_are_accepted(layer):
    Model(nested(layer))


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(InputError, match="no trainable parameter"):
        Model(nn.Linear(2, 1).requires_grad_(False))
    with pytest.raises(InputError, match="no trainable parameter"):
        Model(nn.ReLU())


class Frozen(nn.Module):
    """A frozen layer and two buffers before a trained one."""

    def __init__(self):
        super().__init__()
        self.fixed = nn.Linear(2, 3).requires_grad_(False)
        self.head = nn.Linear(3, 1)
        self.register_buffer("scale", torch.tensor([2.0]))
        self.register_buffer("count", torch.tensor(3), persistent=False)

    def forward(self, x):
        return self.head(self.fixed(x) * self.scale * self.count)


@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_frozen_parameters_and_buffers_are_constants(kind):
    torch.manual_seed(0)
    module = Frozen()
    model = Model(module)
    assert list(model.parameters) == ["head.weight", "head.bias"]
    assert set(model.constants) == {"fixed.weight", "fixed.bias", "scale", "count"}
    assert not any(value.requires_grad for value in model.constants.values())
    engine = Engine(MAML(model=model, loss=mean_squared_error), kind, dtype=torch.float64)
    draws = np.random.default_rng(0)
    task = Task.of(draws.normal(size=(4, 2)), draws.normal(size=4), draws.normal(size=(4, 2)), draws.normal(size=4))
    rows = engine.meta_gradients(engine.initial_theta(), [task]).rows
    assert rows.shape == (1, 4) and (rows != 0).all()
    assert model.constants["scale"].dtype == torch.float64 and model.constants["count"].dtype == torch.int64
    assert torch.equal(model.constants["fixed.weight"], module.fixed.weight.double())
    assert module.scale.item() == 2 and module.count.item() == 3


def test_frozen_weights_keep_their_memory_format_when_they_are_loaded():
    layer = nn.Conv2d(4, 4, 3).requires_grad_(False).to(memory_format=torch.channels_last)
    model = Model(nn.Sequential(layer, nn.Flatten(), nn.Linear(4, 3)))
    arrays = {name: np.ascontiguousarray(value.numpy()) + 1 for name, value in model.constants.items()}
    model.load_constants(arrays)
    weight = model.constants["0.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert all(np.array_equal(model.constants[name].numpy(), arrays[name]) for name in arrays)


def test_constants_are_taken_from_a_checkpoint():
    model = Model(Frozen())
    arrays = {name: np.full(value.shape, 5, value.numpy().dtype) for name, value in model.constants.items()}
    model.load_constants({**arrays, "head.weight": np.zeros((1, 3))})
    assert set(model.constants) == set(arrays)
    assert all((value == 5).all() for value in model.constants.values())
    x = torch.ones(1, 2)
    weights = {"head.weight": torch.ones(1, 3), "head.bias": torch.zeros(1)}
    assert model(weights, x).item() == 3 * (5 + 5 + 5) * 5 * 5


def test_tied_parameters_and_buffers_appear_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(4, 3)
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("one", torch.ones(1))
            self.register_buffer("same", self.one)

        def forward(self, x):
            return self.head(self.embed(x)) * self.one * self.same

    model = Model(Tied())
    assert list(model.parameters) == ["embed.weight"] and list(model.constants) == ["one"]
    weight = torch.arange(12.0).reshape(4, 3)
    outputs = model({"embed.weight": weight}, torch.tensor([0, 3]))
    assert torch.equal(outputs, weight[[0, 3]] @ weight.T)


def test_a_layer_under_two_names_is_left_as_it_was():
    layer = nn.Linear(2, 2)
    module = nn.Sequential(layer, nn.Tanh(), layer)
    own = layer.weight
    model = Model(module)
    x = torch.ones(1, 2)
    doubled = model({name: 2 * value for name, value in model.parameters.items()}, x)
    expected = torch.tanh(2 * layer(x)) @ (2 * layer.weight).T + 2 * layer.bias
    assert torch.allclose(doubled, expected)
    assert layer.weight is own and [name for name, _ in module.named_parameters()] == ["0.weight", "0.bias"]


@pytest.mark.parametrize(("layer", "kind"), [(nn.Embedding, "Embedding"), (nn.EmbeddingBag, "EmbeddingBag")])
def test_an_embedding_that_shortens_its_weights_is_refused_by_name(layer, kind):
    with pytest.raises(InputError, match=rf"layer '1.inner' \({kind}\) shortens its weights .* leave max_norm out"):
        Model(nested(layer(4, 3, max_norm=0.5)))


def test_complex_weights_are_refused_by_name():
    module = nn.Module()
    module.inner = nn.Linear(2, 2, dtype=torch.cfloat)
    with pytest.raises(InputError, match=r"weight 'inner.weight' is complex, theta holds real numbers"):
        Model(module)


def test_a_lazy_layer_is_refused_by_name_until_it_has_been_called():
    module = nested(nn.LazyLinear(3))
    with pytest.raises(InputError, match="layer '1.inner' is lazy.*: call the module once"):
        Model(module)


class Forgetful(nn.Module):
    """Does something to itself in forward."""

    def __init__(self, act):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.act = act

    def forward(self, x):
        self.act(self, x)
        return self.layer(x - self.mean)


def assign_buffer(module: nn.Module, x: torch.Tensor) -> None:
    module.mean = 0.9 * module.mean + 0.1 * x.detach().mean(dim=0)


def change_buffer(module: nn.Module, x: torch.Tensor) -> None:
    module.mean.mul_(0.9).add_(x.detach().mean(dim=0))


def change_weight(module: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        module.layer.weight.clamp_(-0.1, 0.1)


def assign_weight(module: nn.Module, x: torch.Tensor) -> None:
    module.layer.weight = nn.Parameter(torch.zeros(2, 2))


def replace_entry(module: nn.Module, x: torch.Tensor) -> None:
    module.layer._parameters["weight"] = torch.zeros(2, 2)


@pytest.mark.parametrize("kind", ["loop", "vmap"])
@pytest.mark.parametrize(("act", "said"), [
    (assign_buffer, "assigned its buffer 'mean'"), (change_buffer, "changed its buffer 'mean'"),
    (change_weight, "changed its weight 'layer.weight'"), (assign_weight, "assigned its weight 'layer.weight'"),
    (replace_entry, "assigned its weight 'layer.weight'"),
])  # fmt: skip
def test_state_that_forward_changes_is_refused_by_name(act, said, kind):
    torch.manual_seed(0)
    engine = Engine(MAML(model=Model(Forgetful(act)), loss=mean_squared_error), kind)
    draws = np.random.default_rng(0)
    task = Task.of(*(draws.normal(size=(4, 2)) for _ in range(4)))
    by_torch = r"the model \(Forgetful\) changes a weight, a buffer or its input"  # which torch.func sees first
    with pytest.raises(InputError, match=f"(the model {said}|{by_torch}) in forward"):
        engine.meta_gradients(engine.initial_theta(), [task])
    own = engine.learner.model.module.layer.weight
    assert isinstance(own, nn.Parameter) and own.abs().max() > 0.1


def test_an_edit_behind_autograds_back_is_found_at_the_first_call():
    def edit(module: nn.Module, x: torch.Tensor) -> None:
        module.layer.weight.data.clamp_(-0.1, 0.1)

    torch.manual_seed(0)
    engine = Engine(MAML(model=Model(Forgetful(edit)), loss=mean_squared_error), "loop")
    draws = np.random.default_rng(0)
    with pytest.raises(InputError, match="the model changed its weight 'layer.weight' in forward"):
        engine.meta_gradients(engine.initial_theta(), [Task.of(*(draws.normal(size=(4, 2)) for _ in range(4)))])
