"""`metadist predict` on files: what it prints is what Python gives, and errors are one sentence."""

import csv
import json
import shutil

import numpy as np
import pandas as pd
import pytest

import metadist
from tests.cli.command import run

pytestmark = pytest.mark.filterwarnings("ignore:pictures stretched:UserWarning", "ignore:texts cut:UserWarning")


@pytest.fixture(scope="module")
def files(raw_runs):
    """Folders and files for support and query, beside the runs."""
    folder = raw_runs.folder / "asked"
    for name in ("bird1", "bird4"):
        for part, numbers in (("garden", range(3)), ("park", range(3, 6))):
            (folder / part / name).mkdir(parents=True)
            for number in numbers:
                shutil.copy(raw_runs.pictures / name / f"{number}.png", folder / part / name)
    (folder / "flat").mkdir()
    shutil.copy(raw_runs.pictures / "bird1" / "5.png", folder / "flat" / "one.png")
    shutil.copy(raw_runs.pictures / "bird4" / "5.png", folder / "flat" / "two.png")
    (folder / "flat" / "about.txt").write_text("no picture")
    lines = [line for line in raw_runs.texts.read_text().splitlines() if "to pay" in line or "to open" in line]
    (folder / "few.jsonl").write_text("\n".join(lines[:4] + lines[6:10]))
    (folder / "latin.txt").write_bytes("zahl es später".encode("latin-1"))
    asked = [json.loads(line) for line in lines[4:6] + lines[10:12]]
    (folder / "more.csv").write_text("\n".join(["intent;text", *(f"{row['intent']};{row['text']}" for row in asked)]))
    frame = pd.read_parquet(raw_runs.table)
    frame = frame[frame.user == 3]
    for name, part in (("s", frame[:12]), ("q", frame[12:]), ("bare", frame[12:].drop(columns=["clicked", "price"]))):
        part.to_parquet(folder / f"{name}.parquet")
        part.drop(columns="face").to_csv(folder / f"{name}.csv", index=False)
        part.to_json(folder / f"{name}.jsonl", orient="records", lines=True)
    raw_runs.run("pictures"), raw_runs.run("texts"), raw_runs.run("labelled"), raw_runs.run("values")
    return folder


def predict(files, *arguments):
    done = run("predict", *arguments, cwd=files)
    assert done.returncode == 0, done.stderr
    return done


def test_folders_of_pictures_are_predicted_as_in_python(raw_runs, files):
    done = predict(files, "../runs/pictures_maml", "--support", "garden", "--query", "park", "--json")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    support = sorted((files / "garden").glob("*/*.png"))
    query = sorted((files / "park").glob("*/*.png"))
    adapted = metadist.load(raw_runs.run("pictures")).adapt(support, [path.parent.name for path in support])
    expected = adapted.predict_proba(query)
    assert [row["example"] for row in found] == [f"{path.parent.name}/{path.name}" for path in query]
    assert np.array_equal([list(row["probabilities"].values()) for row in found], expected)
    assert [row["label"] for row in found] == adapted.predict(query).tolist()
    assert [row["true"] for row in found] == [path.parent.name for path in query]
    right = sum(row["label"] == row["true"] for row in found)
    assert f"({right} of 6)" in done.stderr and "pictures stretched" in done.stderr
    flat = predict(files, "../runs/pictures_maml", "--support", "garden", "--query", "flat", "garden/bird1/0.png")
    assert "accuracy" not in flat.stdout and "files left out: 1" in flat.stderr
    assert [line.split()[0] for line in flat.stdout.splitlines()] == [
        "example",
        "one.png",
        "two.png",
        "garden/bird1/0.png",
    ]


def test_an_adapted_learner_is_kept_and_asked_later(raw_runs, files, tmp_path):
    arguments = ["../runs/pictures_maml", "--support", "garden", "evaluation.inner_steps=3", "evaluation.inner_lr=0.02"]
    alone = "evaluation.transductive=false"
    done = predict(
        files, *arguments, alone, "--save", str(tmp_path / "kept"), "--query", "flat", "--out", str(tmp_path / "a.csv")
    )
    assert done.stdout == ""
    rows = [*csv.DictReader((tmp_path / "a.csv").read_text().splitlines())]
    adapted = metadist.load_adapted(tmp_path / "kept")
    query = [files / "flat" / "one.png", files / "flat" / "two.png"]
    expected = adapted.predict_proba(query)  # each alone, as it was saved
    assert [[float(row["p_bird1"]), float(row["p_bird4"])] for row in rows] == expected.tolist()
    again = predict(files, str(tmp_path / "kept"), "--query", "flat/one.png", "--out", str(tmp_path / "b.jsonl"))
    assert again.returncode == 0
    (row,) = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert row["label"] == adapted.predict(query[0]) and row["probability"] == adapted.predict_proba(query[0]).max()


