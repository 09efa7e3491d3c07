import gc
import sys

import numpy as np
import pytest
import torch
from torch import nn

from metadist.config import load_config
from metadist.core.errors import InputError
from metadist.core.random import Draws
from metadist.core.task import TaskId
from metadist.engine import Engine
from metadist.environments import Gymnasium, Variations
from metadist.learners import PolicyGradient
from metadist.models import Model
from metadist.models.losses import mean_squared_error
from metadist.run.api import train

gymnasium = pytest.importorskip("gymnasium", reason="no gymnasium: pip install 'metadist[rl]'")
CART_POLE = Gymnasium("CartPole-v1", vary=["gravity", "force_mag"])  # values in alphabetical order: the force first
TASKS = Variations(0, {"gravity": (5.0, 15.0), "force_mag": (-12.0, 12.0)}, [4], 2)


def parameters(*values: float) -> tuple[torch.Tensor, ...]:
    return (torch.tensor(values, dtype=torch.float64),)


def test_a_trajectory_is_the_environments_own_with_the_tasks_attributes():
    state, observed = CART_POLE.reset(parameters(-7.0, 5.0), torch.tensor(11), trajectories=2)
    assert observed.shape == (2, 4) and not torch.equal(observed[0], observed[1])
    by_hand = gymnasium.make("CartPole-v1").unwrapped
    by_hand.reset(seed=0)
    by_hand.force_mag, by_hand.gravity, by_hand.state = -7.0, 5.0, observed[1].numpy()
    for action in (0, 1, 1):
        step = CART_POLE.step(parameters(-7.0, 5.0), state, torch.tensor([1 - action, action]))
        expected, reward, *_ = by_hand.step(action)
        state = step.state
        np.testing.assert_allclose(step.observations[1], expected, rtol=1e-5)
        assert step.rewards[1] == reward == 1


def test_the_same_key_begins_the_same_and_another_elsewhere():
    starts = [CART_POLE.reset(parameters(10.0, 9.8), torch.tensor(key), 3)[1] for key in (4, 4, 5)]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_after_its_end_a_trajectory_rests():
    state, _ = CART_POLE.reset(parameters(10.0, 9.8), torch.tensor(0), 2)
    steps = []
    for t in range(30):
        steps.append(CART_POLE.step(parameters(10.0, 9.8), state, torch.tensor([1, t % 2])))
        state = steps[-1].state
    ended = [bool(step.ended[0]) for step in steps]
    assert ended == sorted(ended) and ended[-1] and not steps[12].ended[1]
    after = ended.index(True) + 1
    assert steps[after].rewards[0] == 0 and torch.equal(steps[after].observations[0], steps[-1].observations[0])


def test_values_find_their_names_in_whatever_order_both_are_given():
    """The forces are below 0, gravity above: a swap cannot be missed."""
    both = [
        Variations(0, {"gravity": (5.0, 15.0), "force_mag": (-12.0, -8.0)}, [4], 2),
        Variations(0, {"force_mag": (-12.0, -8.0), "gravity": (5.0, 15.0)}, [4], 2),
    ]
    values = [torch.as_tensor(source(TaskId("train", 0, 3)).query.inputs[0][0]) for source in both]
    assert torch.equal(*values)
    for vary in (["gravity", "force_mag"], ["force_mag", "gravity"]):
        (made, *_), _ = Gymnasium("CartPole-v1", vary=vary).reset((values[0],), torch.tensor(0), 2)
        for environment in made:
            assert -12 <= environment.unwrapped.force_mag <= -8 and 5 <= environment.unwrapped.gravity <= 15


def test_a_task_needs_a_value_for_each_name():
    for count in (1, 3):
        with pytest.raises(InputError, match=rf"brings {count} values, .* varies \['force_mag', 'gravity'\]"):
            CART_POLE.reset(parameters(*[1.0] * count), torch.tensor(0), 2)


def test_environments_are_closed_after_use(monkeypatch):
    closed, kind = [], type(gymnasium.make("CartPole-v1").unwrapped)
    monkeypatch.setattr(kind, "close", lambda self: closed.append(self.force_mag))
    state, _ = CART_POLE.reset(parameters(10.0, 9.8), torch.tensor(0), 3)
    state = CART_POLE.step(parameters(10.0, 9.8), state, torch.tensor([0, 1, 0])).state
    gc.collect()
    assert closed == []
    del state
    gc.collect()
    assert closed == [10.0] * 3


def test_a_job_names_it_and_its_tasks(tmp_path):
    job = [
        "learner.environment={name: metadist.environments:Gymnasium, id: CartPole-v1, vary: [gravity]}",
        "data.source=metadist.environments:Variations",
        "data.options={ranges: {gravity: [5, 15]}, observation_shape: [4], outputs: 2}", "model.name=mlp",
        "model.hidden=[8]", "learner.name=policy_gradient", "learner.trajectories=3", "learner.horizon=6",
        "learner.inner_lr=0.1", "engine.kind=loop", "meta_batch_size=2", "meta_steps=2", "evaluation.every=0",
        "evaluation.tasks=2", "evaluation.test_tasks=2", "evaluation.baselines=[]", "tracking.mlflow=false",
        "fleet.backend=local", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    found = train(load_config([], job), quiet=True)
    assert found["measure"] == {"name": "return", "better": "higher"}
    assert 1 <= found["return"]["after"]["mean"] <= 6, "CartPole pays 1 a step"


def test_actions_of_a_box_are_clipped_to_it():
    pendulum = Gymnasium("Pendulum-v1")
    assert not pendulum.discrete and CART_POLE.discrete
    found = []
    for torque in (2.0, 50.0):
        state, _ = pendulum.reset(parameters(), torch.tensor(3), 1)
        found.append(pendulum.step(parameters(), state, torch.tensor([[torque]])).observations)
    assert torch.equal(found[0], found[1])


def learner() -> PolicyGradient:
    torch.manual_seed(0)
    return PolicyGradient(
        model=Model(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))), loss=mean_squared_error,
        environment=CART_POLE, trajectories=4, horizon=12,
    )  # fmt: skip


def test_a_learner_gets_the_same_bits_in_each_call_task_by_task():
    engine, tasks = Engine(learner(), "loop"), [TASKS(TaskId("train", 0, index)) for index in range(2)]
    theta, found = engine.initial_theta(), []
    for _ in range(20):  # more than before a computation would be recorded
        draws = [Draws(0, TaskId("train", 0, index), 1) for index in range(2)]
        found.append(engine.meta_gradients(theta, tasks, draws=draws))
    assert all(torch.equal(each.rows, found[0].rows) for each in found) and found[0].rows.norm() > 0
    assert (found[0].losses <= -4).all() and (found[0].losses >= -12).all()
    assert learner().engines == ("loop",)
    with pytest.raises(InputError, match="use loop"):
        Engine(learner(), "vmap")


def test_what_it_cannot_take_is_refused(monkeypatch):
    for wrong, said in [
        (Gymnasium("NoSuchThing-v0"), "cannot be made"),
        (Gymnasium("CartPole-v1", options={"colour": "red"}), "cannot be made"),
        (Gymnasium("os:CartPole-v1"), "module"),
        (Gymnasium("CartPole-v1", vary=["weight"]), "no attribute 'weight'"),
        (Gymnasium("Blackjack-v1"), "must be a box"),
    ]:
        with pytest.raises(InputError, match=said):
            print(wrong.discrete)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(InputError, match=r"pip install 'metadist\[rl\]'"):
        print(Gymnasium("CartPole-v1").discrete)
