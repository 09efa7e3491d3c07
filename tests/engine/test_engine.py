from itertools import cycle

import numpy as np
import pytest
import torch
from torch import nn

from metadist.core.errors import InputError
from metadist.core.random import Draws
from metadist.core.task import Examples, Task, TaskId
from metadist.engine import Engine
from metadist.learners import LEARNERS, MAML, Learner, Reptile
from metadist.learners.inner_optimizers import Adam
from metadist.models import MLP, Bag, Conv4, Model
from metadist.models.losses import accuracy, cross_entropy, mean_squared_error
from tests.learners.small import classification_task, distance, regression_task, smooth_model

METRICS = {"accuracy": accuracy, "loss": cross_entropy}
NETWORKS = {
    "mlp": ((4,), lambda: MLP([[4]], 3, hidden=(6,))),
    "conv4": ((1, 8, 8), lambda: Conv4([[1, 8, 8]], 3, channels=4)),
    "pooled": ((1, 16, 16), lambda: Conv4([[1, 16, 16]], 3, channels=8, pool=True, norm="group")),
}
CLOSED_FORM, CONTEXT = ("r2d2", "protonet"), "cavia"
ON_EXAMPLES = [name for name, own in LEARNERS.items() if not own[0].measures]
VARIANTS = {name: (name, {}) for name in ON_EXAMPLES if name not in (*CLOSED_FORM, CONTEXT)} | {
    "maml, no steps": ("maml", {"inner_steps": 0}),
    "reptile, minibatches": ("reptile", {"inner_batch": 4, "inner_steps": 3}),
    "reptile, adam": ("reptile", {"inner_batch": 4, "inner_optimizer": Adam(beta1=0.0), "inner_lr": 0.01}),
}


EACH_ON_A_NETWORK = list(zip(VARIANTS, cycle(NETWORKS)))
"""The rest of all pairs is in `tests/learners/test_family.py` (every learner) and `test_differentiation.py` (every
network)."""


def make(variant: str, module: nn.Module) -> Learner:
    name, options = VARIANTS[variant]
    kind, preset, _ = LEARNERS[name]
    return kind(model=Model(module), loss=cross_entropy, **({"inner_steps": 2} | preset | options))


def engines(variant: str, network: str, dtype: torch.dtype = torch.float64) -> tuple[Engine, Engine]:
    pair = []
    for kind in ("loop", "vmap"):
        torch.manual_seed(0)
        pair.append(Engine(make(variant, NETWORKS[network][1]()), kind, dtype=dtype))
    return pair[0], pair[1]


def tasks_of(network: str, count: int = 3) -> list[Task]:
    return [classification_task(seed, shape=NETWORKS[network][0]) for seed in range(count)]