def test_texts_in_files_and_on_the_command_line_are_predicted(raw_runs, files):
    few = [json.loads(line) for line in (files / "few.jsonl").read_text().splitlines()]
    adapted = metadist.load(raw_runs.run("texts")).adapt([row["text"] for row in few], [row["intent"] for row in few])
    done = predict(files, "../runs/texts_maml", "--support", "few.jsonl", "--query", "more.csv", "--json")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["true"] for row in found} == {"to pay", "to open"} and "of 4)" in done.stderr
    assert [row["label"] for row in found] == adapted.predict([row["example"] for row in found]).tolist()
    done = predict(files, "../runs/texts_maml", "--support", "few.jsonl", "--query", "pay = money", "open it", "--json")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["example"] for row in found] == ["pay = money", "open it"] and "true" not in found[0]
    expected = adapted.predict_proba(["pay = money", "open it"])
    assert [row["probability"] for row in found] == expected.max(axis=1).tolist()


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_rows_of_tables_are_predicted_as_in_python(raw_runs, files, form):
    learner = metadist.load(raw_runs.run("labelled"), trust_code=True)
    frame, asked = (pd.read_parquet(files / f"{name}.parquet") for name in ("s", "q"))
    expected = learner.adapt(frame, frame.clicked).predict_proba(asked)
    run_directory = ["../runs/labelled_maml", "--trust-code"]
    done = predict(files, *run_directory, "--support", f"s.{form}", "--query", f"q.{form}", "--json")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert np.allclose([list(row["probabilities"].values()) for row in found], expected, atol=1e-6)
    assert [row["true"] for row in found] == asked.clicked.tolist() and "of 8)" in done.stderr
    bare = predict(files, *run_directory, "--support", f"s.{form}", "--query", f"bare.{form}", "--query", f"q.{form}")
    assert "accuracy" not in bare.stdout and len(bare.stdout.splitlines()) == 17 and "labels not used" in bare.stderr


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
def test_values_are_predicted_in_the_units_of_the_table(raw_runs, files, form):
    learner = metadist.load(raw_runs.run("values"), trust_code=True)
    frame, asked = (pd.read_parquet(files / f"{name}.parquet") for name in ("s", "q"))
    expected = learner.adapt(frame, frame.price).predict(asked)[:, 0]
    run_directory = ["../runs/values_maml", "--trust-code"]
    done = predict(files, *run_directory, "--support", f"s.{form}", "--query", f"q.{form}", "--json")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert np.allclose([row["value"][0] for row in found], expected, rtol=1e-6)
    error = np.sqrt(np.mean((expected - asked.price) ** 2))
    assert float(done.stderr.split("root mean squared error")[1].split()[0]) == pytest.approx(error, rel=1e-4)
    shown = predict(files, *run_directory, "--support", f"s.{form}", "--query", f"q.{form}").stdout
    assert shown.splitlines()[0].split() == ["example", "value", "true"] and "row 8" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--support", "garden"], "--query"),
        (["--query", "flat"], "--support"),
        (["--support", "flat", "--query", "flat"], "no class folders"),
        (["--support", "few.jsonl", "--query", "flat"], "no folder"),
        (["--support", "garden", "--query", "gone.png"], "gone.png was not found, and this run takes pictures"),
        (["--support", "garden", "--query", "flat", "--out", "a.txt"], ".csv or .jsonl"),
        (["--support", "garden", "--query", "flat", "learner.inner_lr=1"], "did you mean evaluation.inner_lr?"),
        (["--support", "garden", "--query", "flat", "evaluation.inner_steps=many"], "inner_steps"),
        (["--support", "garden", "--query", "flat", "evaluation.tasks=3"], "no setting evaluation.tasks"),
        (["--support", "garden", "--query", "flat", "--save", "garden"], "not empty"),
    ],
)
def test_what_cannot_be_predicted_from_pictures_is_told(files, arguments, said):
    done = run("predict", "../runs/pictures_maml", *arguments, cwd=files)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    ("run_directory", "arguments", "said"),
    [
        ("texts_maml", ["--support", "few.jsonl", "--query", "gone.jsonl"], "does not exist"),
        ("texts_maml", ["--support", "few.jsonl", "--query", "pay", "--label", "text_"], "no column 'text_'"),
        ("texts_maml", ["--support", "s.parquet", "--query", "pay"], "no column 'text'"),
        ("texts_maml", ["--support", "few.jsonl", "--query", "latin.txt"], "latin.txt is not UTF-8"),
        ("labelled_maml", ["--support", "s.parquet", "--query", "q.parquet"], "--trust-code"),
        ("labelled_maml", ["--trust-code", "--support", "s.parquet", "--query", "q.csv"], "no column 'face'"),
        ("labelled_maml", ["--trust-code", "--support", "bare.jsonl", "--query", "q.jsonl"], "'clicked'"),
        ("values_maml", ["--trust-code", "--support", "s.csv", "--query", "few.txt"], "few.txt"),
        ("gone", ["--support", "s.csv", "--query", "q.csv"], "not a run directory"),
    ],
)
def test_what_cannot_be_predicted_from_texts_and_tables_is_told(files, run_directory, arguments, said):
    done = run("predict", f"../runs/{run_directory}", *arguments, cwd=files)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_what_is_broken_is_left_out_where_that_is_asked(files, tmp_path):
    for name in ("garden", "park"):
        shutil.copytree(files / name, tmp_path / name)
        (tmp_path / name / "bird1" / "torn.png").write_bytes(b"no picture")
    (tmp_path / "garden" / "ghost").mkdir()
    (tmp_path / "garden" / "ghost" / "0.png").write_bytes(b"")
    asked = ["--support", str(tmp_path / "garden"), "--query", str(tmp_path / "park"), "--json"]
    assert "torn.png" in run("predict", "../runs/pictures_maml", *asked, cwd=files).stderr
    done = predict(files, "../runs/pictures_maml", *asked, "--skip-bad")
    whole = predict(files, "../runs/pictures_maml", "--support", "garden", "--query", "park", "--json")
    assert done.stdout == whole.stdout and "pictures left out: 2" in done.stderr and "torn.png" in done.stderr
    assert "classes left out: 1" in done.stderr and "ghost" in done.stderr
    nothing = run("predict", "../runs/pictures_maml", *asked[:3], str(tmp_path / "park" / "bird1" / "torn.png"),
                  "--skip-bad", cwd=files)  # fmt: skip
    assert nothing.returncode == 2 and "give at least one that can be read" in nothing.stderr
    (tmp_path / "more.jsonl").write_text('{"text": "open it"}\nno json\n{"text": "pay"}\n')
    asked = ["--support", "few.jsonl", "--query", str(tmp_path / "more.jsonl"), "--json"]
    assert "--skip-bad" in run("predict", "../runs/texts_maml", *asked, cwd=files).stderr
    done = predict(files, "../runs/texts_maml", *asked, "--skip-bad")
    assert len(done.stdout.splitlines()) == 2 and "rows left out: 1" in done.stderr and "line 2" in done.stderr


def test_the_value_that_is_no_number_is_told(raw_runs, files, tmp_path):
    frame = pd.read_csv(files / "s.csv").astype({"income": str})
    frame.loc[3, "income"] = "abc"
    frame.to_csv(tmp_path / "bad.csv", index=False)
    done = run("predict", str(raw_runs.run("values")), "--support", str(tmp_path / "bad.csv"), "--query",
               str(files / "q.csv"), "--trust-code", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2 and "'income'" in done.stderr and "'abc' for example" in done.stderr


def test_classes_that_the_support_set_has_not_are_told(files, tmp_path):
    shutil.copytree(files / "park", tmp_path / "park")
    (tmp_path / "park" / "bird4").rename(tmp_path / "park" / "heron")
    done = predict(files, "../runs/pictures_maml", "--support", "garden", "--query", str(tmp_path / "park"))
    assert "heron: no class of the support set" in done.stderr and "of 6)" in done.stdout
