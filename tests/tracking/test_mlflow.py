import contextlib
import http.server
import math
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from metadist.core.errors import SUBMITTED_BY
from metadist.tracking import Trackers
from metadist.tracking import mlflow as module
from metadist.tracking.jsonl import JsonlTracker
from metadist.tracking.mlflow import MlflowTracker, clean_key

# MLflow 3.17 with SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory, mlflow_database):
    root = tmp_path_factory.mktemp("runs")
    shutil.copy(mlflow_database, root)
    return root


@pytest.fixture
def run_dir(root, request):
    return root / request.node.name


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


class Run(Trackers):
    """The trackers of a run that matter here, as a run has them."""

    def __init__(self, run_dir, uri, run_id, said):
        run_dir.mkdir(exist_ok=True, parents=True)
        self.jsonl = JsonlTracker(run_dir / "metrics.jsonl")
        self.mlflow = MlflowTracker(uri, "few-shot", "a run", run_id, run_dir, said.append)
        self.wait_run_id = self.mlflow.wait_run_id
        super().__init__(self.jsonl, self.mlflow)

    def finish(self, status, timeout_s=60):
        self.jsonl.finish(status)
        self.mlflow.finish(status, timeout_s)


def start(run_dir, *, uri=None, run_id=None, said=None):
    return Run(run_dir, uri, run_id, [] if said is None else said)


@pytest.fixture(scope="module")
def client(root):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{root / 'mlflow.db'}")


def values_of(client, run_id, key):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


def finished(tracker, said, status="FINISHED"):
    tracker.finish(status)
    assert said == []
    return tracker.wait_run_id(0)


def test_everything_arrives(root, run_dir, client, tmp_path):
    said = []
    both = start(run_dir, said=said)
    both.params({"meta_lr": "0.001", "long": "x" * 7000, "odd[key]": "1"})
    both.tags({"metadist.dataset_digest": "d" * 64, "mlflow.source.type": "JOB"})
    both.dataset("omniglot", "0123456789" * 5, "/data/omniglot.arrow", "train")
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    both.artifact(tmp_path / "config.yaml", "config")
    both.artifact(tmp_path / "config.yaml")
    for step in range(1500):
        both.metrics({"train/loss": 1 / (step + 1), "acc@5": 0.5}, step)
    both.metrics({"train/loss": math.nan, "a": math.inf, "b": 1.0}, 1500)
    run_id = finished(both, said)

    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "a run" and run.info.end_time > run.info.start_time
    assert run.data.params == {"meta_lr": "0.001", "long": "x" * 6000, "odd_key_": "1"}
    assert run.data.tags["metadist.dataset_digest"] == "d" * 64
    assert run.data.tags["mlflow.source.type"] == "JOB"
    assert run.data.tags["mlflow.user"]
    assert values_of(client, run_id, "train/loss") == [(step, 1 / (step + 1)) for step in range(1500)]
    assert len(values_of(client, run_id, "acc_5")) == 1500
    assert values_of(client, run_id, "train/nonfinite_metrics") == [(1500, 2.0)]
    assert "a" not in run.data.metrics and run.data.metrics["b"] == 1.0
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("omniglot", ("0123456789" * 5)[:36])
    assert "/data/omniglot.arrow" in data.dataset.source
    assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "train")]
    assert run.info.artifact_uri.startswith((root / "mlartifacts").as_uri())
    assert (root / "mlartifacts" / run_id / "artifacts" / "config" / "config.yaml").read_text() == "seed: 0\n"
    assert [file.path for file in client.list_artifacts(run_id)] == ["config", "config.yaml"]


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_the_status_is_the_truth(run_dir, client, status):
    said = []
    tracker = start(run_dir, said=said)
    run_id = finished(tracker, said, status)
    tracker.finish("FINISHED")
    assert client.get_run(run_id).info.status == status


