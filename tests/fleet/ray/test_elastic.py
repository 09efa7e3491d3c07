"""Runs on clusters that change: nodes that an autoscaler starts and ends, and one that is told to end; more workers."""

import json
import os
import shutil
import signal
import sys
import urllib.request
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from metadist.checkpoint.journal import read_journal
from metadist.config import load_config
from metadist.run.api import train
from metadist.run.saved import scale
from metadist.tracking.jsonl import read_metrics
from tests.fleet.ray import nodes

pytestmark = [pytest.mark.ray, pytest.mark.wide]

HEAD_ID = "f" * 51 + "00000"
AUTOSCALER = """
cluster_name: elastic
max_workers: 3
idle_timeout_minutes: 0.1
provider:  # the wheel has no defaults for `type: fake_multinode`, so its class is named
  type: external
  module: ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider
  head_node_id: %(head)s
  gcs_address: %(address)s
  launch_multiple: true
auth: {}
head_node_type: ray.head.default
available_node_types:
  ray.head.default: {resources: {CPU: 0}, node_config: {}, max_workers: 0}
  small: {resources: {CPU: 1, object_store_memory: 100000000}, node_config: {}, min_workers: 0, max_workers: 3}
setup_commands: []
head_setup_commands: []
worker_setup_commands: []
initialization_commands: []
head_start_ray_commands: []
worker_start_ray_commands: []
file_mounts: {}
cluster_synced_files: []
file_mounts_sync_continuously: false
rsync_exclude: []
rsync_filter: []
"""
AUTOSCALED = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
}


@pytest.fixture
def folder(tmp_path):
    """A folder with a short path, for Ray's sockets, and a task source in it."""
    short = Path("/tmp", f"el{os.getpid()}")
    short.mkdir()
    (short / "sleepy.py").write_text(nodes.SOURCE)
    yield short
    shutil.rmtree(short, ignore_errors=True)


def steps_of(run: Path) -> list[dict]:
    with suppress(FileNotFoundError):
        return [row for row in read_journal(run / "journal.jsonl") if "applied" in row]
    return []


def steps_done(run: Path) -> int:
    return len(steps_of(run))


def workers_of(run: Path, last: int) -> set[int]:
    """Who computed the last steps."""
    return {bundle[2] for row in steps_of(run)[-last:] for bundle in row["bundles"]}


