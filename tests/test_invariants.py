"""The promise: one theta, to the bit, whatever number of workers ran, died, joined, or where the run was resumed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metadist.checkpoint.format import theta_sha256
from metadist.checkpoint.journal import read_journal
from metadist.config import Config, dump_config, load_config
from metadist.core.errors import InputError
from metadist.core.messages import plan
from metadist.fleet.local import Fault, LocalFleet
from metadist.fleet.server import Server
from metadist.run.api import train
from metadist.run.auto import chunk_size
from metadist.run.build import Job
from metadist.run.prepare import prepare
from metadist.run.replay import replay
from metadist.run.saved import scale

JOB = [
    "data.family=digits",
    "task.ways=3",
    "task.shots=2",
    "task.queries=3",
    "model.name=mlp",
    "model.hidden=[16]",
    "learner.inner_lr=0.1",
    "meta_batch_size=10",
    "engine.chunk_size=3",
    "meta_steps=6",
    "evaluation.every=3",
    "evaluation.tasks=5",
    "evaluation.test_tasks=5",
    "evaluation.baseline_tasks=0",
    "checkpoint.every=2",
    "tracking.mlflow=false",
]


def job(run_dir: Path, *overrides: str) -> Config:
    return load_config([], [*JOB, f"run_dir={run_dir}", *overrides])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> str:
    """theta of the job on one worker in this process."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    return train(job(run_dir, "fleet.backend=local", "num_workers=1"))["theta_sha256"]


def local_theta(workers: int, faults: list[Fault]) -> str:
    """theta of the job on a local fleet whose workers die as scripted."""
    config = load_config([], JOB)
    prepared = prepare(Job(config), [])
    fleet = LocalFleet(lambda: Job(config).worker(), workers, faults=faults)
    server = fleet.start_server(prepared.theta, Job(config).optimization(prepared.engine), None)
    weights = server.weights()
    for step in range(config.meta_steps):
        chunks = plan("train", step, config.batch_size(workers), chunk_size(config, prepared.engine))
        weights, _ = server.apply(step, *fleet.meta_gradients(weights, chunks))
    return theta_sha256(fleet.fetch(weights).theta)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_local_workers_do_not_change_theta(undisturbed, workers):
    assert local_theta(workers, []) == undisturbed


@pytest.mark.parametrize("seed", range(10))
def test_local_deaths_do_not_change_theta(undisturbed, seed):
    faults = [Fault(0.5 + (seed * 7 + i * 5) % 23 / 2, "kill", worker) for i, worker in enumerate([0, 1, 2, 0, 3])]
    assert local_theta(3, faults) == undisturbed


@pytest.mark.parametrize("aggregate", ["task", "chunk"])
def test_each_aggregation_has_one_theta(tmp_path, aggregate):
    def theta(workers: int) -> str:
        overrides = ["fleet.backend=local", f"num_workers={workers}", f"engine.aggregate={aggregate}"]
        return train(job(tmp_path / f"{workers}", *overrides))["theta_sha256"]

    assert theta(1) == theta(3)


@pytest.mark.ray
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.wide), 3])
def test_ray_workers_do_not_change_theta(ray_cluster, tmp_path, undisturbed, workers):
    assert train(job(tmp_path / "run", f"num_workers={workers}"))["theta_sha256"] == undisturbed


SIMULATED = '''
from dataclasses import dataclass

import numpy as np
import torch

from metadist import MAML


@dataclass(frozen=True, kw_only=True)
class Simulated(MAML):
    """Rewards come from a simulator in numpy, which is given what the network does."""

    engines = ("loop",)

    def surrogate(self, theta, fast, part):
        outputs = self.predict(theta, fast, part.inputs)
        rewards = np.tanh(outputs.detach().numpy() * 3) + 1
        return (outputs * torch.from_numpy(rewards)).mean()

    def inner_loss(self, theta, fast, support, k):
        return self.surrogate(theta, fast, support)

    def outer_loss(self, theta, fast, query, context):
        return self.surrogate(theta, fast, query)
'''


