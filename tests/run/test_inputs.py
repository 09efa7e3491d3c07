"""What is given to a loaded run becomes what the import would have stored, to the bit."""

import json
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image

import metadist
from metadist.core.task import Examples
from metadist.data import Preprocessing, Shapes, importers, open_dataset
from metadist.data.importers.pictures import PictureForm
from metadist.data.notes import Notes, sentence
from metadist.data.preprocessing import PicturePreprocessor
from metadist.data.raw_files import read_examples
from metadist.run.inputs import Inputs

pytestmark = pytest.mark.filterwarnings(
    "ignore:pictures stretched:UserWarning", "ignore:texts cut:UserWarning", "ignore:grey pictures of more:UserWarning"
)


def bird(raw_runs, name, number):
    return raw_runs.pictures / name / f"{number}.png"


def through_the_dataset(learner, table, support, query, targets):
    """Outputs for rows of a dataset, gathered as training does; `targets` [n] of the support set."""
    examples = Examples(table.gather(support).inputs, (targets,))
    predict = learner.engine.adapt(learner.theta, examples)
    return predict(*table.gather(query).inputs, transductive=learner.transductive).numpy()


@pytest.mark.parametrize("name", ["pictures", "grey"])
def test_picture_files_are_what_their_import_was_to_the_bit(raw_runs, name):
    learner, table = metadist.load(raw_runs.run(name)), raw_runs.test_split(name)
    first, second = table.group_names[:2]
    paths = [bird(raw_runs, each, number) for each in (first, second) for number in range(3)]
    query = [bird(raw_runs, first, 4), bird(raw_runs, second, 5)]
    support_rows = np.concatenate([table.starts[k] + np.arange(3) for k in range(2)])
    query_rows = table.starts[:2] + np.array([4, 5])
    labels = [first] * 3 + [second] * 3
    adapted = learner.adapt(paths, labels)
    expected = through_the_dataset(learner, table, support_rows, query_rows, np.array([0, 0, 0, 1, 1, 1]))
    assert np.array_equal(adapted.outputs(query), expected)
    opened = learner.adapt([Image.open(path) for path in paths], labels)
    assert np.array_equal(opened.outputs([Image.open(path) for path in map(str, query)]), expected)
    stored = learner.adapt(table.column("image")[support_rows], labels)
    assert np.array_equal(stored.outputs(table.column("image")[query_rows]), expected)
    assert adapted.predict(str(query[0])) in (first, second)
    assert np.array_equal(adapted.outputs(Image.open(query[0])), adapted.outputs(query[:1])[0])


def test_deep_grey_pictures_take_the_scale_that_the_import_measured(raw_runs):
    """bird7 has 12 bits in 16: only the measured depth of all pictures tells."""
    learner = metadist.load(raw_runs.run("grey"))
    splits = open_dataset(raw_runs.dataset("grey")).splits.values()
    (table,) = [table for table in splits if "bird7" in table.group_names]
    (found,), _ = learner.inputs([bird(raw_runs, "bird7", number) for number in range(6)])
    start = table.starts[table.group_names.index("bird7")]
    assert np.array_equal(found, table.gather(start + np.arange(6)).inputs[0])
    assert learner.inputs.about.pictures and learner.inputs.about.pictures.deep_bits == 12


@pytest.mark.parametrize(
    ("bits", "said"),
    [(12, "taken as 12 bits, as those of training were, and divided by 16"), (8, "training had none that use more")],
)
def test_the_scale_of_deep_pictures_is_said(bits, said):
    deep, notes = Image.fromarray(np.full((12, 12), 3000, np.uint16)), Notes()
    (pixels,) = PicturePreprocessor(PictureForm((12, 12), "L", deep_bits=bits))([deep, deep], notes)
    assert pixels.max() == min(255, 3000 >> (bits - 8))
    (note,) = map(sentence, notes.as_list())
    assert said in note and "scaled to 0..255: 2," in note and "picture 1" in note


def test_texts_are_what_their_import_was_to_the_bit(raw_runs):
    learner, table = metadist.load(raw_runs.run("texts")), raw_runs.test_split("texts")
    first, second = table.group_names[:2]
    rows = [json.loads(line) for line in raw_runs.texts.read_text().splitlines()]
    texts = {name: [row["text"] for row in rows if row["intent"] == name] for name in (first, second)}
    support = np.concatenate([table.starts[k] + np.arange(3) for k in range(2)])
    query = table.starts[0] + np.array([4, 5])
    adapted = learner.adapt(texts[first][:3] + texts[second][:3], [first] * 3 + [second] * 3)
    expected = through_the_dataset(learner, table, support, query, np.array([0, 0, 0, 1, 1, 1]))
    for asked in (texts[first][4:], pd.Series(texts[first][4:]), np.array(texts[first][4:]), tuple(texts[first][4:]),
                  pa.array(texts[first][4:]), table.gather(query).inputs,
                  dict(zip(("tokens", "tokens_mask"), table.gather(query).inputs, strict=True))):  # fmt: skip
        assert np.array_equal(adapted.outputs(asked), expected)
    assert np.array_equal(adapted.outputs(texts[first][4]), adapted.outputs(texts[first][4:5])[0])
    assert adapted.predict(texts[first][4]) in (first, second)