class Attention(nn.Module):
    """tokens [n, 4, 6] -> [n, 3], through torch's fused attention."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(6, 18), nn.Linear(6, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        attended = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])
        return self.head(attended[:, 0].mean(dim=1))


@pytest.mark.parametrize(("variant", "network"), EACH_ON_A_NETWORK)
def test_loop_and_vmap_give_the_same_meta_gradients(variant, network):
    loop, vmap = engines(variant, network)
    theta, tasks = loop.initial_theta(), tasks_of(network)
    assert torch.equal(theta, vmap.initial_theta())
    one, other = loop.meta_gradients(theta, tasks), vmap.meta_gradients(theta, tasks)
    assert one.rows.shape == (3, loop.layout.size) and one.losses.shape == (3,)
    assert torch.allclose(one.losses, other.losses, rtol=1e-9)
    # A bias before a normalisation has no gradient but rounding, which Adam divides by as little as its epsilon, 1e-8.
    tolerance = 1e-7 if variant == "reptile, adam" else 1e-9
    for row, same in zip(one.rows, other.rows, strict=True):
        assert torch.equal(row, same) or distance(row, same) < tolerance


@pytest.mark.parametrize(("variant", "network"), EACH_ON_A_NETWORK)
def test_loop_and_vmap_evaluate_to_the_same(variant, network):
    loop, vmap = engines(variant, network)
    theta, tasks = loop.initial_theta(), tasks_of(network, 2)
    for transductive in (True, False):
        one, other = (engine.evaluate(theta, tasks, METRICS, transductive) for engine in (loop, vmap))
        assert list(one) == list(other) == ["accuracy", "loss"]
        assert one["loss"].shape == (2, loop.learner.inner_steps + 1)
        assert torch.equal(one["accuracy"], other["accuracy"])
        assert torch.allclose(one["loss"], other["loss"], rtol=1e-9)


@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_attention_is_differentiated_twice(kind):
    torch.manual_seed(0)
    module = Attention()
    tasks = [classification_task(seed, shape=(4, 6)) for seed in range(2)]
    rows = {}
    for first_order in (False, True):
        learner = MAML(model=Model(module), loss=cross_entropy, inner_lr=0.5, first_order=first_order)
        engine = Engine(learner, kind, dtype=torch.float64)
        rows[first_order] = engine.meta_gradients(engine.initial_theta(), tasks).rows
        if not first_order:
            theta, step = engine.initial_theta(), torch.zeros(engine.layout.size, dtype=torch.float64)
            step[3] = 1e-5
            above, below = (engine.meta_gradients(at, tasks).losses for at in (theta + step, theta - step))
            assert torch.allclose(rows[False][:, 3], (above - below) / 2e-5, rtol=1e-6)
    assert distance(rows[True], rows[False]) > 1e-3


@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_text_with_its_mask_is_adapted_to(kind):
    torch.manual_seed(0)
    model = Model(Bag([[5], [5]], 2, vocabulary_size=9, embedding=8, hidden=8))
    engine = Engine(MAML(model=model, loss=cross_entropy, inner_steps=5, inner_lr=0.5), kind, dtype=torch.float64)
    tokens, mask = np.array([[1, 2, 0, 0, 0], [3, 4, 5, 0, 0]]), np.array([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]], bool)
    part = Examples((tokens, mask), (np.array([0, 1]),))
    losses = engine.evaluate(engine.initial_theta(), [Task(part, part)], {"loss": cross_entropy})["loss"][0]
    assert (losses.diff() < 0).all()


def test_text_gives_the_same_rows_in_both_engines():
    rows = []
    for kind in ("loop", "vmap"):
        torch.manual_seed(0)
        model = Model(Bag([[5], [5]], 2, vocabulary_size=9, embedding=8, hidden=8))
        engine = Engine(MAML(model=model, loss=cross_entropy, inner_steps=2), kind, dtype=torch.float64)
        tasks = []
        for seed in range(3):
            draws = np.random.default_rng(seed)
            parts = [(draws.integers(0, 9, (4, 5)), draws.random((4, 5)) < 0.7) for _ in range(2)]
            tasks.append(Task(*(Examples(inputs, (np.array([0, 0, 1, 1]),)) for inputs in parts)))
        rows.append(engine.meta_gradients(engine.initial_theta(), tasks).rows)
    assert distance(*rows) < 1e-9


@pytest.mark.parametrize(
    ("variant", "network"), [("maml", "conv4"), ("anil", "mlp"), ("anil", "conv4"), ("reptile", "mlp")]
)
def test_inductive_is_each_query_predicted_beside_the_support_set(variant, network):
    engine, _ = engines(variant, network)
    task = engine.tensors(tasks_of(network, 1)[0])
    theta = engine.initial_theta()
    predict = engine.adapt(theta, task.support)
    support, query = task.support.inputs[0], task.query.inputs[0]
    outputs = torch.stack([predict(torch.cat([support, example[None]]))[-1] for example in query])
    by_hand = cross_entropy(outputs, task.query.targets[0])
    inductive, transductive = (
        engine.evaluate(theta, [task], METRICS, transductive)["loss"][0, -1] for transductive in (False, True)
    )
    assert torch.allclose(inductive, by_hand, rtol=1e-9)
    assert (network == "mlp") == bool(torch.isclose(inductive, transductive, rtol=1e-9))


@pytest.mark.parametrize(
    ("name", "kind"),
    list(zip([name for name in ON_EXAMPLES if name not in (CONTEXT, "evolution")], cycle(["loop", "vmap"]))),
)  # evolution: an estimate, which is zero of it in the mean only
def test_an_unused_parameter_gets_zeros(name, kind):
    class Spare(MLP):
        def __init__(self):
            super().__init__([[4]], 3, hidden=(5,))
            self.spare = nn.Parameter(torch.ones(2, 3))

    learner_class, preset, _ = LEARNERS[name]
    engine = Engine(learner_class(model=Model(Spare()), loss=cross_entropy, **preset), kind, dtype=torch.float64)
    rows = engine.meta_gradients(engine.initial_theta(), tasks_of("mlp")).rows
    named = engine.layout.named_arrays(rows[0].numpy())
    assert (named["spare"] == 0).all()
    assert (named["body.0.weight"] != 0).any()


def test_a_learner_that_does_not_admit_an_engine_is_refused():
    class LoopOnly(MAML):
        engines = ("loop",)

    learner = LoopOnly(model=smooth_model(), loss=mean_squared_error)
    Engine(learner, "loop")
    with pytest.raises(InputError, match="engine.kind='vmap' cannot compute LoopOnly: use loop"):
        Engine(learner, "vmap")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_said():
    with pytest.raises(InputError, match="torch sees no GPU here: check fleet.gpus_per_worker"):
        Engine(MAML(model=smooth_model(), loss=mean_squared_error), device="cuda")


@pytest.mark.parametrize("network", ["mlp", "pooled"])
@pytest.mark.parametrize("index", [0, 1])
def test_float32_is_near_float64(network, index):
    rows = [
        engines("maml", network, dtype)[index].meta_gradients(
            engines("maml", network, dtype)[index].initial_theta(), tasks_of(network)
        ).rows
        for dtype in (torch.float32, torch.float64)
    ]  # fmt: skip
    assert rows[0].dtype == torch.float32
    assert distance(rows[0].double(), rows[1]) < 1e-4


@pytest.mark.parametrize("index", [0, 1])
def test_the_loss_of_a_meta_gradient_is_the_last_one_of_evaluate(index):
    engine = engines("maml", "mlp")[index]
    theta, tasks = engine.initial_theta(), tasks_of("mlp")
    measured = engine.evaluate(theta, tasks, METRICS)["loss"][:, -1]
    assert torch.allclose(engine.meta_gradients(theta, tasks).losses, measured, rtol=1e-12)


@pytest.mark.parametrize("index", [0, 1])
def test_a_task_alone_has_the_row_it_has_in_a_chunk(index):
    engine = engines("maml", "mlp")[index]
    theta, tasks = engine.initial_theta(), tasks_of("mlp")
    chunk = engine.meta_gradients(theta, tasks).rows
    for row, task in zip(chunk, tasks, strict=True):
        assert distance(engine.meta_gradients(theta, [task]).rows[0], row) < 1e-12


@pytest.mark.parametrize("kind", ["loop", "vmap"])
@pytest.mark.parametrize("learner_class", [MAML, Reptile])
def test_results_share_no_memory_with_what_was_given(learner_class, kind):
    engine = Engine(learner_class(model=smooth_model(), loss=mean_squared_error, inner_steps=0), kind)
    theta, task = engine.initial_theta(), regression_task().map(lambda x: x.astype(np.float32))
    kept, held = theta.clone(), task.map(np.copy)
    losses, rows = engine.meta_gradients(theta, [task])
    predict = engine.adapt(theta, task.support)
    before = predict(task.query.inputs[0])
    measured = engine.evaluate(theta, [task], {"loss": mean_squared_error})["loss"]
    for result in (losses, rows, measured, engine.initial_theta()):
        result.fill_(9)
    assert torch.equal(theta, kept) and torch.equal(engine.initial_theta(), kept)
    assert all(np.array_equal(a, b) for a, b in zip(task.support.inputs + task.query.targets,
                                                    held.support.inputs + held.query.targets, strict=True))  # fmt: skip
    theta.fill_(0)
    assert torch.equal(predict(task.query.inputs[0]), before)
    assert not rows.requires_grad and not losses.requires_grad and not before.requires_grad


def test_the_same_call_gives_the_same_bits():
    for engine in engines("maml", "conv4", torch.float32):
        theta, tasks = engine.initial_theta(), tasks_of("conv4")
        first, second = engine.meta_gradients(theta, tasks), engine.meta_gradients(theta, tasks)
        assert torch.equal(first.rows, second.rows) and torch.equal(first.losses, second.losses)


def test_a_trace_has_the_support_loss_and_norm_of_every_step():
    engine, _ = engines("maml", "mlp")
    task, theta = engine.tensors(tasks_of("mlp", 1)[0]), engine.initial_theta()
    traced = engine.trace(theta, task, Draws(0, TaskId("train", 0, 0), 1))
    outputs = engine.adapt(theta, task.support)(*task.support.inputs)
    assert len(traced) == 3
    assert np.isclose(traced[0][1], float(theta.norm()))
    assert np.isclose(traced[-1][0], float(cross_entropy(outputs, task.support.targets[0])))
    assert traced[0][0] > traced[1][0] > traced[2][0]


def test_theta_may_come_in_another_precision():
    engine, _ = engines("maml", "mlp")
    theta, tasks = engine.initial_theta(), tasks_of("mlp")
    rows = engine.meta_gradients(theta.float(), tasks).rows
    assert rows.dtype == torch.float64
    assert distance(rows, engine.meta_gradients(theta.float().double(), tasks).rows) == 0