def test_a_resumed_run_is_continued_and_drift_is_told(run_dir, client):
    said = []
    first = start(run_dir, said=said)
    first.params({"meta_lr": "0.1", "seed": "0"})
    first.metrics({"train/loss": 1.0}, 1)
    run_id = finished(first, said, "KILLED")

    second = start(run_dir, run_id=run_id, said=said)
    assert second.wait_run_id(60) == run_id
    assert client.get_run(run_id).info.status == "RUNNING"
    second.params({"meta_lr": "0.2", "seed": "0", "new": "1"})
    second.metrics({"train/loss": 0.5}, 2)
    assert finished(second, said) == run_id
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"meta_lr": "0.1", "seed": "0", "new": "1"}
    assert run.data.tags["param_drift"] == "meta_lr: 0.1 -> 0.2"
    assert values_of(client, run_id, "train/loss") == [(1, 1.0), (2, 0.5)]

    (run_dir / module.OFFSET_FILE).unlink()  # as an earlier metadist left it
    third = start(run_dir, run_id=run_id, said=said)
    third.metrics({"train/loss": 0.25}, 3)
    assert finished(third, said) == run_id
    assert values_of(client, run_id, "train/loss") == [(1, 1.0), (2, 0.5), (3, 0.25)]


@pytest.mark.parametrize("kind", ["deleted", "unknown"])
def test_a_run_that_is_gone_is_replaced_and_named(run_dir, client, kind):
    """The new one has all numbers from the start."""
    gone, said = "0" * 32, []
    first = start(run_dir, said=said)
    first.metrics({"a": 1.0}, 1)
    there = finished(first, said)
    if kind == "deleted":
        client.delete_run(gone := there)
    sentences = []
    tracker = start(run_dir, run_id=gone, said=sentences)
    tracker.metrics({"a": 2.0}, 2)
    tracker.finish("FINISHED")
    run_id = tracker.wait_run_id(0)
    assert run_id != gone and len(sentences) == 1 and gone in sentences[0]
    assert client.get_run(run_id).data.tags["resumed_from_run"] == gone
    assert values_of(client, run_id, "a") == [(1, 1.0), (2, 2.0)]


def test_a_file_that_is_not_there_does_not_hold_up_the_numbers(run_dir, client, tmp_path):
    said = []
    tracker = start(run_dir, said=said)
    tracker.artifact(tmp_path / "absent.png")
    tracker.metrics({"a": 1.0}, 1)
    tracker.finish("FINISHED")
    assert len(said) == 1 and "absent.png" in said[0]
    assert client.get_run(tracker.wait_run_id(0)).data.metrics == {"a": 1.0}


def test_numbers_arrive_while_training_goes_on(run_dir, client):
    tracker = start(run_dir)
    run_id = tracker.wait_run_id(60)
    tracker.metrics({"a": 1.0}, 1)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not client.get_run(run_id).data.metrics:
        time.sleep(0.1)
    assert client.get_run(run_id).data.metrics == {"a": 1.0}
    assert client.get_run(run_id).info.status == "RUNNING"
    tracker.finish("FINISHED")


@contextlib.contextmanager
def refusing():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def hanging():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class Broken(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, format, *args):
        pass


@contextlib.contextmanager
def broken():
    with http.server.HTTPServer(("127.0.0.1", 0), Broken) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("server", [refusing, hanging, broken])
