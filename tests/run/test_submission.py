"""Jobs by a cluster's job server: refusals with a server that is made here, the whole life of a job with Ray's own."""

import json
import os
import platform
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import ray

from metadist.core.errors import InputError
from metadist.run.submission import Refused, job_server
from tests.cli.command import run

ROOT = Path(__file__).resolve().parents[2]
JOB = [
    str(ROOT / "jobs/digits.yaml"), "model.name=mlp", "model.channels=null", "evaluation.test_tasks=4",
    "tracking.mlflow=false", "evaluation.baselines=[]", "evaluation.every=0",
]  # fmt: skip
WITHIN_S = 10


@contextmanager
def server(answers):
    """Address of an HTTP server that gives `answers` [path -> (status, value)], and 404 elsewhere."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, value = answers.get(self.path, (404, {}))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def cluster(**other):
    versions = {"rayVersion": ray.__version__, "pythonVersion": platform.python_version(), **other}
    return {
        "/api/version": (200, {"version": "4", "ray_version": versions["rayVersion"]}),
        "/api/v0/cluster_metadata": (200, {"data": versions}),
        "/api/jobs/": (200, []),
    }


def command(*arguments, cwd=None):
    """A command in this process, with no cluster in the environment."""
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            patch.setenv(name, "")
        return run(*arguments, cwd=cwd or Path(folder))


def refusal(*arguments, cwd=None):
    """The sentence with which a command ends, within seconds."""
    began = time.monotonic()
    done = command(*arguments, cwd=cwd)
    assert time.monotonic() - began < WITHIN_S
    assert done.returncode == 2
    *notes, sentence = done.stderr.strip().splitlines()
    assert all(note.startswith(("x: ", "making the built-in data")) for note in notes), notes
    return sentence


def submit(address, *more):
    return refusal("submit", *JOB, "run_dir=/shared/runs/x", f"--address={address}", *more)


def test_an_address_at_which_nothing_answers():
    assert "ssh -L" in submit("http://127.0.0.1:9")


def test_an_address_that_takes_calls_and_never_answers():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "nothing answers" in refusal("status", "x", f"--address=http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "auto", "ray://head:10001"])
def test_an_address_for_drivers_is_told_from_that_of_the_job_server(address):
    assert ":8265" in submit(address)


def test_no_address_at_all():
    assert "--address" in refusal("submit", *JOB, "run_dir=/shared/runs/x")


def test_a_server_that_is_not_rays():
    with server({}) as address:
        assert "no job server" in submit(address)


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_wants_another_token(status):
    with server({"/api/version": (status, {})}) as address:
        assert "RAY_AUTH_TOKEN_PATH" in submit(address)


@pytest.mark.parametrize("other", [{"rayVersion": "2.59.0"}, {"pythonVersion": "3.12.1"}])
def test_a_cluster_of_other_versions(other):
    with server(cluster(**other)) as address:
        sentence = submit(address)
    assert next(iter(other.values())) in sentence and ray.__version__ in sentence


def test_a_server_with_rays_version_alone_is_no_job_server():
    with server({**cluster(), "/api/v0/cluster_metadata": (200, {})}) as address:
        assert "no job server" in submit(address)


def test_the_server_that_is_given_is_asked_whatever_the_environment_names(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://10.0.0.1:8265")
    with server(cluster()) as address:
        assert job_server(address).list_jobs() == []
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://10.0.0.1:8265"


def test_a_server_that_fails_for_a_moment_is_not_one_that_has_lost_the_job():
    """Which `follow` would give up for good; one that it does not know it says."""
    with server({**cluster(), "/api/jobs/x-1": (500, "Traceback\nGcsTimeout")}) as address:
        asked = job_server(address)
        assert asked.info("y-1") is None
        with pytest.raises(Refused, match="500"):
            asked.info("x-1")


def test_an_error_of_the_server_is_one_sentence():
    with server({**cluster(), "/api/jobs/": (500, "GcsTimeout")}) as address:
        sentence = refusal("status", "x", f"--address={address}")
        assert address in sentence and "500" in sentence and "GcsTimeout" in sentence


def test_an_unknown_job_is_said_with_those_there_are():
    known = {"submission_id": "y-1", "type": "SUBMISSION", "status": "RUNNING", "entrypoint": "x",
             "metadata": {"metadist.job": "y", "metadist.run_dir": "/r"}}  # fmt: skip
    with server({**cluster(), "/api/jobs/": (200, [known])}) as address:
        assert "it has y" in refusal("status", "x", f"--address={address}")


@pytest.mark.parametrize(
    ("other", "arguments", "said"),
    [
        (("y", "/shared/runs//x/"), [], ["y-1 runs in run_dir=/shared/runs/x already", "metadist stop y", "--name y"]),
        (("x", "/shared/runs/z"), [], ["y-1 runs with another run_dir, /shared/runs/z,", "--name"]),
        (("x", "/shared/runs/x"), [], ["y-1 runs with other settings"]),
        (("y", "s3://b/x?region=a"), ["run_dir=s3://b/x/?region=b"], ["y-1 runs in run_dir=s3://b/x/"]),
    ],
)
def test_a_job_that_would_get_in_the_way_of_one_that_runs_is_refused(other, arguments, said):
    metadata = {"metadist.job": other[0], "metadist.run_dir": other[1], "metadist.settings": "0"}
    known = {"submission_id": "y-1", "type": "SUBMISSION", "status": "RUNNING", "entrypoint": "x", "metadata": metadata}
    with server({**cluster(), "/api/jobs/": (200, [known])}) as address:
        sentence = submit(address, *arguments)
    assert all(words in sentence for words in said), sentence


def test_an_upload_that_is_too_large_names_the_largest(tmp_path):
    for name, mib in (("small.bin", 1), ("large.bin", 150)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(mib << 20)
    included = ["--include", "large.bin", "--include", "small.bin"]
    with server(cluster()) as address:
        arguments = [*JOB, "run_dir=/shared/runs/x", f"--address={address}", *included]
        sentence = refusal("submit", *arguments, cwd=tmp_path)
    assert "large.bin 150.0 MiB" in sentence and "100.0 MiB" in sentence


def test_a_password_in_the_address_of_mlflow_is_not_sent(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hush@server:5000")
    with server(cluster()) as address:
        sentence = submit(address, "tracking.mlflow=true")
    assert "MLFLOW_TRACKING_PASSWORD" in sentence and "hush" not in sentence


def test_what_would_be_sent_is_shown_without_a_cluster(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    done = command("submit", *JOB, "run_dir=/shared/runs/x", "--dry-run")
    plan = json.loads(done.stdout)
    assert list(plan["files"]) == ["metadist-job.yaml"]
    assert plan["environment"]["MLFLOW_TRACKING_URI"] == "http://server:5000"
    assert plan["environment"]["RAY_JOB_STOP_WAIT_TIME_S"] == "120"
    assert plan["metadata"]["metadist.run_dir"] == "/shared/runs/x"
    assert plan["entrypoint"].endswith("--resume auto")


def test_resume_auto_as_with_train_is_taken_and_said_to_be_needless():
    done = command("submit", *JOB, "run_dir=/shared/runs/x", "--dry-run", "--resume", "auto")
    assert json.loads(done.stdout)["entrypoint"].endswith("--resume auto")
    assert "--resume auto may be left out" in done.stderr
    other = command("submit", *JOB, "run_dir=/shared/runs/x", "--dry-run", "--resume", "/shared/runs/y")
    assert other.returncode == 2 and "is not 'auto'" in other.stderr


def test_a_job_at_a_uri_is_named_without_its_options():
    run_dir = "run_dir=s3://bucket/runs/few-shot/?region=eu-west-1"
    plan = json.loads(command("submit", *JOB, run_dir, "--dry-run").stdout)
    assert plan["metadata"]["metadist.job"] == "few-shot"


def test_a_run_that_is_seen_here_needs_no_cluster_but_one_that_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("data: {family: digits}\ntracking: {mlflow: false}\n")
    assert "nothing answers" in refusal("status", str(tmp_path), "--address=http://127.0.0.1:9")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    done = run("status", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0 and "stopped" in done.stdout and "http://127.0.0.1:9" in done.stderr


def test_of_a_run_at_a_uri_that_only_the_cluster_may_read_the_jobs_log_is_shown():
    run_dir = "s3://bucket/r?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    known = {"submission_id": "y-1", "type": "SUBMISSION", "status": "RUNNING", "entrypoint": "x",
             "metadata": {"metadist.job": "y", "metadist.run_dir": run_dir}}  # fmt: skip
    logs = {"/api/jobs/y-1/logs": (200, {"logs": "step 3\nstep 4\n"})}
    with server({**cluster(), "/api/jobs/": (200, [known]), **logs}) as address:
        done = command("status", "y", f"--address={address}")
    assert done.returncode == 0 and "step 4" in done.stdout and "endpoint_override" in done.stderr


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """Address, token file and folder of a cluster of one node with a token, which runs jobs with this Python."""
    folder = Path("/tmp") / f"mds-{os.getpid()}"  # Ray's sockets need a short path
    folder.mkdir()
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    port, dashboard, agent = free_port(), free_port(), free_port()
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token), "PYTHONPATH": str(ROOT), "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }  # fmt: skip
    start = ["ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=4",
             "--dashboard-host=127.0.0.1", f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}/ray",
             "--object-store-memory=100000000", "--disable-usage-stats"]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(start, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in (folder / "log").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{dashboard}", token, folder
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        subprocess.run(["rm", "-rf", str(folder)], check=True)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Client:
    """The command line as a user of a cluster types it, in a process of its own."""

    def __init__(self, address, token, folder):
        self.address, self.environment = address, {**os.environ, "RAY_AUTH_MODE": "token"}
        self.environment |= {"RAY_AUTH_TOKEN_PATH": str(token), "PYTHONPATH": str(ROOT)}
        self.environment["METADIST_CACHE"] = str(folder / "cache")

    def start(self, *arguments):
        line = [sys.executable, "-m", "metadist", *arguments, f"--address={self.address}"]
        return subprocess.Popen(line, cwd=ROOT, env=self.environment, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT)  # fmt: skip

    def run(self, *arguments, timeout_s=240):
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=timeout_s)
        return process.returncode, output


def wait_for(condition, timeout_s=200):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    return found


@pytest.mark.ray
@pytest.mark.wide
def test_a_job_is_submitted_left_found_again_stopped_and_continued(head, tmp_path):
    """The end has the theta of a run that nobody disturbed."""
    client, run_dir = Client(*head), tmp_path / "runs" / "d"
    line = ["submit", *JOB, f"run_dir={run_dir}", "meta_steps=6000", "checkpoint.every=50"]
    status = ["status", "d", "--json"]

    first = client.start(*line)
    wait_for(lambda: (run_dir / "metrics.jsonl").exists() and "train/loss" in (run_dir / "metrics.jsonl").read_text())
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=90)
    assert first.returncode == 130 and "detached" in output and "step" in output

    code, output = client.run(*line[:-2], "meta_steps=601")
    assert code == 2 and "metadist stop d" in output

    again = client.start(*line)
    found = json.loads(client.run(*status)[1])
    assert found["state"] == "running" and found["job"].endswith("running") and found["meta_steps"] == 6000
    code, output = client.run("stop", "d")
    assert code == 0 and "saved at step" in output and "submitting the job again goes on" in output
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 143 and "nothing is submitted" in output and "was stopped" in output
    assert json.loads(client.run("status", str(run_dir), "--json")[1])["state"] == "stopped"

    code, output = client.run(*line)
    assert code == 0 and "continues at step" in output
    assert "succeeded" in client.run("status")[1]
    code, output = client.run("stop", "d")
    assert code == 0 and "had ended already" in output

    undisturbed = tmp_path / "undisturbed"
    done = command("train", *JOB, f"run_dir={undisturbed}", "meta_steps=6000", "fleet.backend=local", "-q")
    assert done.returncode == 0
    theta = [json.loads((folder / "results.json").read_text())["theta_sha256"] for folder in (run_dir, undisturbed)]
    assert theta[0] == theta[1]


@pytest.mark.ray
@pytest.mark.wide
def test_a_job_that_cannot_run_ends_with_its_own_sentence_and_code(head, tmp_path):
    client = Client(*head)
    code, output = client.run("submit", *JOB, f"run_dir={tmp_path}/r", "data.family=null", "data.path=/shared/absent")
    assert code == 2 and "/shared/absent" in output
    code, output = client.run("submit", *JOB, f"run_dir={tmp_path}/r", "task.ways=9")
    assert code == 2 and "ways" in output
    client.environment["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "other")
    (tmp_path / "other").write_text(secrets.token_hex(32))
    code, output = client.run("status")
    assert code == 2 and "RAY_AUTH_TOKEN_PATH" in output


@pytest.mark.ray
@pytest.mark.wide
def test_rays_own_submission_trains_too_and_refuses_a_run_that_would_vanish(head, tmp_path):
    client = Client(*head)
    small = [
        "model.name=mlp",
        "model.channels=null",
        "meta_steps=3",
        "evaluation.test_tasks=4",
        "evaluation.baselines=[]",
    ]

    def ray_submit(run_dir):
        line = ["ray", "job", "submit", "--address", client.address, "--working-dir", ".", "--", "python", "-m",
                "metadist", "train", "jobs/digits.yaml", f"run_dir={run_dir}", *small]  # fmt: skip
        return subprocess.run(line, cwd=ROOT, env=client.environment, capture_output=True, text=True, timeout=240)

    assert ray_submit(tmp_path / "run").returncode == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["meta_steps"] == 3
    lost = ray_submit("runs/x")
    assert lost.returncode != 0 and "vanish" in lost.stdout + lost.stderr


def test_a_job_name_that_ray_could_not_take():
    with pytest.raises(InputError, match="--name"):
        from metadist.config import load_config
        from metadist.run.submission import prepare_submission

        prepare_submission(load_config(["jobs/digits.yaml"]), "a name/with", None, (), "", print)