@pytest.mark.parametrize("name", ["labelled", "values"])
def test_rows_are_what_their_import_was_to_the_bit(raw_runs, name):
    """Standardized columns of several types, a list, and a column with gaps, in whatever holds them."""
    learner, table = metadist.load(raw_runs.run(name), trust_code=True), raw_runs.test_split(name)
    frame = pd.read_parquet(raw_runs.table)
    frame = frame[frame.user == int(table.group_names[0])]
    support, query = table.starts[0] + np.arange(12), table.starts[0] + np.arange(12, 20)
    if name == "values":
        targets, labels = table.gather(support).targets[0], frame.price[:12]
    else:
        targets, labels = (frame.clicked[:12] == "yes").to_numpy().astype(np.int64), frame.clicked[:12]
    adapted, asked = learner.adapt(frame[:12], labels), frame[12:]
    expected = through_the_dataset(learner, table, support, query, targets)
    if name == "values":
        (price,) = [field for field in table.fields if field.name == "price"]
        expected = expected.astype(np.float64) / price.scale + price.offset
    forms = {
        "frame": asked, "arrow": pa.Table.from_pandas(asked), "rows": asked.to_dict("records"),
        "columns": {column: asked[column].tolist() for column in asked},
        "arrays": {column: np.stack(asked[column].to_list()) for column in asked if column not in ("clicked", "user")},
    }  # fmt: skip
    for form in forms.values():
        assert np.array_equal(adapted.outputs(form), expected)
    one = adapted.outputs(forms["rows"][0])
    assert one.shape == expected.shape[1:] and np.array_equal(one, adapted.outputs(asked.iloc[0]))
    assert np.array_equal(one, adapted.outputs(asked[:1])[0])
    fields = dict(zip(learner.inputs.about.inputs, _in_the_datas_units(learner, forms["columns"]), strict=True))
    for form in (fields, tuple(fields.values()), {key: torch.from_numpy(value) for key, value in fields.items()}):
        assert np.array_equal(adapted.outputs(form), expected)