def test_a_bad_server_neither_slows_nor_stops_a_run(server, tmp_path):
    said = []
    with server() as uri:
        tracker = start(tmp_path / "run", uri=uri, run_id="f" * 32, said=said)
        slowest_s, began = 0.0, time.perf_counter()
        for step in range(1000):
            before = time.perf_counter()
            tracker.metrics({f"metric/{index}": 1.0 for index in range(10)}, step)
            slowest_s = max(slowest_s, time.perf_counter() - before)
            tracker.params({"a": str(step)})
            tracker.tags({"b": str(step)})
            tracker.dataset("d", "e", "f", "g")
            tracker.artifact(tmp_path / "x")
        assert (time.perf_counter() - began) / 5000 < 0.005 and slowest_s < 1
        assert tracker.wait_run_id(0) == "f" * 32
        before = time.perf_counter()
        tracker.finish("FINISHED", timeout_s=1.0)
        assert time.perf_counter() - before < 3
        for thread in threading.enumerate():
            if thread.name == "mlflow-writer":
                thread.join(30)
    assert "lacks 1000 lines of metrics.jsonl" in said[-1] and uri in said[-1] and "--resume auto" in said[-1]
    assert len(said) <= 2


def test_a_server_that_comes_back_gets_everything(root, run_dir, client, monkeypatch):
    monkeypatch.setattr(module, "FIRST_BACKOFF_S", 0.2)
    monkeypatch.setattr(module, "FLUSH_EVERY_S", 0.1)
    said = []
    tracker = start(run_dir, said=said)
    run_id = tracker.wait_run_id(60)
    moved = root / "elsewhere.db"
    os.rename(root / "mlflow.db", moved)
    (root / "mlflow.db").mkdir()
    client._tracking_client.store.engine.dispose()
    for step in range(100):
        tracker.metrics({"a": float(step)}, step)
    deadline = time.monotonic() + 60
    while not said and time.monotonic() < deadline:
        time.sleep(0.05)
    (root / "mlflow.db").rmdir()
    os.rename(moved, root / "mlflow.db")
    tracker.metrics({"a": 100.0}, 100)
    tracker.finish("FINISHED")
    assert "cannot be written to" in said[0] and len(said) <= 2
    assert values_of(client, run_id, "a") == [(step, float(step)) for step in range(101)]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_what_a_server_that_was_down_lacks_is_sent_by_the_resumed_run(run_dir, client, monkeypatch):
    monkeypatch.setenv(SUBMITTED_BY, "1.0")
    said = []
    with refusing() as uri:
        first = start(run_dir, uri=uri, said=said)
        for step in range(3):
            first.metrics({"a": float(step)}, step)
        first.finish("KILLED", timeout_s=30)
    assert "lacks 3 lines" in said[-1] and first.wait_run_id(0) is None
    assert said[-1].endswith("submitting the job again sends them") and "(Connection refused)" in " ".join(said)
    monkeypatch.delenv(SUBMITTED_BY)
    said.clear()
    second = start(run_dir, said=said)
    second.metrics({"a": 3.0}, 3)
    run_id = finished(second, said, "KILLED")
    assert values_of(client, run_id, "a") == [(step, float(step)) for step in range(4)]
    with (run_dir / "metrics.jsonl").open("a") as file:  # as a process that was killed leaves it
        file.write('{"step":4,"time":4.0,"a":4.0}\n{"step":5,"ti')
    third = start(run_dir, run_id=run_id, said=said)
    third.metrics({"a": 5.0}, 5)
    assert finished(third, said) == run_id
    assert sorted(values_of(client, run_id, "a")) == [(step, float(step)) for step in range(6)]


def test_a_hanging_server_does_not_hold_the_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; from metadist.tracking.mlflow import MlflowTracker\n"
        "assert 'mlflow' not in sys.modules\n"
        "tracker = MlflowTracker(sys.argv[1], 'e', 'r', None, Path(sys.argv[2]), print)\n"
        "tracker.finish('KILLED', timeout_s=2)"
    )
    with hanging() as uri:
        before = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code, uri, tmp_path], check=True, capture_output=True, timeout=60, text=True
        )
        assert time.monotonic() - before < 30
    assert "no answer within 2 s" in done.stdout and "Traceback" not in done.stderr


