"""What `auto` stands for, where a job is looked at and where it is run."""

import json

import pytest
import yaml

from metadist.config import load_config
from metadist.core.errors import SUBMITTED_BY
from metadist.run.auto import backend
from metadist.run.build import Job
from tests.cli.command import run

JOB = "data: {family: digits}\ntask: {ways: 3, queries: 3}\nmeta_steps: 2\nfleet: {backend: local}\n" \
      "evaluation: {every: 0, test_tasks: 3, baselines: [nearest_class_mean]}\ntracking: {mlflow: false}\n"  # fmt: skip


def test_show_says_what_auto_is_and_loads_as_the_job_it_shows(tmp_path):
    (tmp_path / "job.yaml").write_text(JOB)
    done = run("config", "show", "job.yaml", "engine.chunk_size=3", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    for line in ("  name: conv4", "  kind: vmap", "  scheme: classes", "loss: cross_entropy", "meta_batch_size: 32"):
        assert f"{line}  # chosen" in done.stdout, line
    assert "  chunk_size: 3\n" in done.stdout and ": auto" not in done.stdout
    (tmp_path / "shown.yaml").write_text(done.stdout)
    config = load_config([tmp_path / "shown.yaml"])
    assert config.model_dump(mode="json") == yaml.safe_load(done.stdout)
    assert config.data == load_config([tmp_path / "job.yaml"]).data


def test_where_the_data_is_not_there_auto_stays_and_it_is_said(tmp_path):
    (tmp_path / "job.yaml").write_text(JOB)
    done = run("config", "show", "job.yaml", "data.path=data/none", cwd=tmp_path)
    assert done.returncode == 0 and "auto is not resolved: there is no data in data/none yet" in done.stderr
    assert "  scheme: auto  # decided when the run begins" in done.stdout
    assert yaml.safe_load(done.stdout)["engine"]["kind"] == "auto"


def test_looking_at_a_job_runs_no_code_that_it_names(tmp_path):
    (tmp_path / "not_to_be_run.py").write_text("raise SystemExit('run')")
    for own in ("model: {name: not_to_be_run:Net}", "loss: not_to_be_run:loss", "learner: {name: not_to_be_run:Own}"):
        (tmp_path / "job.yaml").write_text(f"{JOB}{own}\n")
        for typed in ([], ["data.path=x"], ["learner.name=fomaml"] * (own[:7] != "learner")):
            done = run("config", "show", "job.yaml", *typed, cwd=tmp_path)
            assert done.returncode == 0 and "not_to_be_run:" in done.stderr and "when the run begins" in done.stderr


def test_a_run_says_and_keeps_what_it_chose(tmp_path):
    (tmp_path / "job.yaml").write_text(JOB)
    done = run("train", "job.yaml", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("chosen where the job says nothing: ")]
    assert "model.name=conv4 " in line and "engine.kind=vmap" in line and "baselines" not in line
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["resolved"]["model.name"] == "conv4" and results["resolved"]["task.scheme"] == "classes"
    again = run("train", "job.yaml", "run_dir=again", *line.partition(": ")[2].split(), cwd=tmp_path)
    theta = json.loads((tmp_path / "again" / "results.json").read_text())["theta_sha256"]
    assert again.returncode == 0 and theta == results["theta_sha256"]
    assert run("evaluate", "run", "--json", cwd=tmp_path).stdout.count('"model.name": "conv4"') == 1


SINUSOID = ["data.family=sinusoid", "task.shots=10", "model.name=mlp", "model.hidden=[40,40]", "fleet.backend=auto"]


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ([], "local"),
        (["meta_batch_size=1000"], "local"),
        (["learner.inner_steps=4"], "local"),  # 5 times 1,761
        (["learner.inner_steps=5"], "ray"),
        (["model.hidden=[100]"], "local"),
        (["model.hidden=[100,100]"], "ray"),
        (["num_workers=1"], "ray"),
        (["num_workers=2"], "ray"),
        (["tasks_per_worker=8"], "ray"),
        (["fleet.address=10.0.0.1:6379"], "ray"),
        (["fleet.gpus_per_worker=1"], "ray"),
        (["fleet.servers=2"], "ray"),
        (["optimizer.max_staleness=1"], "ray"),
        (["fleet.backend=ray"], "ray"),
        (["fleet.backend=local", "num_workers=2"], "local"),
    ],
    ids=" ".join,
)
def test_small_networks_of_which_no_workers_are_asked_for_stay_in_one_process(asked, chosen, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config([], [*SINUSOID, *asked])
    assert backend(config, Job(config).engine("cpu")) == chosen


def test_convolutions_are_computed_by_workers(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    job = ["data.family=digits", "model.name=conv4", "model.channels=2", "fleet.backend=auto"]
    assert Job(load_config([], job)).engine("cpu").layout.size < 1000
    assert backend(load_config([], job), Job(load_config([], job)).engine("cpu")) == "ray"


@pytest.mark.parametrize("name", ["RAY_ADDRESS", SUBMITTED_BY])
def test_a_job_that_was_sent_to_a_cluster_runs_there(name, monkeypatch):
    monkeypatch.setenv(name, "10.0.0.1:6379")
    config = load_config([], SINUSOID)
    assert backend(config, Job(config).engine("cpu")) == "ray"


def test_the_one_process_is_said_and_saved_and_computes_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    job = [*SINUSOID, "meta_steps=3", "evaluation.every=0", "evaluation.test_tasks=2", "evaluation.baselines=[]",
           "tracking.mlflow=false"]  # fmt: skip
    chosen = run("train", *job, f"run_dir={tmp_path / 'auto'}", cwd=tmp_path)
    asked = run("train", *job, "fleet.backend=local", "num_workers=3", f"run_dir={tmp_path / 'local'}", cwd=tmp_path)
    assert chosen.returncode == asked.returncode == 0
    assert "(fleet.backend=auto is local)" in chosen.stderr and "1 workers" in chosen.stderr
    assert "fleet.backend=auto" not in asked.stderr
    saved = yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())
    assert (saved["fleet"]["backend"], saved["num_workers"]) == ("local", 1)
    found, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("auto", "local"))
    assert found["resolved"]["fleet.backend"] == "local"
    assert found["theta_sha256"] == other["theta_sha256"]
