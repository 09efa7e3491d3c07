"""`metadist doctor`: on this machine alone, and of a cluster and a job server that cannot be reached."""

import http.server
import json
import socket
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from metadist.cli.main import commands
from metadist.run import doctor, machine
from metadist.run.machine import Finding
from metadist.tracking.reach import unwritable
from tests.fleet.ray import nodes


@contextmanager
def answering(status: int, body: str = "{}"):
    """A web server that gives one answer to all; its address and the headers that it was asked with."""
    asked: list[dict[str, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(dict(self.headers))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def failures(*arguments: str) -> list[dict[str, str]]:
    """What fails by the command's JSON; its exit code says whether anything does."""
    began = time.monotonic()
    done = CliRunner().invoke(commands, ["doctor", "--json", *arguments], standalone_mode=False)
    assert time.monotonic() - began < 10
    failed = [each for each in json.loads(done.stdout) if each["status"] == "fail"]
    assert done.return_value == (1 if failed else 0)
    return failed


def test_this_machine_alone_is_looked_at_without_ray(monkeypatch, tmp_path):
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "deep" / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = doctor.examine()
    text = "\n".join(finding.what for finding in found)
    assert f"python {sys.version.split()[0]}" in text and f"{tmp_path}/deep/cache" in text
    for topic in ("MLflow", "GPU", "disk", "/dev/shm", "open files", "RAY_AUTH_MODE=disabled"):
        assert topic in text
    assert all(finding.remedy for finding in found if finding.status != "ok")
    assert not (tmp_path / "deep").exists()


def test_the_tokens_file_is_to_be_there_and_private(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    path = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    statuses = []
    for mode in (None, 0o644, 0o600):
        if mode:
            path.touch()
            path.chmod(mode)
        (finding,) = machine.token()
        assert str(path) in finding.what and ("(mode 0644)" in finding.what) == (mode == 0o644)
        statuses.append(finding.status)
    assert statuses == ["fail", "warn", "ok"]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert [finding.status for finding in machine.token()] == ["warn"]


def test_a_process_that_anyone_may_connect_to_without_a_token_is_told(tmp_path, monkeypatch):
    """One that is called as Ray's head is, on all addresses, on loopback, and with a token; also one that was started
    before there was a token."""
    (tmp_path / "gcs_server").symlink_to(sys.executable)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "gcs_server"))  # a file that is there
    log = tmp_path / "log"
    without = ["env", "-u", "RAY_AUTH_MODE"]
    for prefix, mode, host, expected in (
        ([], "disabled", "0.0.0.0", "warn"), ([], "disabled", "127.0.0.1", "ok"), ([], "token", "", "ok"),
        (without, "", "0.0.0.0", "warn"),
    ):  # fmt: skip
        serve = f"import socket, time; s = socket.create_server(({host!r}, 0)); print('up', flush=True); time.sleep(60)"
        with nodes.process([*prefix, str(tmp_path / "gcs_server"), "-c", serve], log, RAY_AUTH_MODE=mode) as started:
            nodes.wait_for(lambda: log.read_text() == "up\n", 30, started)
            (own,) = [each for each in machine.listening() if f"process {started.pid})" in each.what]
            assert own.status == expected
            started.kill()
            started.wait()


def test_a_cluster_that_cannot_be_reached_is_one_sentence(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        for given, remedy in ((address, "start Ray there"), (f"http://{address}", "ssh -L")):
            (failed,) = failures("--address", given)
            assert given in failed["what"] and remedy in failed["what"]


def test_a_job_server_that_wants_a_token_or_is_none_is_one_sentence():
    for status, expected in ((401, "RAY_AUTH_TOKEN_PATH"), (404, "no job server"), (200, "no job server")):
        with answering(status) as (url, _):
            (failed,) = failures("--address", url)
            assert url in failed["what"] and expected in failed["what"]
    both = {"ray_version": "2.2.3", "data": {"rayVersion": "2.2.3", "pythonVersion": sys.version.split()[0]}}
    with answering(200, json.dumps(both)) as (url, _):
        (failed,) = failures("--address", url)
        assert url in failed["what"] and "ray 2.2.3" in failed["what"] and "install" in failed["what"]


def test_mlflow_is_asked_whether_it_takes_anything(tmp_path, monkeypatch):
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    with answering(400, '{"error_code": "RESOURCE_ALREADY_EXISTS"}') as (url, asked):
        assert unwritable(url.replace("//", "//ann:se%2Fcret@")) == ""
        assert asked[0]["Authorization"] == "Basic YW5uOnNlL2NyZXQ="
        assert failures("--mlflow", url) == []
    with answering(401) as (url, _):
        assert "MLFLOW_TRACKING_USERNAME" in unwritable(url)
    (failed,) = failures("--mlflow", url)
    assert url in failed["what"]
    assert "secret" not in unwritable("postgresql://ann:secret@127.0.0.1:1/runs")
    assert "neither" in unwritable("file:///runs")


def test_mlflows_database_is_tried_where_there_is_one(mlflow_database, tmp_path):
    assert unwritable(f"sqlite:///{mlflow_database}") == unwritable(f"sqlite:///{tmp_path}/new/mlflow.db") == ""
    (tmp_path / "mlflow.db").write_text("no database" * 100)
    assert str(tmp_path) in unwritable(f"sqlite:///{tmp_path}/mlflow.db")


def test_unequal_versions_are_told_with_who_has_them(monkeypatch):
    here = machine.versions()
    assert [each.status for each in doctor._compare({doctor._versions(here): ["a", "b"]})] == ["ok"]
    found = list(doctor._compare({doctor._versions(here): ["a"], doctor._versions({**here, "torch": "1.0"}): ["b"]}))
    assert [each.status for each in found] == ["fail", "fail"]
    assert "torch 1.0: b" in " ".join(each.what.replace(f", metadist {here['metadist']}", "") for each in found)


def test_a_clock_that_differs_is_told():
    assert doctor._skew("far", lambda: time.time() - 3).status == "warn"
    assert doctor._skew("near", time.time).status == "ok"


def test_what_the_job_printed_is_read():
    found = [Finding("ok", "all", node="a")]
    printed = json.dumps([each._asdict() for each in found], indent=2)
    assert doctor._read(f"a warning [\n{printed}\n", "SUCCEEDED", "") == found
    (failed,) = doctor._read("Traceback\nNo module named metadist\n", "FAILED", "ray job logs")
    assert failed.status == "fail" and "No module named metadist" in failed.what and "ray job logs" in failed.remedy


@pytest.fixture
def short_folder():
    """For Ray's sockets, whose paths must not be long."""
    with tempfile.TemporaryDirectory(prefix="dr", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.ray
@pytest.mark.wide
def test_each_node_of_a_cluster_is_looked_at_with_the_token_and_by_a_job(short_folder):
    """Joined as a driver, refused with another token; through the job server, by the same command run there."""
    folder = short_folder
    (folder / "token").write_text("a" * 64)
    (folder / "token").chmod(0o600)
    (folder / "other").write_text("b" * 64)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    ports = [nodes.free_port(), nodes.free_port()]
    dashboard = ["--include-dashboard=true", f"--dashboard-port={ports[1]}"]
    path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}  # where the job's `python` is found
    command = [sys.executable, "-m", "metadist", "doctor", "--json", "--address"]
    with (
        nodes.head(folder, *dashboard, port=ports[0], **token, **path) as address,
        nodes.node(folder, address, "a", **token, **path),
    ):
        for place in (address, f"http://127.0.0.1:{ports[1]}"):
            log = folder / "doctor.log"
            with nodes.process([*command, place], log, **token) as asked:
                assert asked.wait(240) == 0, log.read_text()
            found, _ = json.JSONDecoder().raw_decode(log.read_text(), log.read_text().index("[\n"))
            what = [each["what"] for each in found]
            assert "the cluster has 2 nodes" in what and sum("object store" in each for each in what) == 2
            assert sum("clock" in each for each in what) == 2
            assert sum(f"token is in {folder}/token" in each for each in what) >= 2
            other = {**token, "RAY_AUTH_TOKEN_PATH": str(folder / "other")}
            with nodes.process([*command, place], log, **other) as asked:
                assert asked.wait(60) == 1
            assert "does not accept the token" in log.read_text() and place in log.read_text()
