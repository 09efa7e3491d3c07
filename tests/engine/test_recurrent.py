"""Recurrent layers and attention are differentiated twice, or refused by the engine that cannot, by name."""

import numpy as np
import pytest
import torch
from torch import nn

from metadist.config import load_config
from metadist.core.errors import InputError
from metadist.core.task import Task
from metadist.engine import Engine
from metadist.learners import MAML
from metadist.models import Model
from metadist.models.losses import mean_squared_error
from metadist.run.auto import make_method


class Last(nn.Module):
    """[n, 5, 3] -> [n, 1] by a layer over the five places."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 1)

    def forward(self, x):
        out = self.layer(x)
        return self.head((out[0] if isinstance(out, tuple) else out)[:, -1])


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(3, 4)

    def forward(self, x):
        state = None
        for place in range(x.shape[1]):
            state = self.cell(x[:, place], state)
        return state[0].unsqueeze(1)


LAYERS = {
    "layer": lambda: nn.LSTM(3, 4, batch_first=True),
    "layer, gru": lambda: nn.GRU(3, 4, batch_first=True),
    "layer.cell": Cells,
    "attention": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    ),
}


def learner(name: str) -> MAML:
    torch.manual_seed(0)
    return MAML(model=Model(Last(LAYERS[name]())), loss=mean_squared_error, inner_steps=2)


def task() -> Task:
    draws = np.random.default_rng(0)
    return Task.of(*(draws.normal(size=size) for size in ((4, 5, 3), (4, 1), (4, 5, 3), (4, 1))))


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_are_exact(name):
    """Along three random directions: a network of some hundred parameters is slow to try one by one."""
    for kind in ("loop", "vmap") if name == "attention" else ("loop",):
        engine = Engine(learner(name), kind, dtype=torch.float64)
        theta = engine.initial_theta()
        gradient = engine.meta_gradients(theta, [task()]).rows[0]
        for seed in range(3):
            along = torch.randn(len(theta), generator=torch.Generator().manual_seed(seed), dtype=theta.dtype)
            ends = [engine.meta_gradients(theta + sign * 1e-5 * along, [task()]).losses[0] for sign in (1, -1)]
            assert torch.isclose(gradient @ along, (ends[0] - ends[1]) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "attention"])
def test_vmap_refuses_recurrent_layers_by_name_and_auto_avoids_it(name):
    with pytest.raises(InputError, match=f"layer {name.split(',')[0]!r} is recurrent.*engine.kind=loop"):
        Engine(learner(name), "vmap")
    config = load_config([], ["data.family=sinusoid"])
    assert make_method(config, learner(name), [[5, 3]]).kind == "loop"
