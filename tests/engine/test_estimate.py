import numpy as np
import pytest
import torch

from metadist.core.task import Task
from metadist.engine import Engine, Method, estimate
from metadist.learners import MAML
from metadist.models import MLP, Conv4, Model
from metadist.models.losses import cross_entropy
from tests.engine.live_bytes import LiveBytes
from tests.learners.small import classification_task

NETWORKS = {
    "mlp": ((20,), lambda: MLP([[20]], 5, hidden=(40,))),
    "conv4": ((1, 14, 14), lambda: Conv4([[1, 14, 14]], 5, channels=8)),
}


def case(network: str, method: Method, inner_steps: int, **options) -> tuple[Engine, list[Task]]:
    shape, make = NETWORKS[network]
    torch.manual_seed(0)
    engine = Engine(MAML(model=Model(make()), loss=cross_entropy, inner_steps=inner_steps, **options), method)
    tasks = [classification_task(seed, 5, shape, shots=4) for seed in range(2)]
    return engine, [task.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x) for task in tasks]


def measured(engine: Engine, tasks: list[Task]) -> int:
    theta = engine.initial_theta()
    with LiveBytes() as bytes_held:
        engine.meta_gradients(theta, tasks)
    return bytes_held.peak


@pytest.mark.parametrize("kind", ["loop", "vmap"])
@pytest.mark.parametrize("mode", ["unroll", "remat"])
@pytest.mark.parametrize(("network", "inner_steps"), [("mlp", 12), pytest.param("conv4", 3, marks=pytest.mark.slow)])
def test_an_estimate_is_near_what_is_measured(network, inner_steps, mode, kind):
    engine, tasks = case(network, Method(kind, mode), inner_steps)
    memory = estimate(engine, tasks)
    assert abs((memory.activations + memory.gradients) / measured(engine, tasks) - 1) < 0.3


@pytest.mark.parametrize(("kind", "together"), [("loop", 1), ("vmap", 2)])
@pytest.mark.parametrize(("spacing", "kept"), [(1, 12), (5, 3 + 4)])
def test_trajectory_and_gradients_are_counted_in_fast_weights_and_rows(spacing, kept, kind, together):
    size = sum(value.numel() for value in NETWORKS["mlp"][1]().parameters())
    memory = estimate(*case("mlp", Method(kind, "remat", spacing), 12))
    assert memory.trajectory == kept * size * 4 * together and memory.gradients == 2 * size * 4


def test_only_what_is_adapted_is_kept_on_the_way():
    memory = estimate(*case("mlp", Method("loop", "remat"), 12, adapted="head.*"))
    assert memory.trajectory == 12 * (40 * 5 + 5) * 4


def test_an_estimate_leaves_the_engine_as_it_was():
    engine, tasks = case("mlp", Method("loop"), 1)
    theta = engine.initial_theta()
    before = engine.meta_gradients(theta, tasks).rows
    estimate(engine, tasks)
    assert torch.equal(engine.meta_gradients(theta, tasks).rows, before)