def test_the_environment_is_set_only_where_the_user_did_not(tmp_path, monkeypatch):
    names = ["MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_DISABLE_TELEMETRY"]
    monkeypatch.setenv(names[1], "77")
    for name in (names[0], names[2]):
        monkeypatch.delenv(name)
    with refusing() as uri:
        start(tmp_path / "run", uri=uri).finish("FINISHED", timeout_s=0)
        assert [os.environ[name] for name in names] == ["1", "77", "true"]


@pytest.mark.parametrize(
    "key", ["train/loss", "loss@5", "a=b", "acc[5w1s]", "/x", "../x", ".", "", "a//b", "a/../b", "x/" * 200, "\u00e9"]
)
def test_every_key_becomes_one_that_mlflow_takes(key):
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name, _validate_tag_name

    clean = clean_key(key)
    for validate in (_validate_metric_name, _validate_param_name, _validate_tag_name):
        validate(clean)
    assert 0 < len(clean) <= 250
    assert clean_key("train/loss") == "train/loss" and clean_key("loss@5") == "loss_5"


def size_of(path):
    return os.stat(path).st_size if path.exists() else 0


def kill_while_migrating(folder):
    """Kills a process in the middle of the first migration of its database."""
    code = "import sys, time; from metadist.tracking.mlflow import MlflowTracker; from pathlib import Path\n" \
           "MlflowTracker(None, 'x', 'y', None, Path(sys.argv[1], 'run'), print); time.sleep(120)"  # fmt: skip
    first = subprocess.Popen([sys.executable, "-c", code, str(folder)])
    try:
        deadline = time.monotonic() + 100
        while not any(
            size_of(path) > 100_000 for path in [*folder.glob("mlflow.db"), *folder.glob(".mlflow.db.*.tmp")]
        ):
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        first.kill()
        first.wait()


def test_a_kill_during_the_first_migration_harms_no_later_run(tmp_path):
    kill_while_migrating(tmp_path)
    said = []
    run_id = finished(start(tmp_path / "run", said=said), said)
    assert run_id and (tmp_path / "mlflow.db").stat().st_mode & 0o777 == 0o600


def test_a_database_left_half_made_is_told_with_its_remedy(tmp_path, mlflow_database):
    """As a kill between two changes of one migration leaves it: the change is there, its mark is not."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    shutil.copy(mlflow_database, folder)
    with sqlite3.connect(folder / "mlflow.db") as database:
        tables = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        database.execute(f"drop table {max(name for name in tables if name.startswith('trace'))}")
        database.execute("delete from alembic_version")
    said: list[str] = []
    start(folder / "run", said=said).finish("FINISHED")
    assert f"`mv '{folder}/mlflow.db' '{folder}/mlflow.db.broken'`, and the next run makes a new one" in said[0]


def test_two_that_make_one_database_at_once_share_it(tmp_path):
    trackers = [(start(tmp_path / f"run{number}", said=said), said) for number, said in enumerate(([], []))]
    ids = [finished(tracker, said) for tracker, said in trackers]
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert all(client.get_run(run_id).info.status == "FINISHED" for run_id in ids)
    assert not list(tmp_path.glob(".mlflow.db*"))


def test_a_store_of_files_is_told_with_the_whole_remedy(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    for uri in ("file:./mlruns", "mlruns", (tmp_path / "mlruns").as_uri()):
        said: list[str] = []
        start(tmp_path / "run", uri=uri, said=said).finish("FINISHED")
        assert (
            f"set tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}, or leave it and MLFLOW_TRACKING_URI out" in said[0]
        )
        assert "metrics.jsonl" in said[0] and "..." not in said[0]


def test_mlflows_own_words_are_said_without_secrets_and_not_cut_unsaid(tmp_path):
    said: list[str] = []
    start(tmp_path / "run", uri="nosuch://u:hunter2@h/" + "x" * 400, said=said).finish("FINISHED")
    assert said and all("nosuch://***@h/xxx" in text and "hunter2" not in text for text in said)
    assert "x ..." in said[0]
