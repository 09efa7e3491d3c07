"""A tiny run in MLflow: its logged model, the evaluation nested in it, what its parameters and tags say."""

import json
import shutil
import socket
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import metadist
from metadist.core.files import DriverLock
from metadist.core.task import TaskId
from metadist.run.build import Job
from metadist.run.status import close_in_mlflow
from metadist.tracking import SavedModel
from metadist.tracking.models import log_model
from tests.cli.command import run

SMALL = [
    "data.family=digits", "task.ways=3", "task.shots=2", "task.queries=3", "model.hidden=[16]", "model.name=mlp",
    "learner.inner_lr=0.1", "meta_batch_size=4", "meta_steps=4", "evaluation.every=3", "evaluation.tasks=5",
    "evaluation.test_tasks=5", "evaluation.baseline_tasks=2", "evaluation.inner_steps=5", "fleet.backend=local",
    "evaluation.scratch_steps=2", "meta_lr=1e-12",  # so that the first of two validations is the best
]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")


class Tracked:
    """A run that ended, with its client, the run in MLflow, and a task of its data."""

    def __init__(self, folder: Path, *overrides: str):
        self.folder = folder / "run"
        self.config = metadist.load_config([], [*SMALL, f"run_dir={self.folder}", *overrides])
        self.results = metadist.train(self.config, quiet=True)
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.client = MlflowClient(self.uri)
        self.run = self.client.get_run((self.folder / "mlflow_run_id").read_text())
        self.task = Job(self.config).source(TaskId("test", 0, 7))

    @property
    def models(self):
        found = self.client.search_logged_models([self.run.info.experiment_id])
        return {model.name: model for model in found if model.source_run_id == self.run.info.run_id}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, mlflow_database):
    folder = tmp_path_factory.mktemp("tracked")
    shutil.copy(mlflow_database, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield Tracked(folder, "tracking.register=few-shot digits")


@pytest.fixture
def loaded(tracked, tmp_path):
    """The best model, where nothing is left but its own files."""
    place = shutil.copytree(tracked.models["best"].artifact_location.removeprefix("file://"), tmp_path / "model")
    return mlflow.pyfunc.load_model(str(place))


def request_of(task):
    return {"support_x": task.support.inputs[0], "support_y": task.support.targets[0], "query_x": task.query.inputs[0]}


@pytest.mark.parametrize("params", [{}, {"steps": 1}, {"steps": 2, "lr": 0.25}, {"steps": 0}])
def test_the_logged_model_is_what_load_gives_to_the_bit(tracked, loaded, params):
    given = request_of(tracked.task)
    names = {"steps": "inner_steps", "lr": "inner_lr"}
    learner = metadist.load(tracked.folder, **{names[name]: value for name, value in params.items()})
    adapted = learner.adapt(given["support_x"], given["support_y"])
    found = loaded.predict(given, params=params)
    assert np.array_equal(found["labels"], adapted.predict(given["query_x"]))
    assert np.array_equal(found["probabilities"], adapted.predict_proba(given["query_x"]))
    assert np.allclose(found["probabilities"].sum(axis=1), 1)
    as_lists = loaded.predict({name: array.tolist() for name, array in given.items()}, params=params)
    assert np.array_equal(found["probabilities"], as_lists["probabilities"])


def test_it_holds_no_pickle_and_says_what_it_takes(tracked, loaded):
    place = Path(tracked.models["best"].artifact_location.removeprefix("file://"))
    files = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    assert {f for f in files if f.startswith("artifacts/")} == {
        f"artifacts/best/{name}" for name in ("weights.safetensors", "config.yaml", "meta.json")
    }
    assert not [f for f in files if f.endswith((".pkl", ".pt", ".bin"))] and "input_example.json" in files
    required = (place / "requirements.txt").read_text().split()
    assert all("==" in line for line in required) and any(line.startswith("torch==") for line in required)
    schema = loaded.metadata.get_input_schema()
    assert [(spec.name, str(spec.type), spec.shape) for spec in schema.inputs] == [
        ("support_x", "float32", (-1, 1, 8, 8)), ("support_y", "int64", (-1,)), ("query_x", "float32", (-1, 1, 8, 8))
    ]  # fmt: skip
    assert {spec.name: spec.default for spec in loaded.metadata.get_params_schema()} == {"steps": 5, "lr": 0.1}
    example = loaded.input_example
    assert len(loaded.predict(example)["labels"]) == len(example["query_x"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("support_y", None), ("query_x", np.zeros((2, 8))), ("support_x", "text"), ("support_x", [[1.0], [1.0, 2.0]]),
     ("support_y", [0.5] * 6), ("support_y", [0, 1]), ("query_x", np.full((1, 1, 8, 8), np.nan)),
     ("support_y", [0, 1, 2, 3, 4, 5]), ("query_x", np.zeros((0, 1, 8, 8)))],
)  # fmt: skip
def test_a_bad_request_is_refused_with_its_fields_name(tracked, loaded, name, value):
    given = request_of(tracked.task)
    if value is None:
        del given[name]
    else:
        given[name] = value
    with pytest.raises(MlflowException, match=name) as raised:
        loaded.predict(given)
    assert raised.value.get_http_status_code() == 400


@pytest.mark.parametrize("params", [{"steps": -1}, {"steps": 10**6}, {"lr": -1.0}, {"lr": 1e30}, {"steps": "many"}])
def test_a_bad_setting_is_refused(tracked, loaded, params):
    with pytest.raises(MlflowException, match=next(iter(params))) as raised:
        loaded.predict(request_of(tracked.task), params=params)
    assert raised.value.get_http_status_code() == 400


def test_best_and_final_are_linked_to_the_run_with_their_figures(tracked):
    models, run = tracked.models, tracked.client.get_run(tracked.run.info.run_id)
    assert {name: model.status.name for name, model in models.items()} == {"best": "READY", "final": "READY"}
    assert {output.model_id: output.step for output in run.outputs.model_outputs} == {
        models["best"].model_id: 3, models["final"].model_id: 4
    }  # fmt: skip
    figures = {metric.key: metric.value for metric in models["best"].metrics}
    assert figures["test/accuracy"] == tracked.results["accuracy"]["after"]["mean"]
    assert len(tracked.client.get_metric_history(run.info.run_id, "test/accuracy")) == 1
    version = tracked.client.get_model_version_by_alias("few-shot digits", "best")
    assert version.run_id == run.info.run_id


def test_a_model_that_cannot_be_sent_is_not_left_pending(tmp_path, mlflow_database):
    shutil.copy(mlflow_database, tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.create_experiment("models", (tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment)
    x, y = {"support_x": ("float32", [-1, 2])}, {"values": ("float32", [-1, -1])}
    model = SavedModel("best", 3, tmp_path / "gone", x, y, {}, {"support_x": np.zeros((1, 2), "f4")}, True)
    with pytest.raises(Exception, match="gone"):
        log_model(client, run.info.run_id, model, [], "registered")
    (logged,) = client.search_logged_models([experiment])
    assert logged.status.name == "FAILED" and client.search_registered_models() == []


def test_the_run_says_what_auto_became_and_how_it_ended(tracked):
    run, results = tracked.run, tracked.results
    params = run.data.params
    assert {key for key, value in params.items() if value == "auto"} == set()
    assert (params["engine.kind"], params["loss"], params["task.scheme"]) == ("vmap", "cross_entropy", "classes")
    assert params["evaluation.baselines"] == '["nearest_class_mean", "logistic_regression", "from_scratch"]'
    metrics, tags = run.data.metrics, run.data.tags
    assert metrics["test/accuracy"] == results["accuracy"]["after"]["mean"]
    assert metrics["test/accuracy_ci95"] == results["accuracy"]["after"]["ci95"]
    for name, measured in results["baselines"].items():
        assert metrics[f"test/baseline/{name}"] == measured["accuracy"]["mean"]
    assert tags["metadist.theta_sha256"] == results["theta_sha256"]
    assert tags["metadist.verdict"] == results["verdict"] and results["verdict"] in tags["mlflow.note.content"].replace(
        results["verdict"].capitalize(), results["verdict"]
    )
    assert "finished, step 4 of 4" in tags["mlflow.note.content"] and int(tags["metadist.heartbeat"]) > 1.7e9
    page = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType=machine_learning"
    assert results["mlflow_page"] == page


def test_an_evaluation_is_nested_and_its_step_is_the_inner_step(tracked):
    config = metadist.load_config([tracked.folder / "config.yaml"], ["evaluation.inner_steps=2"])
    for _ in range(2):  # the same again is the same run
        told = metadist.evaluate(config, tracked.folder, say=lambda text: None)
    query = f"tags.`mlflow.parentRunId` = '{tracked.run.info.run_id}'"
    (child,) = tracked.client.search_runs([tracked.run.info.experiment_id], query)
    curve = [point["mean"] for point in told["accuracy"]["by_inner_step"]]
    history = tracked.client.get_metric_history(child.info.run_id, "test/accuracy")
    assert [(metric.step, metric.value) for metric in history][:3] == list(enumerate(curve))
    assert child.info.status == "FINISHED" and child.data.params["evaluation.inner_steps"] == "2"
    assert child.data.tags["metadist.verdict"] == told["verdict"]


def test_an_evaluation_where_mlflow_has_no_such_run_goes_on_and_says_so(tracked, tmp_path, mlflow_database):
    shutil.copytree(tracked.folder, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))
    shutil.copy(mlflow_database, tmp_path)
    config = metadist.load_config([tmp_path / "run" / "config.yaml"], ["evaluation.test_tasks=3"])
    said: list[str] = []
    metadist.evaluate(config, tmp_path / "run", say=said.append)
    assert [text for text in said if tracked.run.info.run_id in text and "MLflow" in text]


def test_a_server_that_only_the_saved_run_names_is_not_dialled(tracked, tmp_path):
    shutil.copytree(tracked.folder, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))
    config = metadist.load_config([tmp_path / "run" / "config.yaml"], ["tracking.uri=http://127.0.0.1:9"])
    said: list[str] = []
    metadist.evaluate(config, tmp_path / "run", say=said.append)
    assert [text for text in said if "tracking.uri" in text] and not [text for text in said if "cannot" in text]


def test_status_closes_a_killed_run_once_its_driver_is_gone_and_silent(tracked, tmp_path):
    """Not while a driver has it, nor soon after it was heard of: that may be of a driver which no lock shows."""
    run_id = tracked.run.info.run_id

    def said():
        return json.loads(run("status", str(tracked.folder), "--json", cwd=tmp_path).stdout).get("mlflow", "")

    assert said() == ""
    tracked.client.update_run(run_id, status="RUNNING")
    now = int(time.time())
    tracked.client.set_tag(run_id, "metadist.heartbeat", str(now - 100))
    assert "RUNNING" not in said() and "running" in said()
    tracked.client.set_tag(run_id, "metadist.heartbeat", str(now - 200))
    with DriverLock(tracked.folder):
        assert said() == ""
    assert tracked.client.get_run(run_id).info.status == "RUNNING"
    assert "KILLED" in said() and said() == ""
    closed = tracked.client.get_run(run_id)
    assert closed.info.status == "KILLED" and closed.info.end_time == (now - 200) * 1000


def test_status_dials_no_server_that_only_the_saved_run_names(tracked, tmp_path, monkeypatch):
    folder = shutil.copytree(tracked.folder, tmp_path / "run")
    text = (folder / "config.yaml").read_text()
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        (folder / "config.yaml").write_text(text.replace("  uri: null", f"  uri: {uri}"))
        assert uri in (folder / "config.yaml").read_text()
        assert uri in close_in_mlflow(folder) and "MLFLOW_TRACKING_URI" in close_in_mlflow(folder)
        with pytest.raises(TimeoutError):
            asked.append(server.accept())
    assert not asked


def test_status_says_what_keeps_mlflow_from_answering(tracked, tmp_path):
    """A database that is not there is not made; one without the run, and one that is none."""
    folder = shutil.copytree(tracked.folder, tmp_path / "run")
    database = tmp_path / "mlflow.db"
    assert str(database) in close_in_mlflow(folder) and not database.exists()
    shutil.copy(tracked.folder.parent / "mlflow.db", database)
    (folder / "mlflow_run_id").write_text("0" * 32)
    assert "0" * 32 in close_in_mlflow(folder)
    database.write_text("no database" * 100)
    assert "not known" in close_in_mlflow(folder)


def test_a_model_of_the_users_own_code_is_not_logged_and_why_is_said(tmp_path, mlflow_database, monkeypatch, capsys):
    (tmp_path / "tests_unlogged_net.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Sequential):\n"
        "    def __init__(self):\n        super().__init__(nn.Flatten(), nn.Linear(64, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(mlflow_database, tmp_path)
    tracked = Tracked(tmp_path, "model.name=tests_unlogged_net:Net", "model.hidden=null")
    assert tracked.models == {} and tracked.run.info.status == "FINISHED"
    assert "model.name=tests_unlogged_net:Net" in capsys.readouterr().err and not (tracked.folder / "models").exists()
