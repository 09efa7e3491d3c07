"""A run's whole path over separate hosts, disturbed: `python tests/benchmarks/cluster.py [--short]` (root, Linux).

Hosts of their own (namespaces, see hosts.py): Ray's head without CPUs, two workers, an S3 server, an MLflow server with
a database, and the laptop that the commands are typed on. Nothing is shared but the network: data and run directory are
on S3. A job is submitted; a third worker host joins and the run is scaled to it; a link is cut for 25 s and healed; a
host loses its power; the job is stopped and submitted again. It must end with the theta of an undisturbed run on one
machine, and with one MLflow run, finished, every step in it once. Prints when each was seen.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(ROOT))

from tests.benchmarks.hosts import Hosts, why_not  # noqa: E402

JOB = [
    str(ROOT / "jobs/digits.yaml"), "data.family=null", "model.name=conv4", "model.channels=32", "model.pool=false",
    "meta_batch_size=32", "engine.chunk_size=4", "checkpoint.every=10", "evaluation.every=0",
    "evaluation.test_tasks=20", "evaluation.baselines=[nearest_class_mean]", "tracking.log_every=1",
]  # fmt: skip
SOON = {  # so that a host that is gone counts as dead after ten seconds; sooner, and a busy machine loses live ones
    "RAY_health_check_initial_delay_ms": "0", "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1500", "RAY_health_check_failure_threshold": "5",
}  # fmt: skip
BUCKETS = "import boto3; s3 = boto3.client('s3'); [s3.create_bucket(Bucket=name) for name in ('data', 'runs')]"
UPLOAD = """
import sys
from pyarrow import fs
fs.copy_files(sys.argv[1], sys.argv[2], source_filesystem=fs.LocalFileSystem(),
              destination_filesystem=fs.FileSystem.from_uri('s3://data')[0])