def theta(folder: Path, name: str, *overrides: str) -> str:
    """Of the same run in this process."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        job = [*nodes.JOB, *overrides, "fleet.backend=local", f"run_dir={folder / name}"]
        return train(load_config([], job), quiet=True)["theta_sha256"]
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("sleepy", None)


def test_an_autoscaler_starts_nodes_for_workers_and_ends_those_that_are_idle(folder, monkeypatch):
    """No node, two, one; theta as in one process. Meanwhile what is waited for is told."""
    monkeypatch.chdir(folder)
    run, job = folder / "run", ["meta_steps=120", "meta_batch_size=8", "num_workers=2"]
    port = nodes.free_port()
    (folder / "autoscaler.yaml").write_text(AUTOSCALER % {"head": HEAD_ID, "address": f"127.0.0.1:{port}"})
    with nodes.head(folder, f"--autoscaling-config={folder}/autoscaler.yaml", port=port, **AUTOSCALED) as address:
        assert nodes.alive(address) == [HEAD_ID]
        own = [*job, "data.options={sleep_s: 0.08}", f"run_dir={run}", f"fleet.address={address}"]
        command = [sys.executable, "-m", "metadist", "train", *nodes.JOB, *own]
        with nodes.process(command, folder / "train.log") as driver:
            nodes.wait_for(lambda: steps_done(run) and len(nodes.alive(address)) == 3, 150, driver)
            scale(run, 1)
            nodes.wait_for(lambda: len(nodes.alive(address)) == 2, 60, driver)
            assert driver.wait(120) == 0
    said = (folder / "train.log").read_text()
    assert "1 node with 0 CPUs" in said and "autoscaler" in said
    found = json.loads((run / "results.json").read_text())
    assert found["theta_sha256"] == theta(folder, "local", *job)


def test_a_node_that_is_told_to_end_is_drained_and_its_worker_replaced(folder, monkeypatch):
    """SIGTERM to `ray start --block`, as Kubernetes sends it to a pod. Meanwhile Ray's metrics tell of the run, and of
    the worker that is killed after that."""
    monkeypatch.chdir(folder)
    run, job, port = folder / "run", ["meta_steps=160", "meta_batch_size=8", "num_workers=2"], nodes.free_port()
    often = {"RAY_metrics_report_interval_ms": "500"}
    with ExitStack() as stack:
        address = stack.enter_context(nodes.head(folder, f"--metrics-export-port={port}", **often))
        drained, _ = (stack.enter_context(nodes.node(folder, address, name)) for name in ("a", "b"))
        own = [*job, "data.options={sleep_s: 0.08}", f"run_dir={run}/", f"fleet.address={address}"]
        command = [sys.executable, "-m", "metadist", "train", *nodes.JOB, *own]
        driver = stack.enter_context(nodes.process(command, folder / "train.log", **often))
        nodes.wait_for(lambda: workers_of(run, 10) == {0, 1}, 150, driver)
        stack.enter_context(nodes.node(folder, address, "c"))
        drained.send_signal(signal.SIGTERM)
        nodes.wait_for(lambda: steps_done(run) > 130, 150, driver)
        metrics, said = exported(port, run.name), (folder / "train.log").read_text()
        assert "its node is being taken away" in said and "was lost" not in said
        assert workers_of(run, 1000) == {0, 1, 2}
        assert (last := workers_of(run, 10)) in ({0, 2}, {1, 2})
        os.kill(process_of(run, max(last)), signal.SIGKILL)
        nodes.wait_for(lambda: exported(port, run.name).get("workers_lost_total") == 1, 60, driver)
        assert driver.wait(150) == 0
        assert drained.wait(30) is not None
    assert (folder / "train.log").read_text().count("was lost") == 1
    times = [row["time"] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]
    assert max(later - earlier for earlier, later in pairwise(times)) < 10
    assert json.loads((run / "results.json").read_text())["theta_sha256"] == theta(folder, "local", *job)
    losses = [row["train/loss"] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]
    assert metrics["tasks_total"] == 8 * metrics["step_seconds_count"] >= 8 * 60
    assert (metrics["workers_target"], metrics["meta_batch_size"]) == (2, 8)
    assert metrics["workers_alive"] in (1, 2) and metrics.get("workers_lost_total", 0) == 0
    assert any(metrics["meta_loss"] == pytest.approx(loss) for loss in losses)
    assert 0.1 * metrics["step_seconds_count"] < metrics["step_seconds_sum"] < times[-1] - times[0] + 60


def process_of(run: Path, worker: int) -> int:
    """Of the worker, by the journal's `host:process`."""
    return next(int(bundle[-1].rpartition(":")[2]) for row in steps_of(run)[::-1] for bundle in row["bundles"]
                if bundle[2] == worker)  # fmt: skip


def exported(port: int, run: str) -> dict[str, float]:
    """What Prometheus would read of a run at a node: values by name, without ray_metadist_."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    own = [line for line in lines if line.startswith("ray_metadist_") and f'run="{run}"' in line]
    own = [line for line in own if "_bucket{" not in line]
    return {line.partition("{")[0].removeprefix("ray_metadist_"): float(line.rpartition(" ")[2]) for line in own}


def test_workers_that_join_raise_tasks_a_step_and_tasks_a_second(folder, monkeypatch):
    """From one worker to three, where the meta-batch grows with them."""
    monkeypatch.chdir(folder)
    run, job = folder / "run", ["meta_steps=60", "tasks_per_worker=4", "num_workers=1", "fleet.cpus_per_worker=0.5"]
    own = [*job, "data.options={sleep_s: 0.1}", f"run_dir={run}"]
    with nodes.process([sys.executable, "-m", "metadist", "train", *nodes.JOB, *own], folder / "train.log") as driver:
        nodes.wait_for(lambda: steps_done(run) >= 15, 150, driver)
        scale(run, 3)
        assert driver.wait(200) == 0
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]
    assert {row["train/meta_batch_size"] for row in rows} == {4, 12}
    assert all(row["train/meta_batch_size"] == 4 * row["workers/target"] for row in rows)
    before = [row["workers/tasks_per_s"] for row in rows if row["workers/alive"] == 1 and row["workers/target"] == 1]
    after = [row["workers/tasks_per_s"] for row in rows if row["workers/alive"] == 3]
    assert median(after) > 1.5 * median(before)
