import math

import numpy as np
import pytest

from metadist.config import load_config
from metadist.core.messages import Chunk, ChunkReport
from metadist.run.api import train
from metadist.run.build import Job
from metadist.run.prepare import prepare
from metadist.run.watch import Watch

SINUSOID = [
    "data.family=sinusoid", "data.options={groups: [60, 5, 5], points: 30}", "task.shots=10", "task.queries=5",
    "model.name=mlp", "meta_batch_size=8", "fleet.backend=local",
]  # fmt: skip
DIGITS = ["data.family=digits", "task.ways=3", "task.queries=2", "model.name=mlp", "fleet.backend=local"]


class Listener:
    def __init__(self, settings: list[str]):
        self.prepared = prepare(Job(load_config([], settings)), ["test"])
        self.said: dict[str, str] = {}
        self.watch = Watch(self.said.setdefault, self.prepared)


@pytest.fixture(scope="module")
def values() -> Listener:
    return Listener(SINUSOID)


@pytest.fixture(scope="module")
def classes() -> Listener:
    return Listener(DIGITS)


@pytest.fixture(autouse=True)
def afresh(values, classes):
    for each in (values, classes):
        each.said.clear()
        each.watch = Watch(each.said.setdefault, each.prepared)


@pytest.mark.parametrize(("loss", "speaks"), [(10 * math.log(3) - 0.01, False), (10 * math.log(3) + 0.01, True)])
def test_a_first_cross_entropy_is_absurd_from_ten_times_even_chances(classes, loss, speaks):
    classes.watch.first_loss(loss)
    assert ("first loss" in classes.said) == speaks


def test_a_first_squared_error_is_absurd_from_ten_times_that_of_the_support_mean(values):
    errors = [np.mean((task.query.targets[0] - task.support.targets[0].mean()) ** 2) for task in values.prepared.chunk]
    values.watch.first_loss(9.9 * float(np.mean(errors)))
    assert not values.said
    values.watch.first_loss(10.1 * float(np.mean(errors)))
    assert values.said["first loss"].endswith("make it explode; lower learner.inner_lr")  # sinusoids are as they are


def accuracies(mean: float) -> dict[str, np.ndarray]:
    """Of 100 tasks before and after one step, which differ by 0.2: the interval is 0.04."""
    after = mean + 0.2 * np.tile([1.0, -1.0], 50)
    return {"accuracy": np.stack([np.full(100, 0.9), after], axis=1)}


def test_validation_at_chance_is_said_at_the_third_in_a_row(classes):
    for number, mean in enumerate([0.36, 0.36, 0.40, 0.36, 0.36, 0.36]):
        assert not classes.said
        classes.watch.validation(accuracies(mean), done=number)
    assert "chance" in classes.said["trivial"] and "up to step 5" in classes.said["trivial"]
    assert classes.watch.baselines == ()


def test_nothing_is_told_to_change_that_a_closed_form_or_pictures_do_not_have():
    """A pixel is scaled as it is read, a class has no target, class means have no inner rate."""
    closed = Listener([*DIGITS, "learner.name=protonet"])
    for _ in range(3):
        closed.watch.validation(accuracies(0.33), done=1)
        closed.watch.tasks(reports(ONE, loss=1.0), done=8)
    closed.watch.first_loss(99.0)
    assert closed.said.keys() == {"trivial", "dominant", "first loss"}
    for text in closed.said.values():
        assert "inner_lr" not in text and "standardize" not in text and "target" not in text
    assert "change meta_lr by a factor of ten, and see whether labels" in closed.said["trivial"]


def test_validation_of_values_is_compared_with_the_support_mean_which_is_measured_once(values):
    assert values.watch.baselines == ("support_mean",)
    better, worse = {"loss": np.full((4, 2), 1.9)}, {"loss": np.full((4, 2), 2.0)}
    values.watch.validation(better | {"support_mean/loss": np.full(4, 2.0)}, done=1)
    assert values.watch.baselines == ()
    for done in (2, 3, 4):
        assert not values.said
        values.watch.validation(worse, done)
    assert "support mean" in values.said["trivial"]


def reports(norms: list[float], loss: float) -> list[ChunkReport]:
    """Of two chunks, the later first, as they may come in."""
    chunks = [Chunk("train", 7, 4, len(norms)), Chunk("train", 7, 0, 4)]
    return [ChunkReport(c, np.full(c.stop - c.start, loss), np.array(norms[c.start : c.stop]), {}) for c in chunks]


ONE = [1.0] * 5 + [7.1, 1.0, 1.0]


def test_a_task_with_more_than_half_of_all_gradient_is_named_at_the_third_step_in_a_row(classes):
    even, one = reports([1.0] * 8, loss=1.0), reports(ONE, loss=1.0)
    for found in (one, one, even, one, one):
        classes.watch.tasks(found, done=8)
    assert not classes.said
    classes.watch.tasks(one, done=8)
    assert "one task, train:7:5, has 50%" in classes.said["dominant"]
    assert "replay" not in classes.said["dominant"] and "targets" not in classes.said["dominant"]
    assert classes.said["dominant"].endswith("lower learner.inner_lr, or set a larger meta_batch_size")


def test_one_task_that_is_not_solved_where_the_others_are_is_no_fault(classes):
    """A tenth of what even chances of three classes have is 0.11."""
    for loss, speaks in ((0.1 * math.log(3) - 0.001, False), (0.1 * math.log(3) + 0.001, True)):
        for _ in range(3):
            classes.watch.tasks(reports(ONE, loss), done=8)
        assert ("dominant" in classes.said) == speaks


def test_a_few_tasks_may_be_as_unlike_as_they_are(values):
    for _ in range(4):
        values.watch.tasks(reports([1.0] * 6 + [50.0], loss=9.0), done=8)
    assert not values.said


def test_a_run_says_it_once(tmp_path, capfd):
    """By an inner rate that is too large the first loss explodes, and validation stays bad."""
    job = [
        *SINUSOID, "meta_steps=4", "meta_lr=1e-6", "learner.inner_lr=0.5", "learner.inner_steps=2",
        "evaluation.every=1", "evaluation.tasks=4", "evaluation.test_tasks=2", "evaluation.baselines=[]",
        "tracking.mlflow=false",
    ]  # fmt: skip
    train(load_config([], [*job, f"run_dir={tmp_path / 'run'}"]), quiet=True)
    said = capfd.readouterr().err
    assert said.count("the first loss is") == said.count("validation is no better than") == 1