def test_identifiers_and_actions_are_given_as_they_are_in_the_table(tmp_path):
    """An item by its name, known or not, or by its number; targets of which one is an action, in whole numbers."""
    rng, n = np.random.default_rng(3), 240
    items = rng.choice(["007", "7", "08", "1e2"], n)
    frame = pd.DataFrame({"user": np.repeat(np.arange(12), 20), "age": rng.normal(size=n), "item": items})
    frame["shown"], frame["paid"] = rng.integers(0, 3, n), rng.normal(size=n)
    frame.to_parquet(tmp_path / "log.parquet")
    asked: dict[str, Any] = {
        "inputs": ["age", "item"],
        "identifiers": ["item"],
        "targets": ["shown", "paid"],
        "integers": ["shown"],
    }
    data = importers.table(tmp_path / "log.parquet", tmp_path / "data", group="user", **asked)
    settings = [
        f"data.path={data}", "task.shots=4", "task.queries=4", "meta_steps=2", "meta_batch_size=2",
        "model.outputs=3", "loss=tests.run.test_inputs:of_what_was_shown", "evaluation.test_tasks=2",
        "evaluation.every=0", "evaluation.baselines=[]", "fleet.backend=local", "tracking.mlflow=false",
        f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    with pytest.raises(metadist.InputError, match="whole numbers, such as an action, for a size"):
        metadist.train(metadist.load_config([], [s for s in settings if not s.startswith("loss=")]), quiet=True)
    metadist.train(metadist.load_config([], settings), quiet=True)
    learner = metadist.load(tmp_path / "run", trust_code=True)
    assert list(learner.shapes.vocabularies) == [None, 5]
    table = open_dataset(data).splits["test"]
    rows = table.starts[0] + np.arange(20)
    frame = frame[frame.user == int(table.group_names[0])]
    inputs, targets = table.gather(rows)
    predict = learner.engine.adapt(learner.theta, Examples(tuple(x[:8] for x in inputs), tuple(y[:8] for y in targets)))
    expected = predict(*(x[8:] for x in inputs), transductive=True).numpy()
    adapted = learner.adapt(frame[:8], (frame.shown[:8], frame.paid[:8]))
    assert adapted.outputs(frame[8:]).shape == (12, 3)  # of three arms, not of two targets
    assert np.array_equal(adapted.outputs(frame[8:]), expected)
    assert np.array_equal(adapted.outputs((frame.age[8:].to_numpy(), inputs[1][8:])), expected)
    frame[8:].to_csv(tmp_path / "asked.csv", index=False)
    read = read_examples([str(tmp_path / "asked.csv")], learner.inputs.about, None, True, Notes())
    assert np.array_equal(adapted.outputs(read.x), expected)  # in which 007 is not 7
    assert [y.dtype.kind for y in read.y] == ["i", "f"] and np.array_equal(read.y[0], frame.shown[8:])
    with pytest.warns(UserWarning, match="categories unknown"):
        new = adapted.outputs({"age": 0.5, "item": "gin"})
    assert np.array_equal(new, adapted.outputs((np.array(0.5), np.array(0))))
    with pytest.raises(metadist.InputError, match="identifier 5 was given, .* from 0 .unknown. to 4"):
        adapted.outputs((np.array([0.5]), np.array([5])))


def of_what_was_shown(outputs, shown, paid):
    return (outputs.gather(1, shown[:, None])[:, 0] - paid).square().mean()


def _in_the_datas_units(learner, columns):
    """The input fields as arrays, made by hand."""
    if "x" not in learner.inputs.about.inputs:
        return np.array(columns["age"]), np.array(columns["income"])
    cities = np.array([[city == name for name in ("Lima", "Oslo", "Rome", "")] for city in columns["city"]], float)
    x = np.column_stack([columns["age"], cities, columns["income"]])
    face = np.array(columns["face"])
    trips = np.array(columns["trips"], float)
    offset = learner.shapes.input_units[2]["offset"]
    return x, face, np.where(np.isnan(trips), offset, trips), ~np.isnan(trips)


def test_digits_may_be_drawn_dark_on_white(tmp_path):
    """A picture that is the negative of a stored digit, four times as large, is that digit."""
    path = importers.digits(tmp_path / "digits")
    dataset = open_dataset(path)
    stored = dataset.splits["test"].column("image")[:5]
    about = Preprocessing.parse({"inputs": ["image"], **dataset.metadata["extra"]["preprocessing"]})
    units = [{"dtype": "uint8", "offset": 0.0, "scale": 1 / 16}]
    inputs = Inputs(Shapes([[1, 8, 8]], False, None, 3, True, units), about)
    drawn = [Image.fromarray(255 - np.round(each[0] * (255 / 16)).astype(np.uint8)) for each in stored]
    (found,), _ = inputs(drawn)
    assert np.array_equal(found, stored.astype(np.float32) / 16)


def test_a_run_on_arrays_takes_its_inputs_by_name():
    about = Preprocessing.parse({"inputs": ["x", "extra"], "targets": ["y"]})
    inputs = Inputs(Shapes([[2], []], False, None, 1, False, targets=[[1]]), about)
    x, extra = np.arange(6.0).reshape(3, 2), np.arange(3.0)
    for given in ((x, extra), {"extra": extra, "x": x}, (x.tolist(), extra.tolist())):
        (one, other), single = inputs(given)
        assert not single and np.array_equal(one, x) and np.array_equal(other, extra) and one.dtype == np.float32
    (one, other), single = inputs({"x": x[0], "extra": 5.0})
    assert single and one.shape == (1, 2) and other.tolist() == [5.0]
    for y in ([1.0, 2.0, 3.0], np.ones((3, 1)), {"y": [1, 2, 3]}, (np.ones(3),)):
        assert inputs.targets(y, 3)[0].shape == (3, 1)
    for wrong, said in (({"x": x}, "'extra' is missing"), ({"a": x, "b": x}, "x, extra"), (x, r"x, extra"),
                        ((x, extra[:2]), "several lengths"), ((x, [1.0, np.nan, 2.0]), "no number")):  # fmt: skip
        with pytest.raises(metadist.InputError, match=said):
            inputs(wrong)
    with pytest.raises(metadist.InputError, match=r"\[2\]; 3 examples need \[3, 1\]"):
        inputs.targets([1.0, 2.0], 3)
    with pytest.raises(metadist.InputError, match="list of 3, first a text"):
        inputs.targets(["a", "b", "c"], 3)
    for values, said in (([1, 2, None], "target 3 is None"), ([[1.0], [pd.NA], [2.0]], "target 2 is <NA>"),
                         (np.array([None, 1, 2], object), "target 1 is None")):  # fmt: skip
        with pytest.raises(metadist.InputError, match=f"{said}: give a number"):
            inputs.targets(values, 3)


def test_what_is_no_input_of_the_run_is_told(raw_runs, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    pictures, texts = metadist.load(raw_runs.run("pictures")).inputs, metadist.load(raw_runs.run("texts")).inputs
    rows = metadist.load(raw_runs.run("labelled"), trust_code=True).inputs
    good = {"age": 1.0, "city": "Rome", "income": 2, "face": [1.0, 2.0, 3.0], "trips": None}
    assert rows(good)[1]
    for inputs, wrong, said in (
        (pictures, "gone.png", "gone.png was not found, and this run takes pictures"),
        (pictures, "what is my balance " * 40, "was not found, and this run takes pictures"),
        (pictures, str(tmp_path), "is a folder.*glob"),
        (pictures, ["gone.png", tmp_path / "broken.png"], "2 of 2 pictures.*gone.png.*broken.png"),
        (pictures, [np.zeros((12, 12)), "a.png"], "picture 1 is of type ndarray"),
        (pictures, np.zeros((2, 12, 12)), r"\[2, 12, 12\]; this run takes pictures.*\[n, 3, 12, 12\]"),
        (pictures, [], "no example"), (pictures, None, "NoneType.*takes pictures"),
        (pictures, np.full((3, 12, 12), 300), "whole numbers from 0 to 255"),
        (texts, Image.new("L", (9, 9)), "Image of shape|a Image was given; this run takes texts"),
        (texts, ["good", None], "text 2 is of type NoneType"), (texts, " ", "no word"),
        (texts, pd.DataFrame({"text": ["a"]}), "DataFrame.*takes texts"), (texts, 3, "takes texts"),
        (rows, "a text", "a text was given; this run takes rows with columns age, city, income, face, trips"),
        (rows, {**good, "age": [1]}, "several lengths|no one type|shape"),
        (rows, {"age": 1.0, "incom": 2, "city": "", "face": [1.0] * 3, "trips": 1.0}, "'income'.*did you mean incom?"),
        (rows, [good, {**good, "age": None}], "row 2 has no value for 'age'"),
        (rows, [{**good, "income": None}], "row 1 has no value for 'income'"),
        (rows, {**good, "income": np.inf}, "infinite"), (rows, {**good, "age": "old"}, "'age'.*'old'"),
        (rows, {**good, "face": [1.0]}, r"'face' has values of shape \[1\] and must have \[3\]"),
        (rows, {"age": [], "city": [], "income": [], "face": [], "trips": []}, "no rows|no example"),
    ):  # fmt: skip
        with pytest.raises(metadist.InputError, match=said) as raised:
            inputs(wrong)
        assert "\n" not in str(raised.value)


def test_what_is_lost_is_said_once_where_it_was_given(raw_runs):
    texts = metadist.load(raw_runs.run("texts")).inputs
    with pytest.warns(UserWarning) as said:
        texts(["ж ж", "pay " * 9, "жж"])
        texts("жжж")
    assert [str(each.message).partition(":")[0] for each in said] == [
        "texts that say nothing to the model",
        "texts cut",
    ]
    assert "'ж ж'" in str(said[0].message) and ": 2," in str(said[0].message) and said[0].filename == __file__
    pictures = metadist.load(raw_runs.run("pictures")).inputs
    with pytest.warns(UserWarning, match="images brighter than any in training: 1"):
        pictures(np.full((3, 12, 12), 200.0))
    rows = metadist.load(raw_runs.run("labelled"), trust_code=True).inputs
    with pytest.warns(UserWarning, match="categories unknown: 1.*'city'.*example Bonn"):
        rows({"age": 1.0, "city": "Bonn", "income": 2, "face": [1.0, 2.0, 3.0], "trips": None})
    told = []
    pictures.say = told.append
    pictures(Image.new("RGB", (30, 10)))
    pictures(Image.new("RGB", (30, 10)))
    assert len(told) == 1 and "stretched" in told[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts("pay money")


def test_outputs_beside_an_action_are_not_taken_for_its_targets():
    """Three arms, and three targets: the action, its propensity, the reward."""
    units = [{"dtype": kind, "offset": 1.0, "scale": 2.0} for kind in ("int64", "float32", "float32")]
    shapes = Shapes([[2]], False, None, 3, False, target_units=units, targets=[[], [], []])
    outputs = np.array([[0.5, 1.0, 2.0]])
    np.testing.assert_array_equal(Inputs(shapes, Preprocessing.parse({})).values(outputs), outputs)
    values = Inputs(shapes._replace(target_units=units[1:] + units[1:2]), Preprocessing.parse({}))
    np.testing.assert_array_equal(values.values(outputs), outputs / 2 + 1)