def test_a_simulator_outside_torch_gives_one_theta_on_any_number_of_workers(tmp_path, monkeypatch):
    """Each worker has more than enough calls for a recording to be made."""
    (tmp_path / "tests_simulated.py").write_text(SIMULATED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ["learner.name=tests_simulated:Simulated", "engine.chunk_size=1", "evaluation.every=0", "fleet.backend=local"]
    one, two = (train(job(tmp_path / f"run{n}", *own, f"num_workers={n}"), quiet=True) for n in (1, 2))
    assert one["theta_sha256"] == two["theta_sha256"]


@pytest.mark.ray
def test_a_worker_killed_in_a_step_does_not_change_theta(ray_cluster, tmp_path, undisturbed):
    from metadist.fleet.ray.fleet import RayFleet

    config = job(tmp_path / "run")
    prepared = prepare(Job(config), [])
    said: list[str] = []
    fleet = RayFleet(lambda: Job(config).worker(), 2, say=said.append)
    server = fleet.start_server(prepared.theta, Job(config).optimization(prepared.engine), None)
    weights = server.weights()
    for step in range(config.meta_steps):
        chunks = plan("train", step, 10, 3)
        if step in (2, 4):
            os.kill(next(iter(fleet.pids.values())), signal.SIGKILL)
        weights, _ = server.apply(step, *fleet.meta_gradients(weights, chunks))
    theta = fleet.fetch(weights).theta
    fleet.close()
    assert theta_sha256(theta) == undisturbed
    assert sum("was lost" in text for text in said) == 2


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_resume_does_not_change_theta(tmp_path, undisturbed, stop_at):
    run_dir = tmp_path / "run"
    train(job(run_dir, "fleet.backend=local", f"meta_steps={stop_at}"))
    told = train(job(run_dir, "fleet.backend=local", "num_workers=3"), resume="auto")
    assert told["theta_sha256"] == undisturbed


@pytest.mark.ray
def test_a_killed_driver_resumes_to_the_same_theta(ray_cluster, tmp_path):
    import ray

    run_dir, steps = tmp_path / "run", ["meta_steps=150", "evaluation.every=0"]
    (tmp_path / "job.yaml").write_text(dump_config(job(run_dir, *steps)))
    command = [sys.executable, "-m", "metadist", "train", "job.yaml", "-q", "--resume", "auto"]
    command += ["--address", ray.get_runtime_context().gcs_address]
    driver = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL)
    wait_for(lambda: any(entry.get("done", 0) >= 10 for entry in read_journal(run_dir / "journal.jsonl")), driver)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert max(entry.get("step", 0) for entry in read_journal(run_dir / "journal.jsonl")) < 149
    continued = train(job(run_dir, *steps, "fleet.backend=local"), resume="auto", quiet=True)
    whole = train(job(tmp_path / "whole", *steps, "fleet.backend=local"), quiet=True)
    assert continued["theta_sha256"] == whole["theta_sha256"]
    assert continued["meta_steps"] == 150


def test_tasks_per_worker_follows_the_target_and_replays_to_the_same_theta(tmp_path):
    run_dir = tmp_path / "run"
    grows = ["meta_batch_size=null", "tasks_per_worker=4", "fleet.backend=local", "num_workers=1"]
    train(job(run_dir, *grows, "meta_steps=2"))
    scale(run_dir, 2)
    train(job(run_dir, *grows, "meta_steps=4"), resume="auto")
    scale(run_dir, 3)
    told = train(job(run_dir, *grows, "meta_steps=6"), resume="auto")
    batches = {entry["step"]: entry["tasks"] for entry in read_journal(run_dir / "journal.jsonl") if "step" in entry}
    assert list(batches.values()) == [4, 4, 8, 8, 12, 12]
    assert replay(run_dir, print)["theta_sha256"] == told["theta_sha256"]


def test_a_journalled_target_is_replayed_on_resume(tmp_path):
    """Steps that were dealt before a crash are dealt again as they were, though the target has changed since."""
    run_dir = tmp_path / "run"
    grows = ["meta_batch_size=null", "tasks_per_worker=4", "fleet.backend=local", "num_workers=1"]
    train(job(run_dir, *grows, "meta_steps=2"))
    with (run_dir / "journal.jsonl").open("a") as journal:
        journal.write('{"step": 2, "target": 3, "tasks": 12}\n')
    train(job(run_dir, *grows, "meta_steps=4"), resume="auto")
    batches = {entry["step"]: entry["tasks"] for entry in read_journal(run_dir / "journal.jsonl") if "step" in entry}
    assert batches == {0: 4, 1: 4, 2: 12, 3: 4}


