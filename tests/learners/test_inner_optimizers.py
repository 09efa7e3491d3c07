import pytest
import torch
from torch.func import functional_call

from metadist.config import load_config
from metadist.core.errors import InputError
from metadist.engine.differentiation import Recorded
from metadist.learners import MAML, Context
from metadist.learners.inner_optimizers import SGD, Adam
from metadist.run.plugins import make_part

from .small import REGRESSION, Smooth, engine_of, meta_gradient, regression_task, smooth_model

TORCHS = {
    "momentum": (SGD(0.9), lambda weights: torch.optim.SGD(weights, lr=0.2, momentum=0.9)),
    "nesterov": (
        SGD(0.9, nesterov=True),
        lambda weights: torch.optim.SGD(weights, lr=0.2, momentum=0.9, nesterov=True),
    ),
    "adam": (Adam(), lambda weights: torch.optim.Adam(weights, lr=0.2)),
    "adam, no first moment": (Adam(beta1=0.0), lambda weights: torch.optim.Adam(weights, lr=0.2, betas=(0.0, 0.999))),
}


@pytest.mark.parametrize("name", TORCHS)
def test_it_steps_as_torchs_own(name):
    own, torchs = TORCHS[name]
    learner = MAML(model=smooth_model(), inner_steps=4, inner_optimizer=own, **REGRESSION)
    engine, theta = engine_of(learner)
    task = engine.tensors(regression_task())
    weights = {n: v.double().requires_grad_() for n, v in smooth_model().parameters.items()}
    optimizer, module = torchs(weights.values()), Smooth().double()
    for _ in range(4):
        optimizer.zero_grad()
        outputs = functional_call(module, weights, task.support.inputs)
        (outputs.squeeze(1) - task.support.targets[0]).square().mean().backward()
        optimizer.step()
    expected = functional_call(module, weights, task.query.inputs)
    assert torch.allclose(engine.adapt(theta, task.support)(*task.query.inputs), expected, rtol=1e-10)


@pytest.mark.parametrize("own", [Adam(), Adam(beta1=0.0)])
@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_second_derivatives_are_finite_where_a_gradient_is_zero(own, kind):
    """A network of rectifiers that are all off: the gradients of its first layer are zero, and so is Adam's root."""
    model = smooth_model()
    model.parameters["body.0.bias"] = torch.full_like(model.parameters["body.0.bias"], -1e3)
    model.module.body[1] = torch.nn.ReLU()
    learner = MAML(model=model, inner_steps=2, inner_optimizer=own, **REGRESSION)
    row = meta_gradient(learner, regression_task(), kind)
    assert row.isfinite().all()
    assert (row == 0).any()


def test_a_job_names_one_with_options():
    assert make_part("inner_optimizer", "sgd") == SGD()
    assert make_part("inner_optimizer", "momentum") == SGD(0.9)
    assert make_part("inner_optimizer", {"name": "momentum", "momentum": 0.5, "nesterov": True}) == SGD(
        0.5, nesterov=True
    )
    assert make_part("inner_optimizer", {"name": "adam", "beta1": 0}) == Adam(beta1=0.0)


def test_a_users_own_is_named_as_module_and_callable(tmp_path, monkeypatch):
    (tmp_path / "signs.py").write_text(
        "class Sign:\n"
        "    def begin(self, weight):\n"
        "        return {}\n"
        "    def step(self, weight, gradient, slots, rate, k):\n"
        "        return weight - rate * gradient.sign(), {}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = make_part("inner_optimizer", "signs:Sign")
    learner = MAML(model=smooth_model(), inner_steps=1, inner_optimizer=own, **REGRESSION)
    engine, theta = engine_of(learner)
    weights = engine.layout.unflatten(theta)
    task = engine.tensors(regression_task())
    *_, fast = Recorded().trajectory(learner, weights, task.support, Context(0, 1, {}))
    steps = torch.cat([(fast.weights[n] - weights[n]).abs().reshape(-1) for n in weights])
    assert torch.allclose(steps, torch.full_like(steps, 0.2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("adma", "neither built in nor of the form module:attribute; did you mean adam"),
        ({"beta1": 0}, "must be a name, or a mapping with one"),
        ({"name": "adam", "beta": 0}, "inner optimizer adam has no option 'beta'"),
        ({"name": "adam", "beta1": 1.0}, "must be in"),
        ("torch.optim:SGD", "must be a class with methods begin"),
        ("pathlib:PurePath", "must be a class with methods begin"),
    ],
)
def test_what_is_none_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        make_part("inner_optimizer", given)


def test_it_reaches_the_learner_of_a_job():
    from metadist.run.build import Job

    config = load_config(
        [], ["data.family=sinusoid", "task.queries=5", "learner.inner_optimizer={name: adam, beta1: 0.5}"]
    )
    learner = Job(config, Job(config).shapes).engine().learner
    assert isinstance(learner, MAML) and learner.inner_optimizer == Adam(beta1=0.5)
