import numpy as np
import pytest
import torch
from torch.func import functional_call

from metadist.core.random import Draws
from metadist.core.task import TaskId
from metadist.fleet.server import Optimization, Server
from metadist.learners import Reptile
from metadist.learners.inner_optimizers import SGD, Adam
from metadist.models.losses import mean_squared_error

from .small import REGRESSION, Smooth, distance, engine_of, meta_gradient, regression_task, smooth_model

KINDS = ["loop", "vmap"]
OPTIMIZERS = {
    "sgd": (SGD(), lambda weights: torch.optim.SGD(weights, lr=0.2)),
    "adam": (Adam(beta1=0.0), lambda weights: torch.optim.Adam(weights, lr=0.2, betas=(0.0, 0.999))),
}


def reptile(**options) -> Reptile:
    return Reptile(model=smooth_model(), **(REGRESSION | options))


def by_hand(learner: Reptile, batches: np.ndarray | None) -> torch.Tensor:
    """theta - phi of a training loop as anyone would write it."""
    task = regression_task()
    x, y = torch.from_numpy(task.support.inputs[0]), torch.from_numpy(task.support.targets[0])
    start = {name: value.double() for name, value in learner.model.parameters.items()}
    weights = {name: value.clone().requires_grad_() for name, value in start.items()}
    make = next(torchs for own, torchs in OPTIMIZERS.values() if own == learner.inner_optimizer)
    optimizer = make(weights.values())
    for k in range(learner.inner_steps):
        rows = slice(None) if batches is None else batches[k]
        optimizer.zero_grad()
        ((functional_call(Smooth().double(), weights, x[rows]).squeeze(1) - y[rows]) ** 2).mean().backward()
        optimizer.step()
    return torch.cat([(start[name] - weights[name]).detach().reshape(-1) for name in start])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("inner_steps", [1, 5])
def test_the_meta_gradient_is_theta_minus_phi_of_torchs_own_optimizer(kind, optimizer, inner_steps):
    learner = reptile(inner_optimizer=OPTIMIZERS[optimizer][0], inner_steps=inner_steps)
    assert distance(meta_gradient(learner, regression_task(), kind), by_hand(learner, None)) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_minibatches_are_the_rows_that_were_drawn(kind, optimizer):
    learner = reptile(inner_optimizer=OPTIMIZERS[optimizer][0], inner_steps=5, inner_batch=2)
    engine, theta = engine_of(learner, kind)
    key = (4, TaskId("train", 9, 2), 1)
    rows = engine.meta_gradients(theta, [regression_task()], draws=[Draws(*key)]).rows
    drawn = learner.draw(Draws(*key), 6)["minibatches"]
    assert distance(rows[0], by_hand(learner, drawn)) < 1e-12


@pytest.mark.parametrize(("size", "batch", "steps"), [(6, 2, 3), (6, 2, 6), (10, 5, 4), (4, 4, 3)])
def test_minibatches_of_one_pass_are_disjoint_and_cover_the_support_set(size, batch, steps):
    drawn = reptile(inner_steps=steps, inner_batch=batch).draw(Draws(0, TaskId("train", 0, 0)), size)["minibatches"]
    assert drawn.shape == (steps, batch)
    for one_pass in np.split(drawn, steps * batch // size):
        assert sorted(one_pass.reshape(-1).tolist()) == list(range(size))


def test_a_batch_larger_than_the_support_set_runs_through_it_again():
    drawn = reptile(inner_steps=1, inner_batch=9).draw(Draws(0, TaskId("train", 0, 0)), 4)["minibatches"]
    assert sorted(drawn[0, :4]) == sorted(drawn[0, 4:8]) == [0, 1, 2, 3]


def test_minibatches_are_a_function_of_the_tasks_key():
    learner = reptile(inner_steps=4, inner_batch=3)
    same = [learner.draw(Draws(0, TaskId("train", 3, 4), 1), 12)["minibatches"] for _ in range(2)]
    other = learner.draw(Draws(0, TaskId("train", 3, 5), 1), 12)["minibatches"]
    assert np.array_equal(*same) and not np.array_equal(same[0], other)


@pytest.mark.parametrize("kind", KINDS)
def test_without_inner_steps_theta_stays(kind):
    assert (meta_gradient(reptile(inner_steps=0), regression_task(), kind) == 0).all()
    assert (meta_gradient(reptile(inner_steps=0, inner_batch=2), regression_task(), kind) == 0).all()


def test_one_step_of_sgd_is_the_support_gradient_times_the_rate():
    half, whole = (meta_gradient(reptile(inner_lr=rate), regression_task()) for rate in (0.1, 0.2))
    assert distance(2 * half, whole) < 1e-12


def test_the_query_set_only_measures():
    task, other = regression_task(0), regression_task(1)
    swapped = task._replace(query=other.query)
    engine, theta = engine_of(reptile(inner_steps=3))
    first, second = engine.meta_gradients(theta, [task]), engine.meta_gradients(theta, [swapped])
    assert torch.equal(first.rows, second.rows) and first.losses != second.losses


def test_a_batch_of_tasks_moves_theta_towards_the_mean_of_their_phis():
    """Nichol et al. 2018, section 2: theta += epsilon * mean(phi - theta)."""
    from metadist.core.messages import Chunk, ChunkReport

    engine, theta = engine_of(reptile(inner_steps=4))
    tasks = [regression_task(seed) for seed in range(3)]
    losses, rows = engine.meta_gradients(theta, tasks)
    report = ChunkReport(Chunk("train", 0, 0, 3), losses.numpy(), rows.norm(dim=1).numpy(), {})
    server = Server(theta.numpy(), Optimization(optimizer="sgd", meta_lr=0.25))
    moved, _ = server.apply(0, (report, rows.numpy()))
    phis = np.stack([theta - engine.meta_gradients(theta, [task]).rows[0] for task in tasks])
    assert np.allclose(moved.theta, theta.numpy() + 0.25 * (phis.mean(axis=0) - theta.numpy()), rtol=1e-12)


def test_a_second_order_reptile_is_refused():
    with pytest.raises(ValueError, match="no second-order form"):
        Reptile(model=smooth_model(), loss=mean_squared_error, first_order=False)
