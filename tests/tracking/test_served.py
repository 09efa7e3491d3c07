"""What people reach over HTTP: a served model, and a run on an MLflow server with PostgreSQL and passwords."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

import metadist
from metadist.core.task import TaskId
from metadist.run.build import Job
from tests.tracking.test_models import SMALL

pytestmark = [
    pytest.mark.wide,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]
USER, PASSWORD = "admin", "a long password 1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def process(arguments, log: Path, health: str, **environment):
    """A server in a session of its own, once it answers, ended with all that it started."""
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *arguments], stdout=out, stderr=out, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 180
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(health, timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def post(address: str, body) -> tuple[int, str]:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_served_model_answers_as_load_does_and_two_hundred_at_once(tmp_path, mlflow_database, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(mlflow_database, tmp_path)
    config = metadist.load_config([], [*SMALL, f"run_dir={tmp_path / 'run'}", "tracking.register=digits"])
    metadist.train(config, quiet=True)
    task = Job(config).source(TaskId("test", 0, 3))
    x, y, query = task.support.inputs[0], task.support.targets[0], task.query.inputs[0]
    adapted = metadist.load(tmp_path / "run").adapt(x, y)
    port = free_port()
    address = f"http://127.0.0.1:{port}/invocations"
    serve = ["models", "serve", "-m", "models:/digits@best", "--env-manager", "local", "--port", str(port)]
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with process(serve, tmp_path / "log", f"http://127.0.0.1:{port}/ping", MLFLOW_TRACKING_URI=uri):
        good = {"support_x": x.tolist(), "support_y": y.tolist(), "query_x": query.tolist()}
        status, answer = post(address, {"inputs": good})
        found = json.loads(answer)["predictions"]
        assert status == 200 and found["labels"] == adapted.predict(query).tolist()
        assert np.array_equal(found["probabilities"], adapted.predict_proba(query))
        for name, value in (("support_y", None), ("query_x", [[1.0]]), ("support_y", ["a"] * len(y))):
            bad = {key: given for key, given in {**good, name: value}.items() if given is not None}
            status, answer = post(address, {"inputs": bad})
            assert status == 400 and name in json.loads(answer)["message"].rpartition("Error: ")[2]
        with ThreadPoolExecutor(200) as many:
            answers = list(many.map(lambda _: post(address, {"inputs": good}), range(200)))
        assert {status for status, _ in answers} == {200} and {json.loads(a)["predictions"]["labels"][0] for _, a in answers} == {found["labels"][0]}  # fmt: skip  # noqa: E501


@pytest.fixture
def postgres():
    """The address of a database of its own, where PostgreSQL is installed."""
    programs = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
    if programs is None or shutil.which("runuser") is None or os.geteuid() != 0:
        pytest.skip("no PostgreSQL in /usr/lib/postgresql, or not root: apt-get install postgresql")
    folder = Path(subprocess.run(["runuser", "-u", "postgres", "--", "mktemp", "-d"], check=True, text=True,
                                 capture_output=True).stdout.strip())  # fmt: skip
    port = free_port()

    def run(program: str, *arguments: str) -> None:
        command = ["runuser", "-u", "postgres", "--", str(programs / program), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)

    run("initdb", "-D", str(folder / "data"), "-A", "trust")
    options = f"-p {port} -k {folder} -h 127.0.0.1"
    run("pg_ctl", "-D", str(folder / "data"), "-l", str(folder / "log"), "-o", options, "-w", "start")
    try:
        run("createdb", "-h", "127.0.0.1", "-p", str(port), "mlflow")
        yield f"postgresql+psycopg2://postgres@127.0.0.1:{port}/mlflow"
    finally:
        run("pg_ctl", "-D", str(folder / "data"), "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def test_a_run_on_a_server_with_postgresql_and_passwords(postgres, tmp_path, monkeypatch, capsys):
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    config = tmp_path / "auth.ini"
    config.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{tmp_path}/auth.db\nadmin_username = {USER}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    server = ["server", "--app-name", "basic-auth", "--backend-store-uri", postgres, "--port", str(port),
              "--artifacts-destination", str(tmp_path / "artifacts"), "--workers", "1"]  # fmt: skip
    secrets = {"MLFLOW_FLASK_SERVER_SECRET_KEY": "x" * 32, "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    monkeypatch.setenv("MLFLOW_AUTH_CONFIG_PATH", str(config))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # a busy machine is no outage
    with process(server, tmp_path / "log", f"{uri}/health", **secrets):
        job = metadist.load_config([], [*SMALL, f"run_dir={tmp_path / 'run'}", "tracking.register=digits"])
        results = metadist.train(job)
        said = capsys.readouterr().err
        assert f"MLflow shows this run at {uri}/#/experiments/" in said and "MLflow at" not in said
        client = MlflowClient(uri)
        run = client.get_run((tmp_path / "run" / "mlflow_run_id").read_text())
        assert run.info.status == "FINISHED"
        assert run.data.metrics["test/accuracy"] == results["accuracy"]["after"]["mean"]
        assert len(run.outputs.model_outputs) == 2
        version = client.get_model_version_by_alias("digits", "best")
        assert version.run_id == run.info.run_id
        metadist.evaluate(job, tmp_path / "run", say=lambda text: None)
        query = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
        assert len(client.search_runs([run.info.experiment_id], query)) == 1
        texts = [path.read_text() for path in (tmp_path / "run").rglob("*.*") if path.suffix in (".yaml", ".json")]
        assert not any(PASSWORD in text for text in [*texts, str(run.to_dictionary())])
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
        metadist.train(job.model_copy(update={"run_dir": str(tmp_path / "other")}))
        said = capsys.readouterr().err
        assert re.search("MLflow at .* cannot be written to|did not take the end", said) and "wrong" not in said
