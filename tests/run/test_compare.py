"""`metadist compare`: finished runs beside one another."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from metadist.core.errors import InputError
from metadist.run.compare import compare
from tests.cli.command import run

JOB = [
    "data.family=digits", "task.ways=3", "task.queries=3", "fleet.backend=local", "tracking.mlflow=false",
    "model.name=mlp", "model.hidden=[16]", "meta_steps=3", "meta_batch_size=2", "evaluation.every=0",
    "evaluation.test_tasks=12", "evaluation.baselines=[]", "-q",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, typed in {
        "maml": [],
        "sgd": ["learner.name=meta_sgd"],
        "seed": ["seed=1"],
        "few": ["meta_lr=0.01"],
    }.items():
        tasks = ["evaluation.test_tasks=7"] * (name == "few")
        done = run("train", *JOB, *typed, *tasks, f"run_dir={name}", cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def after(folder: Path) -> np.ndarray:
    return pa.ipc.open_file(folder / "tasks.arrow").read_all()["accuracy_after_1"].to_numpy()


def test_runs_are_paired_where_their_tasks_are_the_same(runs):
    first, sgd, seed, few = compare([str(runs / name) for name in ("maml", "sgd", "seed", "few")])
    assert first.keys() == {"run", "data", "learner", "metric", "higher_is_better", "mean", "ci95", "tasks"}
    assert (first["learner"], first["data"], first["tasks"]) == ("maml", "digits", 12)
    gain = after(runs / "sgd") - after(runs / "maml")
    low, high = stats.ttest_1samp(gain, 0).confidence_interval(0.95)
    assert (sgd["better"], sgd["better_ci95"]) == pytest.approx((gain.mean(), (high - low) / 2))
    assert sgd["paired_tasks"] == 12 and "unpaired" not in sgd and sgd["learner"] == "meta_sgd"
    assert few["paired_tasks"] == 7 and few["tasks"] == 7
    assert few["better"] == pytest.approx((after(runs / "few") - after(runs / "maml")[:7]).mean())
    assert seed["paired_tasks"] == 0 and seed["unpaired"] == "seed 0 and 1"


def test_the_table_the_figure_and_json(runs, figures):
    done = run("compare", "maml", "sgd", "seed", "--figure", "out/c.png", cwd=runs)
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["run", "learner", "accuracy", "tasks", "better,", "points"]
    assert [row.split()[0] for row in rows[:3]] == ["maml", "sgd", "seed"] and "the first" in rows[0]
    assert rows[1].split()[-1] in ("ahead", "level", "behind")
    assert rows[3].startswith("seed is not paired with maml, since their tasks are others (seed 0 and 1)")
    assert rows[4] == "paired over 12 tasks"
    assert (runs / "out" / "c.png").read_bytes().startswith(b"\x89PNG") and "wrote out/c.png" in done.stderr
    told = json.loads(run("compare", "maml", "seed", "--json", cwd=runs).stdout)
    assert [row["run"] for row in told] == ["maml", "seed"]


def test_a_run_on_other_data_is_shown_without_a_verdict(runs, tmp_path):
    other = shutil.copytree(runs / "sgd", tmp_path / "other")
    results = json.loads((other / "results.json").read_text())
    results["tasks_of"] |= {"data": "letters", "digest": "0" * 16}
    (other / "results.json").write_text(json.dumps(results))
    done = run("compare", "maml", str(other), cwd=runs)
    assert done.returncode == 0, done.stderr
    _, _, row, note = done.stdout.splitlines()
    assert "±" in row.split("12")[-1] and row.split()[-1][0].isdigit()
    assert note.startswith(f"{other} is on other data: not comparable with maml (data digits and letters)")
    assert not any(word in done.stdout for word in ("ahead", "level", "behind"))
    assert json.loads(run("compare", "maml", str(other), "--json", cwd=runs).stdout)[1]["word"] == "not comparable"


def test_an_evaluation_of_a_run_can_be_compared_too(runs):
    done = run("evaluate", "maml", "evaluation.inner_steps=3", "--json", cwd=runs)
    folder = json.loads(done.stdout)["folder"]
    _, again = compare([str(runs / "maml"), str(runs / folder)])
    assert again["paired_tasks"] == 12


def test_what_cannot_be_compared_is_told_with_what_to_type(runs, tmp_path):
    old = shutil.copytree(runs / "maml", tmp_path / "old run")
    results = json.loads((old / "results.json").read_text())
    del results["tasks_of"]
    (old / "results.json").write_text(json.dumps(results))
    with pytest.raises(InputError, match=f"type `metadist evaluate '{old}'`, and compare the folder"):
        compare([str(runs / "maml"), str(old)])
    other = shutil.copytree(runs / "maml", tmp_path / "other")
    (other / "tasks.arrow").write_bytes(b"ARROW1")
    with pytest.raises(InputError, match="do not fit .*: evaluate it again"):
        compare([str(runs / "maml"), str(other)])
    (other / "tasks.arrow").unlink()
    with pytest.raises(InputError, match="has no tasks.arrow"):
        compare([str(other), str(runs / "maml")])
    (other / "results.json").unlink()
    with pytest.raises(InputError, match="has no results.json: name a run that has ended"):
        compare([str(runs / "maml"), str(other)])
    loss = shutil.copytree(runs / "maml", tmp_path / "loss")
    results = json.loads((runs / "maml" / "results.json").read_text())
    results["measure"] = {"name": "loss", "better": "lower"}
    (loss / "results.json").write_text(json.dumps(results))
    with pytest.raises(
        InputError, match="measure different things .*maml accuracy, where higher is better, .*loss loss"
    ):
        compare([str(runs / "maml"), str(loss)])
    assert run("compare", "maml", cwd=runs).returncode == 2


@pytest.mark.parametrize("after", [{"mean": "high", "ci95": 0.1}, {"mean": [0.5], "ci95": 0.1}, [], "x"])
def test_results_of_other_types_than_metadist_writes_are_told_as_such(runs, tmp_path, after):
    other = shutil.copytree(runs / "maml", tmp_path / "other")
    results = json.loads((other / "results.json").read_text())
    results["accuracy"]["after"] = after
    (other / "results.json").write_text(json.dumps(results))
    with pytest.raises(InputError, match="do not fit .*: evaluate it again"):
        compare([str(runs / "maml"), str(other)])


def test_a_run_with_diverged_tasks_has_no_figure_and_says_so(runs, tmp_path):
    bad = shutil.copytree(runs / "maml", tmp_path / "bad")
    table = pa.ipc.open_file(bad / "tasks.arrow").read_all()
    place = table.column_names.index("accuracy_after_1")
    values = [*table["accuracy_after_1"].to_pylist()[:-1], float("nan")]
    table = table.set_column(place, "accuracy_after_1", pa.array(values))
    with pa.ipc.new_file(bad / "tasks.arrow", table.schema) as writer:
        writer.write_table(table)
    done = run("compare", str(runs / "maml"), str(bad), cwd=tmp_path)
    assert "none: tasks diverged  unknown" in done.stdout