def test_without_a_checkpoint_the_tasks_of_each_step_are_still_known(tmp_path, capsys):
    run_dir = tmp_path / "run"
    grows = job(run_dir, "meta_batch_size=null", "tasks_per_worker=4", "fleet.backend=local", "num_workers=1")
    told = train(grows)
    with (run_dir / "journal.jsonl").open("a") as journal:
        journal.write('{"step": 2, "target": 3, "tasks": 12}\n{"step": 3, "target": 3, "tasks": 12}\n')
    scale(run_dir, 2)
    shutil.rmtree(run_dir / "checkpoints")
    again = train(grows.model_copy(update={"num_workers": 2}), resume="auto")
    assert "has no checkpoint: its 6 meta-steps are computed again, each with the tasks" in capsys.readouterr().err
    batches = {entry["step"]: entry["tasks"] for entry in read_journal(run_dir / "journal.jsonl") if "step" in entry}
    assert list(batches.values()) == [4, 4, 12, 12, 4, 4]
    assert again["theta_sha256"] != told["theta_sha256"]
    shutil.rmtree(run_dir / "checkpoints")
    train(job(run_dir, "meta_batch_size=null", "tasks_per_worker=5", "fleet.backend=local"), resume="auto")
    batches = [entry["tasks"] for entry in read_journal(run_dir / "journal.jsonl") if "step" in entry]
    assert batches == [10] * 6, "another job begins anew"


DELAY = "optimizer.delay=1"


def test_with_a_delay_each_gradient_is_of_the_weights_one_step_before(tmp_path):
    """By hand: theta_{k+1} = server(theta_k, gradient at theta_{k-1})."""
    config = job(tmp_path / "run", "fleet.backend=local", DELAY)
    prepared = prepare(Job(config), [])
    worker = Job(config).worker()
    server = Server(prepared.theta, Job(config).optimization(prepared.engine))
    behind = weights = server.weights()
    for step in range(config.meta_steps):
        results = [worker.meta_gradients(behind, chunk) for chunk in plan("train", step, 10, 3)]
        behind, (weights, _) = weights, server.apply(step, *results, num_tasks=10)
    assert train(config)["theta_sha256"] == theta_sha256(weights.theta)


def test_a_delayed_run_has_one_theta_too_and_can_be_resumed_and_replayed(tmp_path, undisturbed):
    def theta(name: str, *overrides: str, resume: str | None = None) -> str:
        return train(job(tmp_path / name, "fleet.backend=local", DELAY, *overrides), resume=resume)["theta_sha256"]

    whole = theta("whole")
    assert whole != undisturbed
    assert theta("three", "num_workers=3") == whole
    theta("parts", "meta_steps=3")
    assert theta("parts", "num_workers=2", resume="auto") == whole
    assert replay(tmp_path / "whole", print)["theta_sha256"] == whole


@pytest.mark.ray
def test_a_delayed_run_on_ray_has_the_theta_of_the_local_one(ray_cluster, tmp_path):
    local = train(job(tmp_path / "local", "fleet.backend=local", DELAY))["theta_sha256"]
    assert train(job(tmp_path / "ray", "num_workers=2", DELAY))["theta_sha256"] == local


@pytest.mark.ray
def test_an_asynchronous_run_says_how_stale_its_gradients_were(ray_cluster, tmp_path):
    told = train(job(tmp_path / "run", "num_workers=2", "optimizer.max_staleness=2", "meta_steps=12"))
    ages = {int(age): tasks for age, tasks in told["tasks_by_staleness"].items()}
    assert sum(ages.values()) == 12 * 10 and set(ages) <= {0, 1, 2} and ages.keys() - {0}
    assert told["bit_identical"] is False
    with pytest.raises(InputError, match="asynchronous"):
        replay(tmp_path / "run", print)


def wait_for(condition, process: subprocess.Popen, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "the process ended early"
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)
