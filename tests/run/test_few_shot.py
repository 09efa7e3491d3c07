"""A trained learner with other settings, adapted, saved and loaded."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

import metadist
from metadist.checkpoint.format import encode, load_checkpoint

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
