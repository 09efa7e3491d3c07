"""Each learner against its own defining formula, and the commonest wrong version of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from metadist.core.errors import InputError
from metadist.core.task import Task
from metadist.engine import Engine, Method
from metadist.engine.differentiation import Recorded
from metadist.engine.graph_cache import AFTER
from metadist.learners import (
    CAVIA,
    IMAML,
    MAML,
    R2D2,
    Context,
    MAMLPlusPlus,
    MetaCurvature,
    MetaSGD,
    ProtoMAML,
    ProtoNet,
    TaskAdaptiveMAML,
)
from metadist.learners.maml_plus_plus import step_weights
from metadist.learners.platipus import kl_divergence, sample
from metadist.models import Model
from metadist.models.losses import cross_entropy, mean_squared_error

from .family import CASES, Case, Split
from .small import classification_task, distance, engine_of, regression_task

KINDS = ["loop", "vmap"]


def trajectory(learner, theta=None, task=None, step=0):
    """theta as tensors, the task as tensors, and the fast weights after 0, 1, ... steps."""
    engine, initial = engine_of(learner)
    weights = engine.layout.unflatten(initial if theta is None else theta)
    task = engine.tensors(task or classification_task())
    context = Context(step, 1, {}, 3)
    return weights, task, list(Recorded().trajectory(learner, weights, task.support, context))


def classifier(kind, **options):
    return Case(kind, options).learner()


# --- Meta-SGD


@pytest.mark.parametrize("kind", KINDS)
def test_meta_sgds_rates_get_minus_the_product_of_both_gradients(kind):
    """d L_query(theta - alpha * g) / d alpha = -g * grad L_query(phi), elementwise."""
    learner = classifier(MetaSGD, inner_steps=1)
    engine, theta = engine_of(learner, kind)
    gradient = engine.layout.unflatten(engine.meta_gradients(theta, [classification_task()]).rows[0])
    weights, task, (start, adapted) = trajectory(learner)
    support = torch.func.grad(lambda w: learner.loss(learner.model(w, *task.support.inputs), *task.support.targets))
    query = torch.func.grad(lambda w: learner.loss(learner.model(w, *task.query.inputs), *task.query.targets))
    at_start, at_end = support(start.weights), query(adapted.weights)
    for name in learner.model.parameters:
        assert torch.allclose(gradient[f"inner_lr/{name}"], -at_start[name] * at_end[name], atol=1e-12)


def test_meta_sgds_rates_begin_in_their_range_and_stay_positive_if_asked():
    plain, positive = classifier(MetaSGD), classifier(MetaSGD, positive=True)
    for name, value in plain.layout().items():
        if name.startswith("inner_lr/"):
            assert value.min() >= 0.005 and value.max() <= 0.1
            assert torch.allclose(positive.layout()[name].exp(), value)
    far = {name: torch.full_like(v, -50.0) for name, v in positive.layout().items()}
    assert positive.rate(far, None, "head.bias", 0).min() > 0
    assert plain.rate(far, None, "head.bias", 0).min() < 0


# --- MAML++


def test_step_weights_begin_equal_and_end_with_the_last_step():
    assert step_weights(4, 0.0) == [0.25] * 4
    assert np.allclose(step_weights(4, 0.5), [0.125, 0.125, 0.125, 0.625])
    assert np.allclose(step_weights(4, 1.0), [0.0075, 0.0075, 0.0075, 0.9775])
    assert step_weights(1, 0.3) == [1.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [0, 4, 9])
def test_the_multi_step_loss_multiplies_each_steps_loss_by_its_weight(kind, step):
    learner = classifier(MAMLPlusPlus, multi_step_until=10)
    engine, theta = engine_of(learner, kind)
    weights, task, fasts = trajectory(learner, step=step)
    losses = [
        float(learner.loss(learner.predict(weights, f, task.query.inputs), *task.query.targets).detach())
        for f in fasts[1:]
    ]
    found = float(engine.meta_gradients(theta, [classification_task()], step).losses[0])
    own = step_weights(3, step / 10)
    assert found == pytest.approx(sum(w * loss for w, loss in zip(own, losses, strict=True)), rel=1e-12)
    divided = sum(loss / w for w, loss in zip(own, losses, strict=True))  # a published mistake
    assert found != pytest.approx(divided, rel=0.1)


def test_after_the_annealing_only_the_last_step_counts():
    learner = classifier(MAMLPlusPlus, multi_step_until=10)
    engine, theta = engine_of(learner)
    weights, task, fasts = trajectory(learner, step=10)
    last = learner.loss(learner.predict(weights, fasts[-1], task.query.inputs), *task.query.targets)
    assert torch.allclose(engine.meta_gradients(theta, [classification_task()], 10).losses[0], last)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_changes_at_its_meta_step(kind):
    learner = classifier(MAMLPlusPlus, first_order_until=5)
    rows = {}
    for name, each in {
        "annealed": learner,
        "first": replace(learner, first_order=True, first_order_until=0),
        "second": replace(learner, first_order_until=0),
    }.items():
        engine, theta = engine_of(each, kind)
        rows[name] = [engine.meta_gradients(theta, [classification_task()], step).rows[0] for step in (4, 5)]
    assert torch.equal(rows["annealed"][0], rows["first"][0])
    assert torch.equal(rows["annealed"][1], rows["second"][1])
    assert distance(rows["first"][0], rows["second"][0]) > 1e-3


def test_a_step_is_judged_with_its_own_normalisation():
    learner = classifier(MAMLPlusPlus)
    assert learner.model.norm_parameters == ["body.2.weight", "body.2.bias"]
    assert learner.layout()["per_step/body.2.weight"].shape == (3, 5)
    assert "body.2.weight" not in learner.adapted_names() and "body.2.weight" not in learner.layout()
    engine, theta = engine_of(learner)
    weights = engine.layout.unflatten(theta)
    weights["per_step/body.2.bias"] = torch.arange(3.0, dtype=torch.float64).unsqueeze(1).expand(3, 5)
    *_, last = trajectory(learner, engine.layout.flatten(weights))[2]
    assert torch.equal(last.state["body.2.bias"], torch.full((5,), 2.0, dtype=torch.float64))
    beyond = trajectory(replace(learner, inner_steps=6), engine.layout.flatten(weights))[2][-1]
    assert torch.equal(beyond.state["body.2.bias"], torch.full((5,), 2.0, dtype=torch.float64))


def followed(method="loop", **options):
    """MAML++ with statistics: engine, theta, its statistics and their meta-gradient, and the task as tensors."""
    learner = replace(CASES["maml++, statistics"].learner(), **options)
    engine = Engine(learner, method, dtype=torch.float64)
    theta = engine.initial_theta() + torch.linspace(0.1, 0.9, engine.layout.size, dtype=torch.float64)
    rows = engine.meta_gradients(theta, [classification_task()], 2).rows
    return engine, theta, engine.layout.unflatten(theta), engine.layout.unflatten(rows[0])


@pytest.mark.parametrize(("kind", "mode", "first_order"), [
    ("loop", "unroll", False), ("vmap", "unroll", True), ("loop", "remat", True), ("vmap", "remat", False),
])  # fmt: skip
def test_statistics_go_to_what_the_query_batch_showed_after_each_step(kind, mode, first_order):
    engine, theta, weights, gradient = followed(Method(kind, mode), first_order=first_order)
    learner = engine.learner
    assert learner.statistics() == ["per_step/body.2.running_mean", "per_step/body.2.running_var"]
    assert engine.num_statistics == 2 * 3 * 5
    assert engine.layout.unflatten(engine.initial_theta())["per_step/body.2.running_var"].eq(1).all()
    _, task, fasts = trajectory(learner, theta)
    for k, fast in enumerate(fasts[1:]):
        hidden = torch.tanh(torch.func.functional_call(
            learner.model.module.body[0],
            {name: fast.weights[f"body.0.{name}"] for name in ("weight", "bias")}, (task.query.inputs[0],),
        ))  # fmt: skip
        for name, observed in {"mean": hidden.mean(dim=0), "var": hidden.var(dim=0)}.items():  # unbiased, as torch's
            kept = weights[f"per_step/body.2.running_{name}"][k]
            assert torch.allclose(gradient[f"per_step/body.2.running_{name}"][k], kept - observed, rtol=1e-9)


def test_statistics_change_nothing_else():
    (engine, _, _, gradient), (*_, other) = followed(), followed(per_step_statistics=False)
    assert set(gradient) - set(other) == set(engine.learner.statistics())
    shared = [name for name in other if name.startswith(("head", "body", "per_step"))]
    plain = Engine(replace(engine.learner, per_step_statistics=False), "loop", dtype=torch.float64)
    theta = torch.linspace(0.1, 0.9, engine.layout.size, dtype=torch.float64)[: plain.layout.size]
    rows = plain.meta_gradients(plain.initial_theta() + theta, [classification_task()], 2).rows
    again = plain.layout.unflatten(rows[0])
    assert shared and all(torch.allclose(again[name], gradient[name], rtol=1e-9, atol=1e-12) for name in shared)


def test_with_statistics_a_query_is_predicted_without_any_other_example():
    engine, theta, _, _ = followed()
    task = classification_task()
    predict = engine.adapt(theta, task.support)
    inputs = torch.from_numpy(task.query.inputs[0])
    all_at_once = predict(inputs, transductive=False)
    for place in range(len(inputs)):
        assert torch.allclose(predict(inputs[place : place + 1], transductive=False)[0], all_at_once[place], rtol=1e-9)
    assert not torch.allclose(predict(inputs), all_at_once, rtol=1e-3)


def test_statistics_need_batch_normalisation():
    with pytest.raises(ValueError, match="BatchNorm"):
        classifier(MAMLPlusPlus, per_step_statistics=True)


def test_once_annealed_the_computation_is_played_back_for_each_phase():
    learner, calls = classifier(MAMLPlusPlus, multi_step_until=6, first_order_until=3), []

    def counted(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return cross_entropy(outputs, target)

    engine, theta = engine_of(replace(learner, loss=counted))
    for step in (2, 5, 6, 7):
        for number in range(AFTER + 3):
            calls.clear()
            engine.meta_gradients(theta, [classification_task(number)], step)
        assert bool(calls) == (step < 6)
    plain = engine_of(replace(learner, multi_step_until=0, first_order_until=0))[0]
    assert torch.equal(
        engine.meta_gradients(theta, [classification_task()], 9).rows,
        plain.meta_gradients(theta, [classification_task()], 9).rows,
    )


def test_with_every_part_switched_off_it_is_maml():
    plain = classifier(MAMLPlusPlus, rate_per_step=False, per_step_norm=False)
    (first, theta), (second, _) = engine_of(plain), engine_of(classifier(MAML))
    tasks = [classification_task()]
    assert torch.equal(first.meta_gradients(theta, tasks).rows, second.meta_gradients(theta, tasks).rows)


# --- iMAML


def quadratic(solver="cg", **options):
    """Linear regression: H is constant, phi and the implicit gradient have closed forms."""
    draws = np.random.default_rng(1)
    x, qx, y, qy = draws.normal(size=(8, 3)), draws.normal(size=(9, 3)), draws.normal(size=8), draws.normal(size=9)
    torch.manual_seed(1)
    module = nn.Linear(3, 1, bias=False).double()
    hessian, theta = 2 / 8 * x.T @ x, module.weight.detach().numpy()[0]
    lam = options.get("proximal", 2.0)
    phi = np.linalg.solve(hessian + lam * np.eye(3), 2 / 8 * x.T @ y + lam * theta)
    gradient = 2 / 9 * qx.T @ (qx @ phi - qy)
    own = {"inner_lr": 0.1, "inner_steps": 400, "solver": solver} | options
    return IMAML(model=Model(module), loss=mean_squared_error, **own), Task.of(x, y, qx, qy), hessian, gradient, lam


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [{"solver_steps": 3}, {"solver_steps": 8}, {"proximal": 9.0, "solver_steps": 3}])
def test_imamls_gradient_is_the_implicit_one(kind, own):
    learner, task, hessian, gradient, lam = quadratic(**own)
    engine, theta = engine_of(learner, kind)
    found = engine.meta_gradients(theta, [task]).rows[0].numpy()
    expected = np.linalg.solve(np.eye(3) + hessian / lam, gradient)
    assert np.allclose(found, expected, rtol=1e-9)
    published = np.linalg.solve(2 * np.eye(3) + hessian / (lam + 10), gradient)  # what its code computes
    assert not np.allclose(found, published, rtol=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("terms", [1, 4])
def test_the_neumann_series_is_what_it_says(kind, terms):
    learner, task, hessian, gradient, lam = quadratic("neumann", solver_steps=terms, proximal=9.0)
    engine, theta = engine_of(learner, kind)
    expected = sum(np.linalg.matrix_power(-hessian / lam, i) for i in range(terms + 1)) @ gradient
    assert np.allclose(engine.meta_gradients(theta, [task]).rows[0].numpy(), expected, rtol=1e-9)


def test_imamls_gradient_is_the_derivative_of_the_solved_problem():
    """By finite differences through the inner solve, which has converged."""
    case = CASES["imaml"]
    learner = case.learner(inner_steps=400, solver_steps=60)
    engine, theta = engine_of(learner)
    task = case.task()
    found = engine.meta_gradients(theta, [task]).rows[0]
    directions = torch.randn(3, len(theta), generator=torch.Generator().manual_seed(0), dtype=theta.dtype)
    loss = lambda at: engine.meta_gradients(at, [task]).losses[0]  # noqa: E731
    numeric = torch.stack([(loss(theta + 1e-6 * way) - loss(theta - 1e-6 * way)) / 2e-6 for way in directions])
    assert distance(directions @ found, numeric) < 1e-5


# --- PLATIPUS


def test_the_divergence_is_torchs():
    generator = torch.Generator().manual_seed(0)
    q, v, p, w = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(4))
    normals = [torch.distributions.Normal(mean, (log / 2).exp()) for mean, log in ((q, v), (p, w))]
    expected = torch.distributions.kl_divergence(*normals).sum()
    assert torch.allclose(kl_divergence({"x": q}, {"x": v}, {"x": p}, {"x": w}), expected)


def test_samples_have_their_mean_and_variance():
    mean, log_variance = {"x": torch.tensor([1.0, -2.0])}, {"x": torch.tensor([0.25, 4.0]).log()}
    drawn = sample(mean, log_variance, torch.tensor(7), 200_000)["x"]
    assert torch.allclose(drawn.mean(0), mean["x"], atol=0.02)
    assert torch.allclose(drawn.var(0), torch.tensor([0.25, 4.0]), rtol=0.02)


def test_platipus_predicts_the_mean_probability_of_its_samples():
    learner = CASES["platipus"].learner()
    engine, theta = engine_of(learner)
    task = engine.tensors(CASES["platipus"].task())
    context = Context(0, 1, {"noise": torch.tensor(11)}, 3)
    *_, fast = Recorded().trajectory(learner, engine.layout.unflatten(theta), task.support, context)
    each = [learner.model({n: w[s] for n, w in fast.weights.items()}, *task.query.inputs).softmax(1) for s in range(3)]
    mean = learner.predict({}, fast, task.query.inputs).exp()
    assert torch.allclose(mean, torch.stack(each).mean(0))
    assert torch.allclose(mean.sum(1), torch.ones(len(mean), dtype=mean.dtype))
    assert not torch.allclose(each[0], each[1], atol=1e-4)


def test_platipus_refuses_the_wrong_kind_of_prediction():
    engine, theta = engine_of(CASES["platipus"].learner(predicts="values"))
    with pytest.raises(InputError, match="learner.predicts"):
        engine.adapt(theta, CASES["platipus"].task().support)


# --- Meta-Curvature


def test_meta_curvature_is_a_kronecker_product_of_its_matrices():
    torch.manual_seed(0)
    model = Model(nn.Conv2d(2, 3, (2, 2)).double())
    learner = MetaCurvature(model=model, loss=mean_squared_error, inner_lr=1.0)
    theta = {name: value.double() for name, value in learner.layout().items()}
    for name in theta:
        if "curvature" in name:
            theta[name] = torch.randn_like(theta[name])
    gradient = {name: torch.randn_like(value) for name, value in model.parameters.items()}
    fast = learner.start({name: torch.zeros_like(value) for name, value in model.parameters.items()})
    after = learner.update(theta, fast, gradient, 0).weights
    out, into, rest = (theta[f"curvature/weight/{mode}"] for mode in range(3))
    expected = torch.kron(torch.kron(out, into), rest) @ gradient["weight"].reshape(-1)
    assert torch.allclose(after["weight"].reshape(-1), -expected)
    assert torch.allclose(after["bias"], -theta["curvature/bias/0"] @ gradient["bias"])


def test_meta_curvature_begins_as_maml():
    (first, theta), (second, maml) = engine_of(classifier(MetaCurvature)), engine_of(classifier(MAML))
    tasks, size = [classification_task()], len(maml)
    assert torch.allclose(first.meta_gradients(theta, tasks).rows[:, :size], second.meta_gradients(maml, tasks).rows)


# --- CAVIA


def test_the_context_is_no_part_of_theta_and_begins_at_zero_in_every_task():
    learner = CASES["cavia"].learner()
    assert isinstance(learner, CAVIA)
    assert "context" not in learner.layout() and learner.adapted_names() == ["context"]
    learner.model.parameters["context"].fill_(9.0)
    _, _, (start, first, *_) = trajectory(learner, task=regression_task())
    assert (start.weights["context"] == 0).all() and (first.weights["context"] != 0).any()


def test_a_model_without_context_is_refused_with_the_remedy():
    with pytest.raises(InputError, match="^CAVIA adapts only context parameters: set model.context"):
        classifier(CAVIA)


# --- R2-D2


def test_ridge_is_the_primal_solution_and_its_scale_and_shift_apply():
    learner = CASES["r2d2"].learner()
    weights, task, (fast,) = trajectory(learner)
    weights |= {"ridge/scale": torch.tensor([3.0]).double(), "ridge/shift": torch.tensor([0.5]).double()}
    x, q = (
        torch.cat([learner.model.features(weights, *part.inputs), torch.ones(len(part.inputs[0]), 1)], 1)
        for part in task
    )
    y = torch.nn.functional.one_hot(task.support.targets[0]).double()
    primal = torch.linalg.solve(x.T @ x + 2.0 * torch.eye(6), x.T @ y)
    assert torch.allclose(learner.predict(weights, fast, task.query.inputs), 3 * q @ primal + 0.5)


def test_closed_forms_refuse_inner_steps():
    for kind in (R2D2, ProtoNet):
        with pytest.raises(ValueError, match="closed form"):
            classifier(kind, inner_steps=1)


def test_learners_that_need_features_say_so():
    from .small import smooth_model

    for kind in (R2D2, ProtoNet, ProtoMAML, TaskAdaptiveMAML):
        learner = kind(model=smooth_model(), loss=cross_entropy)
        with pytest.raises(InputError, match="method `features"):
            learner.layout()


# --- prototypes


@pytest.mark.parametrize("kind", [ProtoNet, ProtoMAML])
@pytest.mark.parametrize("ways", [2, 3, 5])
def test_prototypes_take_any_number_of_ways(kind, ways):
    learner = classifier(kind)
    engine, theta = engine_of(learner, "vmap")
    task = classification_task(1, ways)
    outputs = engine.adapt(theta, task.support)(*task.query.inputs)
    assert outputs.shape == (ways * 3, ways)
    assert engine.meta_gradients(theta, [task]).rows.isfinite().all()


def test_protonet_is_minus_the_squared_distance_to_class_means():
    learner = classifier(ProtoNet)
    weights, task, (fast,) = trajectory(learner)
    support, query = (learner.model.features(weights, *part.inputs) for part in task)
    means = torch.stack([support[task.support.targets[0] == label].mean(0) for label in range(3)])
    expected = -(torch.cdist(query, means) ** 2)
    assert torch.allclose(learner.predict(weights, fast, task.query.inputs), expected)


def test_protomaml_begins_with_protonets_decision():
    learner = classifier(ProtoMAML)
    weights, task, (start, *_) = trajectory(learner)
    proto = classifier(ProtoNet)
    reference = proto.begin(weights, task.support, Context(0, 1, {}, 3))
    logits = learner.predict(weights, start, task.query.inputs)
    distances = proto.predict(weights, reference, task.query.inputs)
    assert torch.allclose(logits.log_softmax(1), distances.log_softmax(1))


# --- task-adaptive MAML


def test_an_encoder_of_no_width_is_refused():
    with pytest.raises(ValueError, match="encoder_width=0 must be 1 or more"):
        classifier(TaskAdaptiveMAML, encoder_width=0)


def test_gates_begin_at_one_and_then_depend_on_the_task():
    learner = classifier(TaskAdaptiveMAML)
    _, _, (fast, *_) = trajectory(learner)
    assert torch.equal(fast.state["gates"], torch.ones(len(learner.adapted_names()), dtype=torch.float64))
    (first, theta), (second, maml) = engine_of(learner), engine_of(classifier(MAML))
    tasks = [classification_task()]
    rows = first.meta_gradients(theta, tasks).rows
    assert torch.allclose(rows[:, : len(maml)], second.meta_gradients(maml, tasks).rows)
    moved = theta + 0.05
    gates = [trajectory(learner, moved, classification_task(seed))[2][0].state["gates"] for seed in (0, 1)]
    assert distance(*gates) > 1e-4
    assert all((gate > 0).all() and (gate < 2).all() for gate in gates)


def test_norm_parameters_are_those_of_normalisation_layers():
    assert Model(Split(4, 3)).norm_parameters == ["body.2.weight", "body.2.bias"]
    assert Engine(classifier(MAML), "loop").learner.model.has_dropout is False
