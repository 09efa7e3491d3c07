"""The jobs of the domains: their data is made as their heads say, and theta is the same bits whoever computes it."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from metadist.config import Config, load_config
from metadist.run.api import train
from metadist.run.places import located
from tests.killed import theta_with_a_worker_killed

ROOT = Path(__file__).resolve().parents[2]
JOBS = {path.stem: path for path in sorted((ROOT / "jobs" / "domains").glob("*.yaml"))}
SMALL = [
    "meta_steps=4", "meta_batch_size=8", "engine.chunk_size=2", "checkpoint.every=2", "evaluation.every=0",
    "evaluation.tasks=2", "evaluation.test_tasks=3", "evaluation.baseline_tasks=2", "evaluation.scratch_steps=1",
    "evaluation.joint_steps=2", "engine.gradient_check=false", "tracking.mlflow=false", "optimizer.schedule=constant",
]  # fmt: skip
COMMAND = re.compile(r"^#   +(\S.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("domains")


def made(name: str, folder: Path) -> Path:
    """The job's file, once its data is there: made by the commands in its head, in `folder`. Skips where these need a
    file that is not there, which its reader has to bring."""
    head = re.match(r"(?:#.*\n)*", JOBS[name].read_text())
    assert head
    for command in COMMAND.findall(head[0].replace("\\\n#", "")):
        words = shlex.split(command)
        if words[0] not in ("python", "metadist") or "train" in words:
            pytest.skip(f"its head asks for more than commands that can be run here: {command}")
        program = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "metadist"]
        if "--out" in words and (folder / words[words.index("--out") + 1]).exists():
            continue
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*program, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True)
        absent = [word for word in words if f"No such file or directory: {word!r}" in done.stderr]
        if done.returncode and absent and not (folder / absent[0]).exists():
            pytest.skip(f"{absent[0]} is not there, which the job's head takes: {command}")
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    return JOBS[name]


def small(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Config:
    path = made(name, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(ROOT))
    config = load_config([path], [*SMALL, *overrides])
    if place := config.data.options.get("path"):  # of a source, which metadist does not know to be a path
        config = load_config([path], [*SMALL, *overrides, f"data.options.path={folder / place}"])
    for needed in (config.data.path, config.model.weights):
        if needed and not Path(needed).exists():
            pytest.skip(f"{needed} is not there, and the job's head has no command that makes it here")
    return located(config)


def test_a_job_is_skipped_only_where_a_file_that_its_head_takes_is_absent(tmp_path):
    with pytest.raises(pytest.skip.Exception, match="data_full.json is not there"):
        made("clinc150_pretrain", tmp_path)
    (tmp_path / "data_full.json").write_text("{}")
    with pytest.raises(pytest.skip.Exception, match="domains.json is not there"):
        made("clinc150_pretrain", tmp_path)
    (tmp_path / "domains.json").write_text("no JSON")
    with pytest.raises(AssertionError, match="JSONDecodeError"):
        made("clinc150_pretrain", tmp_path)


@pytest.mark.wide
@pytest.mark.parametrize("name", JOBS)
def test_workers_and_resuming_change_no_bit_of_a_job(name, folder, monkeypatch, tmp_path):
    local = "fleet.backend=local"
    whole = train(small(name, folder, monkeypatch, local, "num_workers=1", f"run_dir={tmp_path}/whole"), quiet=True)
    parts = [local, "num_workers=2", f"run_dir={tmp_path}/parts"]
    train(small(name, folder, monkeypatch, *parts, "meta_steps=2", "evaluation.baselines=[]"), quiet=True)
    parts = train(small(name, folder, monkeypatch, *parts, "num_workers=3"), resume="auto", quiet=True)
    measure = whole["measure"]["name"]
    assert (parts["theta_sha256"], parts[measure]) == (whole["theta_sha256"], whole[measure])
    assert whole["baselines"] == parts["baselines"] != {}
    assert all((tmp_path / "whole" / figure).exists() for figure in whole["figures"])


@pytest.mark.wide
@pytest.mark.ray
@pytest.mark.parametrize("name", JOBS)
def test_a_worker_killed_on_ray_changes_no_bit_of_a_job(name, ray_cluster, folder, monkeypatch, tmp_path):
    more = ["fleet.backend=local", "evaluation.baselines=[]", "evaluation.figures={}", f"run_dir={tmp_path}/alone"]
    alone = train(small(name, folder, monkeypatch, *more, "num_workers=1"), quiet=True)
    assert theta_with_a_worker_killed(small(name, folder, monkeypatch), 2) == (alone["theta_sha256"], 1)