"""


class Site:
    """The hosts of the path, and the commands of whoever sits at the laptop."""

    def __init__(self, hosts: Hosts, folder: Path, meta_steps: int):
        self.hosts, self.folder, self.meta_steps = hosts, folder, meta_steps
        self.began = time.monotonic()
        (folder / "token").write_text(secrets.token_hex(32))
        self.addresses = {
            name: hosts.add(name, number) for name, number in
            {"head": 1, "s3": 2, "mlflow": 3, "laptop": 9, "w1": 11, "w2": 12}.items()
        }  # fmt: skip
        self.environment = {
            **SOON, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "PYTHONPATH": str(ROOT),
            "AWS_ENDPOINT_URL": f"http://{self.addresses['s3']}:5000", "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1", "AWS_REGION": "us-east-1",
            "MLFLOW_TRACKING_URI": f"http://{self.addresses['mlflow']}:5000", "MLFLOW_DISABLE_TELEMETRY": "true",
            "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        self.line = ["submit", *JOB, "data.path=s3://data/digits", "run_dir=s3://runs/digits",
                     f"meta_steps={meta_steps}", "--name", "digits"]  # fmt: skip

    def say(self, what: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {what}", flush=True)

    def serve(self) -> None:
        """Start S3 with the data in it, MLflow, and Ray on three hosts."""
        own = self.environment
        self.hosts.start("s3", ["moto_server", "-H", "0.0.0.0", "-p", "5000"], own)
        database = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--workers", "1"]
        artifacts = ["--artifacts-destination", str(self.folder / "artifacts")]
        self.hosts.start(
            "mlflow", ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000", *database, *artifacts], own
        )
        self.until(lambda: self.on_laptop([sys.executable, "-c", BUCKETS]).returncode == 0, "S3 answers")
        self.here("data", "digits", "--out", str(self.folder / "digits"))
        uploaded = self.on_laptop([sys.executable, "-c", UPLOAD, str(self.folder / "digits"), "data/digits"])
        assert uploaded.returncode == 0, uploaded.stderr
        self.hosts.wait_for("mlflow", "startup complete")
        self.say("S3 and MLflow answer, the data is there")
        dashboard = [f"--dashboard-host={self.addresses['head']}", "--dashboard-port=8265"]
        self.start_ray("head", "--head", "--port=6379", "--num-cpus=0", *dashboard)
        self.hosts.wait_for("head", "Ray runtime started")
        for name in ("w1", "w2"):
            self.start_ray(name, f"--address={self.addresses['head']}:6379", "--num-cpus=1")
        for name in ("w1", "w2"):
            self.hosts.wait_for(name, "Ray runtime started")
        self.say("a head and two workers answer")

    def start_ray(self, name: str, *arguments: str) -> None:
        """A node of Ray, with a cache of its own."""
        own = {**self.environment, "METADIST_CACHE": str(self.folder / f"cache-{name}")}
        common = ["--block", f"--node-ip-address={self.addresses[name]}", "--object-store-memory=200000000"]
        self.hosts.start(name, ["ray", "start", *arguments, *common, "--disable-usage-stats"], own)

    def here(self, *arguments: str) -> str:
        """A command of metadist on this machine, without any of the hosts."""
        done = subprocess.run(
            [sys.executable, "-m", "metadist", *arguments], cwd=ROOT, text=True, capture_output=True,
            env={**os.environ, "METADIST_CACHE": str(self.folder / "cache"), "MLFLOW_TRACKING_URI": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def on_laptop(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        own = {**os.environ, **self.environment, "METADIST_CACHE": str(self.folder / "cache-laptop")}
        return subprocess.run(self.hosts.inside("laptop", command), cwd=self.folder, env=own, text=True,
                              capture_output=True, timeout=300)  # fmt: skip

    def typed(self, *arguments: str) -> str:
        """A command of metadist at the laptop; what it printed."""
        done = self.on_laptop([sys.executable, "-m", "metadist", *arguments, *self.address(arguments[0])])
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def address(self, command: str) -> list[str]:
        return [f"--address=http://{self.addresses['head']}:8265"] if command != "scale" else []

    def submit(self) -> "subprocess.Popen[str]":
        """The job's command line, left running; its output goes to `folder/submit.log`."""
        own = {**os.environ, **self.environment, "METADIST_CACHE": str(self.folder / "cache-laptop")}
        line = self.hosts.inside("laptop", [sys.executable, "-m", "metadist", *self.line, *self.address("submit")])
        with (self.folder / "submit.log").open("a") as log:
            return subprocess.Popen(line, cwd=self.folder, env=own, text=True, stdout=log, stderr=log)

    def log(self) -> str:
        return (self.folder / "submit.log").read_text()

    def until(self, condition: Callable[[], Any], what: str, timeout_s: float = 240) -> None:
        """Wait for it, and print when it was seen."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not seen: {what}\n{self.log()[-4000:]}")
            time.sleep(0.5)
        self.say(what)

    def step(self) -> int:
        """The newest step in the followed log."""
        lines = [line for line in self.log().splitlines() if line.startswith("step ")]
        return int(lines[-1].split()[1].partition("/")[0]) if lines else 0

    def progress(self, steps: int, what: str) -> None:
        """Wait for so many more steps."""
        before = self.step()
        self.until(lambda: self.step() >= min(before + steps, self.meta_steps), what)

    def workers(self) -> int:
        lines = [line for line in self.log().splitlines() if line.startswith("step ") and " worker" in line]
        return int(lines[-1].partition(" worker")[0].split()[-1]) if lines else 0


def disturbed(site: Site, short: bool) -> dict[str, Any]:
    """Submit, add a host, cut, kill, stop, submit again; the results of the run."""
    job = site.submit()
    site.until(lambda: site.step() > 0, "submitted, first step")
    site.addresses["w3"] = site.hosts.add("w3", 13)
    site.start_ray("w3", f"--address={site.addresses['head']}:6379", "--num-cpus=1")
    site.typed("scale", "s3://runs/digits", "3")
    site.until(lambda: site.workers() == 3, "a third host added, and used")
    site.hosts.cut("w1")
    site.say("link of a host cut")
    time.sleep(8 if short else 25)
    site.hosts.heal("w1")
    site.progress(3, "link healed, three steps on")
    site.hosts.power_off("w2")
    site.progress(3, "a host without power, three steps on")
    site.say(site.typed("stop", "digits").strip())
    site.until(lambda: job.poll() is not None, "stopped")
    assert job.returncode == 143, site.log()
    site.say(f"status: {json.loads(site.typed('status', 's3://runs/digits', '--json'))['state']}")
    again = site.submit()
    site.until(lambda: again.poll() is not None, "submitted again, and ended", 600)
    assert again.returncode == 0, site.log()
    read = "from pyarrow import fs; print(fs.FileSystem.from_uri('s3://runs')[0].open_input_stream" \
           "('runs/digits/results.json').read().decode())"  # fmt: skip
    return json.loads(site.on_laptop([sys.executable, "-c", read]).stdout)


def check_mlflow(site: Site) -> None:
    """One run, finished, with each step of the loss once."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{site.folder}/mlflow.db")
    experiment = client.get_experiment_by_name("metadist")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.mlflow.parentRunId IS NULL")
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert run.info.status == "FINISHED", run.info.status
    assert steps == list(range(1, site.meta_steps + 1)), steps
    site.say(f"MLflow: one run, {run.info.status}, {len(steps)} steps, each once")


def whole_path(short: bool) -> None:
    """Walk it; AssertionError or TimeoutError where something is not as it must be."""
    with tempfile.TemporaryDirectory(prefix="mdc", dir="/tmp") as folder:  # Ray's sockets want short paths
        _walk(Path(folder), short)


def _walk(folder: Path, short: bool) -> None:
    with Hosts(folder) as hosts:
        site = Site(hosts, folder, 200 if short else 400)
        try:
            site.serve()
            results = disturbed(site, short)
            check_mlflow(site)
        except BaseException:
            with suppress(OSError):
                print(hosts.log("head")[-2000:], site.log()[-6000:])
            raise
    alone = folder / "alone"
    job = [*JOB, f"data.path={folder}/digits", f"run_dir={alone}", f"meta_steps={site.meta_steps}", "-q"]
    site.here("train", *job, "fleet.backend=local", "tracking.mlflow=false")
    expected = json.loads((alone / "results.json").read_text())["theta_sha256"]
    assert results["theta_sha256"] == expected, (results["theta_sha256"], expected)
    site.say(f"theta {expected[:16]} is that of an undisturbed run on one machine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="200 meta-steps, a cut of 8 s")
    short = parser.parse_args().short
    if reason := why_not():
        sys.exit(f"not here: {reason}")
    whole_path(short)


if __name__ == "__main__":
    main()
