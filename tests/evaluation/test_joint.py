import numpy as np
import pytest

from metadist.config import load_config
from metadist.core.errors import InputError
from metadist.core.task import TaskId
from metadist.engine import Engine
from metadist.evaluation.joint import fine_tuning
from metadist.learners import MAML
from metadist.models.losses import mean_squared_error
from metadist.run.build import Job

FEW = ["model.name=mlp", "fleet.backend=local", "evaluation.test_tasks=10"]


def sinusoid(*overrides: str):
    job = ["data.family=sinusoid", "data.options={groups: [50, 5, 5], points: 30}", "task.shots=10", "task.queries=10"]
    config = load_config([], [*job, *FEW, "evaluation.joint_steps=30", *overrides])
    return config, Job(config).shapes


def digits(*overrides: str):
    job = ["data.family=digits", "task.ways=3", "task.shots=5", "task.queries=5", "evaluation.joint_steps=60",
           "evaluation.joint_lr=0.01"]  # fmt: skip
    config = load_config([], [*job, *FEW, *overrides])
    return config, Job(config).shapes


def joint(config, shapes):
    job = Job(config, shapes)
    return job.joint(job.engine())


def results(config, shapes):
    return joint(config, shapes).results()


def test_joint_training_lowers_the_loss_of_all_curves_together():
    config, shapes = sinusoid("evaluation.joint_steps=300")
    engine = Engine(MAML(model=Job(config, shapes).engine().learner.model, loss=mean_squared_error, inner_steps=0))
    tasks = [Job(config).source(TaskId("train", 0, index)) for index in range(100)]
    before, after = (
        engine.evaluate(theta, tasks, {"loss": mean_squared_error})["loss"].mean()
        for theta in (engine.initial_theta(), engine.layout.flatten(joint(config, shapes).weights()))
    )
    assert after < 0.85 * before


def test_the_joint_baseline_owes_nothing_to_learner_meta_batch_and_outer_optimizer():
    tuning = ["evaluation.joint_inner_lr=0.02", "evaluation.joint_inner_steps=2"]
    jobs = [
        ["learner.name=maml"], ["learner.name=boil", "meta_batch_size=3", "meta_lr=1", "optimizer.name=sgd"],
        ["learner.name=platipus", "learner.predicts=values"], ["learner.name=r2d2"], ["learner.name=maml++"],
        ["learner.name=reptile", "learner.inner_steps=4", "learner.inner_batch=2", "tasks_per_worker=2"],
    ]  # fmt: skip
    first, *others = (results(*sinusoid(*tuning, *job))["loss"] for job in jobs)
    assert first.shape == (10, 3)
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("learner", [
    ["boil"], ["cavia", "model.context=4"], ["protonet"], ["maml++"],
])  # fmt: skip
def test_jointly_trained_weights_learn_new_classes_whatever_the_runs_learner_adapts(learner):
    name, *own = learner
    tuning = ["evaluation.joint_inner_lr=0.01", "evaluation.joint_inner_steps=10"]
    accuracy = results(*digits(f"learner.name={name}", *own, *tuning))["accuracy"].mean(axis=0)
    assert accuracy[0] == pytest.approx(1 / 3)  # a head of zeros
    assert accuracy[-1] > 0.55


def test_the_head_of_the_joint_baseline_has_the_classes_of_evaluation():
    config, shapes = digits("learner.name=protonet", "task.ways=2", "evaluation.ways=3", "evaluation.split=train")
    assert shapes.outputs == 2
    assert results(config, shapes)["accuracy"][:, -1].mean() > 0.6


@pytest.mark.parametrize(("own", "expected"), [
    (["learner.inner_lr=0.3", "evaluation.inner_steps=4"], (0.3, 4)),
    (["learner.inner_lr=0.3", "evaluation.inner_lr=0.2", "learner.inner_steps=3"], (0.2, 3)),
    (["learner.inner_lr=0.3", "learner.name=boil"], (0.4, 1)),
    (["learner.inner_lr=0.3", "learner.inner_optimizer=adam"], (0.4, 1)),
    (["learner.name=meta_sgd"], (0.4, 1)),
    (["learner.name=protonet"], (0.4, 10)),
    (["learner.name=protonet", "evaluation.joint_inner_lr=0.5", "evaluation.joint_inner_steps=7"], (0.5, 7)),
])  # fmt: skip
def test_fine_tuning_takes_the_learners_rate_where_that_is_one_for_all_weights(own, expected):
    config, shapes = digits(*own)
    assert fine_tuning(config.evaluation, shapes.classification, Job(config, shapes).engine().learner) == expected


def test_what_the_joint_baseline_cannot_take_is_refused():
    with pytest.raises(InputError, match="joint.*model"):
        Job(*digits("model.name=my_model:Net")).check_joint()
    with pytest.raises(InputError, match="joint.*weights"):
        Job(*digits("model.weights=w.safetensors")).check_joint()
