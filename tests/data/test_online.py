import numpy as np
import pytest

from metadist.config import load_config
from metadist.core.task import Task, TaskId
from metadist.data.online import Stream
from metadist.run.api import train
from metadist.run.build import Job


class Numbered:
    """Task t holds the rows t*100, t*100 + 1, ...: 3 classes of 4, or values."""

    def __init__(self, classes: bool):
        self.classes = classes
        self.outputs = 3 if classes else 1

    def __call__(self, task_id: TaskId) -> Task:
        rows = task_id.step * 100 + np.arange(12)
        labels = np.arange(12) % 3 if self.classes else rows / 7.0
        return Task.of(rows[:6, None], labels[:6], rows[6:, None], labels[6:])


@pytest.mark.parametrize("classes", [True, False])
def test_a_round_draws_from_what_has_arrived_with_equal_chances(classes):
    stream = Stream(Numbered(classes), Numbered(classes), 10, seed=0)
    for number in (0, 3):
        seen = [stream(TaskId("train", 10 * number + 4, i)).support.inputs[0][0, 0] // 100 for i in range(400)]
        counts = np.bincount(seen, minlength=number + 1)
        assert len(counts) == number + 1
        assert ((counts - 400 / (number + 1)) ** 2 / (400 / (number + 1))).sum() < 16.3  # chi square, 3 degrees, 0.1 %


@pytest.mark.parametrize("classes", [True, False])
def test_each_draw_divides_a_task_anew_and_keeps_rows_with_their_targets(classes):
    stream = Stream(Numbered(classes), Numbered(classes), 10, seed=0)
    divisions = set()
    for index in range(20):
        support, query = stream(TaskId("train", 0, index))
        rows = np.concatenate([support.inputs[0], query.inputs[0]])[:, 0]
        assert sorted(rows) == list(range(12)) and len(support.inputs[0]) == 6
        for part in (support, query):
            expected = part.inputs[0][:, 0] % 3 if classes else part.inputs[0][:, 0] / 7
            assert np.array_equal(part.targets[0], expected)
            if classes:
                assert np.bincount(part.targets[0]).tolist() == [2, 2, 2]
        divisions.add(tuple(sorted(support.inputs[0][:, 0])))
    assert len(divisions) > 15


def test_a_rounds_task_is_judged_under_a_name_of_its_own_and_others_are_the_sources():
    stream = Stream(Numbered(True), Numbered(True), 10, seed=0)
    assert stream(TaskId("validation", 5, 2)).support.inputs[0].min() // 100 == 4
    same, other = (stream(TaskId("validation", 5, i)).support.inputs[0] for i in (2, 3))
    assert not np.array_equal(same, other)
    assert stream(TaskId("test", 0, 0)).support.inputs[0][0, 0] == 0


JOB = [
    "data.family=sinusoid", "task.shots=5", "task.queries=5", "task.steps_per_round=3", "meta_batch_size=6",
    "model.hidden=[8]", "learner.inner_lr=0.01", "engine.chunk_size=2", "fleet.backend=local", "tracking.mlflow=false",
    "evaluation.every=0", "evaluation.tasks=4", "evaluation.test_tasks=4", "evaluation.baselines=[]",
    "evaluation.inner_steps=2",
]  # fmt: skip


def test_a_run_reports_each_round_and_its_regret_and_resumes_to_the_same(tmp_path):
    whole = train(load_config([], [*JOB, f"run_dir={tmp_path / 'whole'}", "meta_steps=8"]))
    online = whole["online"]
    assert len(online["losses"]) == len(online["in_hindsight"]) == 3
    assert online["regret"] == pytest.approx(sum(online["losses"]) - sum(online["in_hindsight"]))
    parts = [*JOB, f"run_dir={tmp_path / 'parts'}"]
    for steps in (2, 6, 8):
        told = train(load_config([], [*parts, f"meta_steps={steps}", f"num_workers={steps}"]), resume="auto")
    assert told["theta_sha256"] == whole["theta_sha256"]
    assert told["online"] == online


def test_a_job_makes_a_stream_of_any_source():
    assert isinstance(Job(load_config([], JOB)).source, Stream)


def test_a_round_is_judged_on_the_task_it_trains_on_whatever_evaluation_asks_for():
    train_source = Job(load_config([], JOB)).source
    later = Job(load_config([], [*JOB, "evaluation.shots=2", "evaluation.queries=3"])).evaluation_source
    judged, trained = later(TaskId("validation", 1, 0)), train_source(TaskId("train", 0, 0))
    rows = [np.sort(np.concatenate([part.inputs[0] for part in task]).ravel()) for task in (judged, trained)]
    assert np.array_equal(*rows)
    assert len(later(TaskId("test", 0, 0)).support.inputs[0]) == 2
