"""The jobs of the domains: their data is made as their heads say, and theta is the same bits whoever computes it."""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from metadist.config import Config, load_config
from metadist.run.api import train
from metadist.run.places import located
from tests.conftest import REAL_DATA
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


@cache
def ran(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command of a head, run once in a folder; a run in it is as short as those of the tests."""
    program, *words = shlex.split(command)
    if words[0] == "train":
        words = ["train", str(ROOT / words[1]), *SMALL, "fleet.backend=local", *words[2:]]
    python = [sys.executable] if program == "python" else [sys.executable, "-m", program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*python, *words], cwd=folder, env=environment, capture_output=True, text=True)


def made(name: str, folder: Path, brought: Path = REAL_DATA) -> Path:
    """The job's file, once its data is there: made by the commands in its head, in `folder`, of files that its reader
    has to bring, from `brought`. Skips where these are not there, or a package is not."""
    head = re.match(r"(?:#.*\n)*", JOBS[name].read_text())
    assert head
    if "Needs rdkit" in head[0]:
        pytest.importorskip("rdkit")
    files = {path.name: path for path in brought.rglob("*") if path.is_file()}
    for command in COMMAND.findall(head[0].replace("\\\n#", "")):
        words = shlex.split(command)
        for file in {Path(word).name for word in words} & files.keys():
            if not (folder / file).exists():
                (folder / file).symlink_to(files[file])
        if words[0] == "curl":
            if not (folder / Path(words[-1]).name).exists():
                pytest.skip(f"{Path(words[-1]).name} is not in {brought}: put it there ({command})")
            continue
        done = ran(command, folder)
        absent = [word for word in words if f"No such file or directory: {word!r}" in done.stderr]
        if done.returncode and absent and not (folder / absent[0]).exists():
            pytest.skip(f"{absent[0]} is not in {brought}: put it there, the job's head takes it ({command})")
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    return JOBS[name]


def small(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Config:
    """The job with few steps and tasks, in `folder`; weights that it begins with are those of the short run before."""
    path = made(name, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(ROOT))
    more = [*SMALL, *overrides]
    config = load_config([path], more)
    if place := config.data.options.get("path"):  # of a source, which metadist does not know to be a path
        more.append(f"data.options.path={folder / place}")
    if config.model.weights:
        saved = sorted(Path(config.model.weights).parents[1].glob("*/weights.safetensors"))
        more.append(f"model.weights={saved[-1]}")
    return located(load_config([path], more))


def test_a_job_is_skipped_only_where_a_file_that_its_head_takes_is_absent(tmp_path):
    nothing, one, both = (tmp_path / name for name in ("nothing", "one", "both"))
    for folder in (nothing, one, both):
        (folder / "brought" / "inside").mkdir(parents=True)
    for folder in (one, both):
        (folder / "brought" / "inside" / "data_full.json").write_text("{}")
    (both / "domains.json").write_text("no JSON")
    with pytest.raises(pytest.skip.Exception, match="data_full.json is not in "):
        made("clinc150_pretrain", nothing, nothing / "brought")
    with pytest.raises(pytest.skip.Exception, match="domains.json is not in "):
        made("clinc150_pretrain", one, one / "brought")
    with pytest.raises(AssertionError, match="JSONDecodeError"):
        made("clinc150_pretrain", both, both / "brought")
    pytest.importorskip("rdkit")
    with pytest.raises(pytest.skip.Exception, match="chembl_5thresh.csv.gz is not in .*curl"):
        made("chembl_16", nothing, nothing / "brought")


@pytest.mark.wide
@pytest.mark.timeout(900)  # the first makes the data, of 91,000 values of molecules
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
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", JOBS)
def test_a_worker_killed_on_ray_changes_no_bit_of_a_job(name, ray_cluster, folder, monkeypatch, tmp_path):
    more = ["fleet.backend=local", "evaluation.baselines=[]", "evaluation.figures={}", f"run_dir={tmp_path}/alone"]
    alone = train(small(name, folder, monkeypatch, *more, "num_workers=1"), quiet=True)
    assert theta_with_a_worker_killed(small(name, folder, monkeypatch), 2) == (alone["theta_sha256"], 1)
