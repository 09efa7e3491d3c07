import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import metadist
from metadist.config import load_config
from metadist.core.task import Examples, TaskId
from metadist.data import importers
from metadist.run.api import train
from metadist.run.build import Job


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on the digits, and a task it has not seen."""
    folder = tmp_path_factory.mktemp("fewshot")
    config = load_config(
        [],
        ["data.family=digits", "task.ways=3", "task.shots=5", "task.queries=5", "model.name=mlp", "meta_steps=30",
         "learner.inner_lr=0.1", "evaluation.every=15", "evaluation.tasks=10", "evaluation.test_tasks=10",
         "evaluation.baseline_tasks=0", "evaluation.inner_steps=5", "fleet.backend=local", "tracking.mlflow=false",
         f"run_dir={folder / 'run'}"],
    )  # fmt: skip
    train(config, quiet=True)
    source = Job(config).source
    return folder / "run", [source(TaskId("test", 0, index)) for index in range(20)]


def test_a_loaded_run_classifies_new_tasks(run):
    folder, tasks = run
    learner = metadist.load(folder)
    right = []
    for task in tasks:
        adapted = learner.adapt(task.support.inputs[0], task.support.targets[0])
        predicted = adapted.predict(task.query.inputs[0])
        assert predicted.shape == (15,)
        assert adapted.outputs(task.query.inputs[0]).shape == (15, 3)
        right.append(predicted == task.query.targets[0])
    assert np.mean(right) > 0.5


def test_one_example_alone_is_predicted_with_the_support_set(run):
    folder, (task, *_) = run
    adapted = metadist.load(folder).adapt(task.support.inputs[0], task.support.targets[0])
    together = adapted.outputs(task.query.inputs[0], transductive=False)
    alone = adapted.outputs(task.query.inputs[0][:1], transductive=False)
    assert np.allclose(together[:1], alone, atol=1e-5)


def test_tensors_and_lists_are_taken_too(run):
    folder, (task, *_) = run
    learner = metadist.load(folder)
    labels = task.support.targets[0]
    one = learner.adapt(torch.from_numpy(task.support.inputs[0]), labels.tolist())
    other = learner.adapt(task.support.inputs[0], labels)
    assert np.array_equal(one.outputs(task.query.inputs[0]), other.outputs(task.query.inputs[0]))


def test_wrong_shapes_and_labels_are_told(run):
    folder, (task, *_) = run
    learner = metadist.load(folder)
    with pytest.raises(metadist.InputError, match=r"\[n, 1, 8, 8\]"):
        learner.adapt(np.zeros((3, 8, 8), np.float32), [0, 1, 2])
    for labels in (task.support.targets[0] + 0.5, np.full(15, np.nan), task.support.targets[0][:, None], [None] * 15):
        with pytest.raises(metadist.InputError, match=r"labels .*\[n\]"):
            learner.adapt(task.support.inputs[0], labels)
    for lacking, said in ((None, "None"), (np.nan, "NaN"), (float("nan"), "NaN"), (pd.NA, "<NA>"), (pd.NaT, "NaT")):
        for labels in (["a", "b", lacking] * 5, pd.Series(["a", "b", lacking] * 5, dtype=object)):
            with pytest.raises(metadist.InputError, match=f"^label 3 is {said}: "):
                learner.adapt(task.support.inputs[0], labels)
    with pytest.raises(metadist.InputError, match="15 .*labels.* 3 outputs"):
        learner.adapt(task.support.inputs[0], range(15))


def test_labels_of_any_kind_come_back_in_predictions(run):
    """As names or numbers sort: the same classes in the same order, so the same bits as with 0, 1, 2."""
    folder, (task, *_) = run
    learner = metadist.load(folder)
    numbers, query = task.support.targets[0], task.query.inputs[0]
    plain = learner.adapt(task.support.inputs[0], numbers)
    for names in (["ape", "bee", "cat"], [-100, 7, 255], [0, 2, 9], [0.0, 1.0, 2.0], ["\u00e4", "\u0416", "\u8c93"]):
        names = np.array(names)
        for labels in (names[numbers], names[numbers].tolist()):
            named = learner.adapt(task.support.inputs[0], labels)
            assert np.array_equal(named.predict(query), names[plain.predict(query)])
            assert np.array_equal(named.outputs(query), plain.outputs(query))
            assert named.classes is not None and named.classes.tolist() == names.tolist()
    objects = np.array(["ape", "bee", "cat"], object)[numbers]
    assert set(learner.adapt(task.support.inputs[0], objects).predict(query)) <= {"ape", "bee", "cat"}


def test_labels_that_number_the_outputs_stand_for_these(run):
    """In a model whose labels mean the same in every task, 2 is its third output, also where no example is 1."""
    learner = metadist.load(run[0])
    draws = np.random.default_rng(0)
    x, query = draws.random((8, 1, 8, 8)), draws.random((5, 1, 8, 8))
    labels = np.array([0, 2] * 4)
    adapted = learner.adapt(x, labels)
    whole = learner.engine.adapt(learner.theta, Examples((x.astype(np.float32),), (labels,)))
    expected = whole(query.astype(np.float32)).numpy()
    assert np.array_equal(adapted.outputs(query), expected[:, [0, 2]])
    assert adapted.classes.tolist() == [0, 2] and set(adapted.predict(query)) <= {0, 2}


@pytest.mark.filterwarnings("ignore:images brighter than any:UserWarning")
def test_a_class_that_the_task_does_not_have_is_never_predicted(run):
    """Support sets of two of three classes, one of them taken as far from the data as it goes."""
    folder, tasks = run
    learner = metadist.load(folder)
    for task in tasks:
        kept = task.support.targets[0] != 1
        adapted = learner.adapt(task.support.inputs[0][kept], task.support.targets[0][kept])
        for query in (task.query.inputs[0], np.full((4, 1, 8, 8), 50, np.float32), -task.query.inputs[0]):
            assert set(adapted.predict(query)) <= {0, 2}
            assert adapted.outputs(query).shape == (len(query), 2)


def test_best_latest_and_a_directory_can_be_loaded(run):
    folder, _ = run
    latest = metadist.load(folder, "latest")
    (last,) = sorted((folder / "checkpoints").glob("step_*"))[-1:]
    assert torch.equal(latest.theta, metadist.load(last).theta)
    metadist.load(folder, "best")


def test_what_is_not_a_run_is_told(tmp_path):
    with pytest.raises(metadist.InputError, match="is not a run directory"):
        metadist.load(tmp_path)


def test_a_name_of_a_run_beside_is_told(tmp_path, monkeypatch):
    (tmp_path / "runs" / "birds").mkdir(parents=True)
    (tmp_path / "runs" / "birds" / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(metadist.InputError, match="did you mean runs/birds"):
        metadist.load("birds")
    with pytest.raises(metadist.InputError, match="no config.yaml$"):
        metadist.load("fish")


def test_a_model_of_a_standardized_table_takes_and_gives_raw_units(tmp_path):
    """y = 1000 + slope of the group * x, x in the thousands: predictions must come out near such values."""
    rng = np.random.default_rng(0)
    groups, x = np.repeat(np.arange(60), 30), rng.normal(5000, 1000, (1800, 2))
    y = 1000 + rng.uniform(1, 2, 60)[groups] * (x[:, 0] - 5000) + 0.0 * x[:, 1]
    pq.write_table(pa.table({"g": groups, "a": x[:, 0], "b": x[:, 1], "y": y}), tmp_path / "raw.parquet")
    importers.table(tmp_path / "raw.parquet", tmp_path / "data", group="g", inputs=["x=a,b"], targets=["y"],
                    standardize=True)  # fmt: skip
    job = [f"data.path={tmp_path / 'data'}", "task.shots=10", "task.queries=10", "model.hidden=[16]", "meta_steps=150",
           "learner.inner_lr=0.1", "learner.inner_steps=2", "meta_lr=0.01", "evaluation.every=0", "fleet.backend=local",
           "evaluation.test_tasks=5", "evaluation.baselines=[]", "tracking.mlflow=false", 
           f"run_dir={tmp_path / 'run'}"]  # fmt: skip
    assert train(load_config([], job), quiet=True)["protocol"]["target_unit"] == "as standardized"
    new = rng.normal(5000, 1000, (40, 2))
    truth = 1000 + 1.5 * (new[:, 0] - 5000)
    predicted = metadist.load(tmp_path / "run").adapt(new[:20], truth[:20]).predict(new[20:])
    assert np.mean((predicted[:, 0] - truth[20:]) ** 2) < 0.3 * np.var(truth)


def test_images_may_be_bytes_or_fractions(run):
    folder, (task, *_) = run
    learner = metadist.load(folder)
    images = task.support.inputs[0]
    stored = np.round(images * 16).astype(np.uint8)
    labels = task.support.targets[0]
    one, other = (learner.adapt(x, labels).outputs(x) for x in (images, stored))
    assert np.allclose(one, other, atol=1e-6)
