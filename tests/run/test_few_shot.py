"""A trained learner with other settings, adapted, saved and loaded."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file

import metadist
from metadist.checkpoint.format import encode, load_checkpoint
from metadist.data import Preprocessing, Shapes, importers
from metadist.run.inputs import Inputs

pytestmark = pytest.mark.filterwarnings("ignore:pictures stretched:UserWarning", "ignore:texts cut:UserWarning")


@pytest.fixture(scope="module")
def birds(raw_runs):
    """Paths of two classes, their names, and paths to ask about."""
    folders = sorted(raw_runs.pictures.iterdir())[:2]
    paths = [folder / f"{number}.png" for folder in folders for number in range(3)]
    return paths, [path.parent.name for path in paths], [folder / "5.png" for folder in folders for _ in range(2)]


@pytest.mark.parametrize("learner", ["maml", "protonet", "r2d2", "protomaml", "maml++"])
def test_an_adapted_learner_is_saved_and_loaded_to_the_bit(raw_runs, birds, tmp_path, learner):
    """Also where its head is sized by the task: three classes, where training had two."""
    paths, names, asked = birds
    loaded = metadist.load(raw_runs.run("pictures", learner))
    if loaded.engine.learner.any_ways:
        names = [*names[:-1], "another"]
    adapted = loaded.adapt(paths, names)
    adapted.save(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"weights.safetensors", "config.yaml", "meta.json"}
    again = metadist.load_adapted(tmp_path / "saved")
    assert again.classes is not None and again.classes.tolist() == sorted(set(names))
    for transductive in (None, True, False):
        assert np.array_equal(again.outputs(asked, transductive), adapted.outputs(asked, transductive))
    assert again.predict(asked[0]) == adapted.predict(asked[0])
    assert learner in repr(again) and names[0] in repr(again) and "pictures" in repr(again)


def test_values_texts_and_other_settings_are_saved_too(raw_runs, tmp_path):
    frame = pd.read_parquet(raw_runs.table)[:20]
    learner = metadist.load(raw_runs.run("values"), trust_code=True)
    adapted = learner.adapt(frame[:10], frame.price[:10], inner_steps=3, inner_lr=0.02)
    adapted.save(tmp_path / "values")
    with pytest.raises(metadist.InputError, match="raw_net"):
        metadist.load_adapted(tmp_path / "values")
    again = metadist.load_adapted(tmp_path / "values", trust_code=True)
    assert again.classes is None and again.learner.settings == {"inner_steps": 3, "inner_lr": 0.02}
    assert np.array_equal(again.predict(frame[10:]), adapted.predict(frame[10:]))
    with pytest.raises(metadist.InputError, match="no probabilities"):
        again.predict_proba(frame)
    other = metadist.load(raw_runs.run("values"), trust_code=True, inner_steps=3, inner_lr=0.02)
    other.adapt(frame[:10], frame.price[:10]).save(tmp_path / "other")
    again = metadist.load_adapted(tmp_path / "other", trust_code=True)
    assert np.array_equal(again.predict(frame[10:]), adapted.predict(frame[10:]))
    texts = metadist.load(raw_runs.run("texts")).adapt(["pay me", "open it", "pay"], [7, -1, 7])
    texts.save(tmp_path / "texts")
    again = metadist.load_adapted(tmp_path / "texts")
    assert again.predict("pay again") in (7, -1) and again.classes is not None and again.classes.dtype == np.int64
    assert np.array_equal(again.predict_proba(["pay", "sing"]), texts.predict_proba(["pay", "sing"]))


def test_settings_of_one_adaptation_are_those_of_a_learner_loaded_with_them(raw_runs, birds):
    paths, names, asked = birds
    learner = metadist.load(raw_runs.run("pictures"))
    plain = learner.adapt(paths, names).outputs(asked)
    changed = learner.adapt(paths, names, inner_steps=4, inner_lr=0.03).outputs(asked)
    other = metadist.load(raw_runs.run("pictures"), inner_steps=4, inner_lr=0.03)
    assert np.array_equal(changed, other.adapt(paths, names).outputs(asked)) and not np.array_equal(changed, plain)
    assert np.array_equal(learner.adapt(paths, names).outputs(asked), plain)
    for name, kind, wrong in (("maml", "pictures", {"inner_lr": -1.0}), ("maml", "pictures", {"inner_steps": -1}),
                              ("protonet", "pictures", {"inner_steps": 3}), ("r2d2", "pictures", {"inner_lr": 0.1}),
                              ("maml++", "pictures", {"inner_lr": 0.1})):  # fmt: skip
        with pytest.raises(metadist.InputError, match=next(iter(wrong))):
            metadist.load(raw_runs.run(kind, name)).adapt(paths, names, **wrong)


def test_probabilities_are_shares_of_the_classes(raw_runs, birds):
    paths, names, asked = birds
    adapted = metadist.load(raw_runs.run("pictures")).adapt(paths, names)
    shares, outputs = adapted.predict_proba(asked), adapted.outputs(asked).astype(np.float64)
    assert shares.shape == (4, 2) and np.allclose(shares, np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True))
    assert adapted.predict_proba(asked[0]).shape == (2,)
    assert adapted.predict(asked).tolist() == adapted.classes[shares.argmax(axis=1)].tolist()


def test_a_support_set_of_one_class_is_told(raw_runs, birds):
    paths, _, asked = birds
    with pytest.warns(UserWarning, match=r"one class \(wren\)"):
        adapted = metadist.load(raw_runs.run("pictures")).adapt(paths[0], "wren")
    assert adapted.predict(asked).tolist() == ["wren"] * 4


def test_a_run_needs_neither_its_data_nor_its_place(raw_runs, birds, tmp_path):
    """A copied run directory, and one checkpoint of it, without the dataset."""
    paths, names, asked = birds
    run, texts = raw_runs.run("pictures"), raw_runs.run("texts")
    expected = metadist.load(run).adapt(paths, names).outputs(asked)
    moved = shutil.copytree(run, tmp_path / "moved")
    (moved / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(raw_runs.folder), "/gone"))
    assert np.array_equal(metadist.load(moved).adapt(paths, names).outputs(asked), expected)
    (checkpoint,) = (moved / "checkpoints").glob("step_*2")
    assert np.array_equal(metadist.load(checkpoint).adapt(paths, names).outputs(asked), expected)
    (checkpoint,) = (texts / "checkpoints").glob("step_*2")
    copied = shutil.copytree(checkpoint, tmp_path / "one")
    assert metadist.load(copied).adapt(["pay", "open"], ["a", "b"]).predict("pay") in ("a", "b")


def test_what_is_no_adapted_learner_or_a_strangers_is_told(raw_runs, birds, tmp_path):
    paths, names, _ = birds
    run = raw_runs.run("pictures")
    (checkpoint,) = (run / "checkpoints").glob("step_*2")
    for place in (run, tmp_path, checkpoint):
        with pytest.raises(metadist.InputError, match="no adapted learner"):
            metadist.load_adapted(place)
    adapted = metadist.load(run).adapt(paths, names)
    adapted.save(tmp_path / "saved")
    for place, said in ((tmp_path / "saved", "not empty"), ("s3://bucket/x", "no folder"),
                        (tmp_path / "saved" / "meta.json" / "x", "cannot be written")):  # fmt: skip
        with pytest.raises(metadist.InputError, match=said):
            adapted.save(place)
    saved = load_checkpoint(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "meta.json").read_text())["run"]["adapted"]["learner"] == "maml"
    assert load_file(tmp_path / "saved" / "weights.safetensors")["support/input_0"].shape == (6, 3, 12, 12)
    about = saved.run["adapted"]
    wrong = [
        {"weights": {**saved.weights, "support/input_0": np.zeros((6, 3, 5, 5), np.float32)}},
        {"weights": {**saved.weights, "support/target_0": np.full(6, 5)}},
        {"weights": {name: array for name, array in saved.weights.items() if name != "support/target_0"}},
        {"run": {**saved.run, "adapted": {**about, "classes": ["bird0", "bird0"]}}},
        {"run": {**saved.run, "adapted": {**about, "dtype": "V9"}}},
        {"run": {**saved.run, "adapted": {**about, "evaluation": {"inner_steps": "os:system"}}}},
        {"run": {**saved.run, "preprocessing": {"pictures": {"size": [9, 9], "mode": "P"}}}},
        {"run": {**saved.run, "preprocessing": {"inputs": ["a", "b"]}}},
        {"run": {**saved.run, "preprocessing": {"pictures": {"size": [10**6, 10**6], "mode": "RGB"}}}},
        {"run": {**saved.run, "preprocessing": {"texts": {"column": "text", "length": 10**9}}}},
    ]  # fmt: skip
    for number, changes in enumerate(wrong):
        place = tmp_path / f"wrong{number}"
        place.mkdir()
        for name, content in encode(replace(saved, **changes)).items():
            (place / name).write_bytes(content)
        with pytest.raises(metadist.InputError):
            metadist.load_adapted(place)
    for name, content in encode(
        replace(saved, run={**saved.run, "adapted": {**about, "dtype": "<U500000000"}})
    ).items():
        (tmp_path / "saved" / name).write_bytes(content)
    assert metadist.load_adapted(tmp_path / "saved").classes.nbytes < 1000  # of names of five letters


def test_a_run_at_a_uri_takes_texts_too(raw_runs, s3):
    """Everything that it takes to read them is at the URI."""
    place = s3("runs/texts")
    raw_runs.run("texts", "protonet", f"run_dir={place}")
    adapted = metadist.load(place).adapt(["pay me", "open it"], ["a", "b"])
    assert adapted.predict("pay me now") in ("a", "b")
    assert adapted.learner.inputs.about == metadist.load(raw_runs.run("texts")).inputs.about


LABELS = {  # how a table has them, and other ways to call them
    "numbers": ([0, 1, 2], [["0", "1", "2"]]),
    "years": ([-1, 5, 10], [["-1", "5", "10"], [-1.0, 5.0, 10.0]]),
    "names": (["low", "middle", "top"], [[0, 1, 2]]),
    "truth": ([False, True], [["False", "True"], ["false", "true"], ["0", "1"], [0, 1]]),
}


@pytest.fixture(scope="module")
def run_of_labels(tmp_path_factory):
    """By name of `LABELS` a run whose labels mean the same in every task, and examples of all labels in their order."""
    folder, made = tmp_path_factory.mktemp("labels"), {}

    def make(name):
        if name not in made:
            labels, rng = LABELS[name][0], np.random.default_rng(0)
            each = [label for label in labels for _ in range(6)]
            frame = pd.DataFrame({"user": np.repeat(np.arange(10), len(each)), "y": each * 10})
            frame["x"] = np.tile(np.repeat(np.arange(len(labels)), 6), 10) + rng.normal(0, 0.1, len(frame))
            frame.to_parquet(folder / f"{name}.parquet")
            importers.table(folder / f"{name}.parquet", folder / name, group="user", inputs=["x=x"], targets=["y"])
            job = [
                f"data.path={folder / name}", f"task.ways={len(labels)}", "task.shots=2", "task.queries=2", "seed=1",
                "task.permute_labels=false", "model.name=mlp", "model.hidden=[8]", "meta_steps=3", "meta_batch_size=2",
                "evaluation.test_tasks=2", "evaluation.every=0", "evaluation.baselines=[]", "fleet.backend=local",
                "tracking.mlflow=false", f"run_dir={folder / 'runs' / name}",
            ]  # fmt: skip
            metadist.train(metadist.load_config([], job), quiet=True)
            made[name] = folder / "runs" / name, frame[frame.user == 0]
        return made[name]

    return make


@pytest.mark.parametrize("name", list(LABELS))
def test_a_label_that_means_the_same_in_every_task_keeps_its_output_whatever_the_support_set_has(run_of_labels, name):
    """As in training: output k is the k-th label. Compared with the model itself, called without adaptation."""
    (run, rows), (labels, others) = run_of_labels(name), LABELS[name]
    learner = metadist.load(run, inner_steps=0)
    named = learner.engine.layout.unflatten(learner.theta)
    expected = learner.engine.learner.model(named, torch.tensor(rows[["x"]].to_numpy(np.float32))).numpy()
    for called in [labels, *others]:
        outputs = dict(zip(called, expected.T, strict=True))
        for known in (called, called[1:], called[:1], called[::-1]):
            adapted = learner.adapt(rows[: len(known)], np.array(known))
            assert adapted.classes is not None and adapted.classes.tolist() == sorted(called)
            assert np.allclose(adapted.outputs(rows), np.stack([outputs[each] for each in sorted(called)], 1))
            best = [called[place] for place in expected.argmax(1)]
            assert adapted.predict(rows).tolist() == best


@pytest.mark.parametrize("name", list(LABELS))
def test_adapting_to_some_labels_moves_their_outputs_and_is_saved(run_of_labels, tmp_path, name):
    (run, rows), (labels, others) = run_of_labels(name), LABELS[name]
    last = rows[rows.y == labels[-1]]
    learner = metadist.load(run, inner_steps=20, inner_lr=1.0)
    for number, called in enumerate([labels, *others]):
        adapted = learner.adapt(last, np.array([called[-1]] * len(last)))
        assert adapted.predict(last).tolist() == [called[-1]] * len(last)
        adapted.save(tmp_path / str(number))
        again = metadist.load_adapted(tmp_path / str(number))
        assert np.array_equal(again.outputs(rows), adapted.outputs(rows))
        assert again.predict(rows).tolist() == adapted.predict(rows).tolist()


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("numbers", [1, 3], "3 is no label of this run, in which a label means the same in every task: give 0, 1, 2"),
        ("numbers", ["click", "skip"], "'click', 'skip' is no label"),
        ("years", [0, 1], "0, 1 is no label of this run, in which a label means the same in every task: give -1, 5"),
        ("names", ["low", "lower"], "'lower' is no label"),
        ("names", [0, 3], "3 is no label"),
        ("truth", ["yes", "no"], "'no', 'yes' is no label"),
        ("truth", ["true", "no"], "'no', 'true' is no label"),
    ],
)
def test_a_label_that_no_task_had_is_refused_where_labels_mean_the_same_in_all(run_of_labels, name, given, said):
    run, rows = run_of_labels(name)
    with pytest.raises(metadist.InputError) as raised:
        metadist.load(run).adapt(rows[: len(given)], given)
    assert said in str(raised.value)


@pytest.mark.parametrize("labels", [["0", "1"], ["0", "1", "1"], ["0", "1", "2", "3"]])
def test_labels_that_are_not_those_of_the_outputs_are_damage(labels):
    with pytest.raises(metadist.InputError, match="labels does not fit its model's: it is damaged"):
        Inputs(Shapes([[2]], False, None, 3, True, labels=labels), Preprocessing())
