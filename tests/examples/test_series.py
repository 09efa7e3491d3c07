from pathlib import Path

import numpy as np
import pytest

import metadist
from metadist import Task
from metadist.data import importers
from tests.examples import series

JOBS = Path(__file__).resolve().parents[2] / "jobs" / "domains"


def test_baselines_by_hand():
    """Two weeks of history that count up, then three days."""
    task = Task.of(np.zeros((14, 1)), np.arange(14.0), np.zeros((3, 1)), np.zeros(3))
    assert series.last_value(task).tolist() == [[13]] * 3
    assert series.seasonal(task).tolist() == [[3.5], [4.5], [5.5]]
    less = Task.of(np.zeros((13, 1)), np.arange(1.0, 14), np.zeros((3, 1)), np.zeros(3))
    assert series.seasonal(less).tolist() == [[7], [4.5], [5.5]]  # of the first weekday there is one day


def test_series_differ_and_stay_what_they_are():
    one, two = ([row[-1] for row in series.rows(number)] for number in (3, 4))
    assert one == [row[-1] for row in series.rows(3)] and len(one) == series.DAYS
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.95 and np.isfinite(one).all()


def test_weekdays_promotions_and_weather_are_in_the_sales():
    """Least squares over many series finds the shapes: leisure peaks on Saturdays, promotions add, warm days add."""
    rows = [row for number in range(60) for row in series.rows(number)]
    columns = {name: np.array([row[place] for row in rows]) for place, name in enumerate(series.COLUMNS)}
    sales = columns["log_sales"].astype(float)
    design = [columns[name].astype(float) for name in ("dow5", "promotion", "day")]
    warm = np.maximum(columns["temperature"].astype(float) - 14, 0)
    level = [(columns["series"] == name).astype(float) for name in np.unique(columns["series"])]
    found = np.linalg.lstsq(np.stack([*design, warm, *level], axis=1), sales, rcond=None)[0]
    assert found[0] > 0.2 and found[1] > 0.3 and found[3] > 0.02


def test_the_job_forecasts_windows_and_draws_one(tmp_path, monkeypatch):
    monkeypatch.chdir(JOBS.parents[1])
    series.write_sales(tmp_path / "sales.csv", series=12)
    inputs = ["x=day,dow0..dow6,temperature,promotion,price"]
    data = importers.table(
        tmp_path / "sales.csv", tmp_path / "data", group="series", time="date", standardize=True, inputs=inputs,
        targets=["log_sales"],
    )  # fmt: skip
    settings = [
        f"data.path={data}", "meta_steps=2", "meta_batch_size=2", "evaluation.every=1", "evaluation.tasks=4",
        "evaluation.test_tasks=6", "evaluation.joint_steps=2", "tracking.mlflow=false", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    results = metadist.train(metadist.load_config([JOBS / "series.yaml"], settings), quiet=True)
    assert results["baselines"]["seasonal"]["loss"]["mean"] < results["baselines"]["last_value"]["loss"]["mean"] * 2
    assert (tmp_path / "run" / "forecast.png").exists()
    with pytest.raises(metadist.InputError, match="task.order=window needs tasks of scheme values"):
        other = [
            f"data.path={data}",
            "task.scheme=classes",
            "task.order=window",
            "fleet.backend=local",
            f"run_dir={tmp_path / 'no'}",
        ]
        metadist.train(metadist.load_config([], other), quiet=True)
