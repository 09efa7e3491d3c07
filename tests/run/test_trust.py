"""A run from a stranger: what it names is neither imported, nor called, nor dialled, nor followed."""

import dataclasses
import json
import shutil
import socket
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest

import metadist
from metadist.checkpoint.store import CheckpointStore
from metadist.config import dump_config, load_config
from metadist.config.load import parse_config
from metadist.core.errors import InputError
from metadist.core.task import TaskId
from metadist.run.api import train
from metadist.run.evaluate import evaluate
from metadist.run.replay import replay, replay_task
from metadist.run.trust import unloadable
from tests.cli.command import run

JOB = [
    "data.family=digits", "task.ways=3", "task.shots=1", "task.queries=2", "model.name=mlp", "model.hidden=[4]",
    "meta_steps=2", "meta_batch_size=2", "checkpoint.every=1", "evaluation.every=0", "evaluation.baselines=[]",
    "evaluation.test_tasks=2", "fleet.backend=local", "tracking.mlflow=false",
]  # fmt: skip
SETTINGS = {
    "model.name": "model: {name: '%s', command: touch executed}\n",
    "learner.name": "learner: {name: '%s'}\n",
    "learner.inner_optimizer": "learner: {inner_optimizer: {name: '%s', command: touch executed}}\n",
    "learner.environment": "learner: {name: policy_gradient, environment: {name: '%s', command: touch executed}}\n",
    "loss": "loss: '%s'\n",
    "data.source": "data: {source: '%s', options: {command: touch executed}}\n",
}
EVIL = """
from pathlib import Path
import os, torch
Path("imported").touch()
def run(command="touch executed", **_):
    os.system(command)
class Thing:
    def __init__(self, command="touch executed", **_):
        os.system(command)
def loss(outputs, target):
    return torch.nn.functional.cross_entropy(outputs, target)
def factory(command: str = "") -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
def unmarked(command=""):
    return factory()
class Net(torch.nn.Sequential):
    def __init__(self, command: str = ""):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, 3))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("trust") / "run"
    train(load_config([], [*JOB, f"run_dir={run_dir}"]), quiet=True)
    return run_dir


@pytest.fixture
def stranger(trained, tmp_path, monkeypatch):
    """Makes the run, in the current directory, one whose configuration says something more, everywhere it is kept."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil_module.py").write_text(EVIL)
    sys.modules.pop("evil_module", None)

    def make(text: str) -> Path:
        run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
        (tmp_path / "more.yaml").write_text(text)
        data = ["data.family=null"] if "source:" in text else []
        changed = dump_config(load_config([run_dir / "config.yaml", tmp_path / "more.yaml"], data))
        (run_dir / "config.yaml").write_text(changed)
        store = CheckpointStore(run_dir / "checkpoints", 9)
        checkpoints = [store.load(f"step_{step:08d}") for step in store.steps()]
        shutil.rmtree(run_dir / "checkpoints")
        for checkpoint in checkpoints:
            store.save(dataclasses.replace(checkpoint, config=changed))
        return run_dir

    yield make
    sys.modules.pop("evil_module", None)


def ways(run_dir: Path, **trust):
    """All that reads a saved run."""
    return {
        "load": lambda: metadist.load(run_dir, **trust),
        "load a checkpoint": lambda: metadist.load(run_dir / "checkpoints" / "step_00000002", **trust),
        "evaluate": lambda: evaluate(load_config([run_dir / "config.yaml"]), run_dir, say=print, **trust),
        "replay": lambda: replay(run_dir, print, **trust),
        "replay a task": lambda: replay_task(run_dir, TaskId("train", 1, 0), **trust),
    }


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("attribute", ["run", "Thing", "Net"])
def test_nothing_that_a_saved_run_names_is_imported(stranger, setting, attribute):
    run_dir = stranger(SETTINGS[setting] % f"evil_module:{attribute}")
    for name, way in ways(run_dir).items():
        if setting == "data.source" and name.startswith("load"):
            continue  # needs no source, so that there is nothing to refuse
        with pytest.raises(InputError) as raised:
            way()
        said = str(raised.value)
        assert "names the code of evil_module" in said and f"{setting}=evil_module:{attribute}" in said, name
        assert "--trust-code" in said and "trust_code=True" in said and "\n" not in said
    assert "evil_module" not in sys.modules
    assert not Path("imported").exists() and not Path("executed").exists()


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_no_part_of_its_seam_is_not_called_even_with_trust(stranger, setting):
    for name in ("evil_module:run", "evil_module:Thing", "os:system", "subprocess:Popen", "subprocess:getoutput"):
        if setting == "loss" and name == "evil_module:run":
            continue  # a function of a trusted module, called with two tensors, is what a loss is
        run_dir = stranger(SETTINGS[setting] % name)
        with pytest.raises(InputError, match=f"{setting}={name}"):
            replay(run_dir, print, trust_code=True)
        shutil.rmtree(run_dir)
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["Net", "factory"])
def test_a_trusted_model_is_loaded(trained, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_module.py").write_text(EVIL)
    job = [*(o for o in JOB if not o.startswith("model")), f"model.name=own_module:{name}", "learner.inner_lr=0.1"]
    config = load_config([], [*job, "run_dir=run"])
    train(config, quiet=True)
    with pytest.raises(InputError, match="own_module.*--trust-code"):
        metadist.load("run")
    metadist.load("run", trust_code=True)
    assert replay("run", print, trust_code=True)["hashes_compared"] == 2
    assert evaluate(config, "run", say=print, trust_code=True) == evaluate(config, "run", own={"model.name"})
    sys.modules.pop("own_module", None)


def test_what_the_user_types_is_his_own(trained, tmp_path):
    """The same name as in the run, given on the command line or in a file of his."""
    (tmp_path / "own_net.py").write_text(textwrap.dedent(EVIL))
    job = [*(o for o in JOB if not o.startswith("model")), "model.name=own_net:Net", "run_dir=run"]

    command = partial(run, cwd=tmp_path)
    assert command("train", *job, "-q").returncode == 0
    (tmp_path / "imported").unlink()
    refused = command("evaluate", "run")
    assert refused.returncode == 2 and "--trust-code" in refused.stderr and refused.stderr.count("\n") == 1
    assert command("replay", "run").returncode == 2
    assert not (tmp_path / "imported").exists()
    (tmp_path / "mine.yaml").write_text("model: {name: own_net:Net}\nevaluation: {test_tasks: 3}\n")
    for own in (["--trust-code"], ["model.name=own_net:Net"], ["mine.yaml"]):
        done = command("evaluate", "run", *own, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["protocol"]["tasks"] == (3 if own == ["mine.yaml"] else 2)
    assert command("replay", "run", "--trust-code").returncode == 0


def test_no_address_is_dialled(stranger):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", f"http://user:hunter2@127.0.0.1:{port}"):
            run_dir = stranger(f"fleet: {{backend: ray, address: '{address}'}}\n")
            with pytest.raises(InputError, match="fleet.address=") as raised:
                evaluate(load_config([run_dir / "config.yaml"]), run_dir, say=print)
            assert "hunter2" not in str(raised.value)
            metadist.load(run_dir)
            replay(run_dir, print)
            with pytest.raises(TimeoutError):
                server.accept()
            shutil.rmtree(run_dir)


@pytest.mark.parametrize("uri", [False, True])
def test_no_place_elsewhere_is_followed(stranger, tmp_path, uri):
    place = tmp_path / "other"
    run_dir = stranger(f"checkpoint: {{location: '{place.as_uri() if uri else place}'}}\n")
    shutil.move(run_dir / "checkpoints", place)
    before = sorted(place.rglob("*"))
    config = load_config([run_dir / "config.yaml"])
    refused = [lambda: metadist.load(run_dir), lambda: evaluate(config, run_dir, say=print),
               lambda: replay_task(run_dir, TaskId("train", 1, 0)),
               lambda: train(load_config([], [*JOB, f"run_dir={tmp_path / 'new'}"]), resume=run_dir)]  # fmt: skip
    for way in refused:
        with pytest.raises(InputError, match="checkpoint.location="):
            way()
    assert sorted(place.rglob("*")) == before and not (tmp_path / "new").exists()
    metadist.load(run_dir, trust_code=True)
    evaluate(config, run_dir, say=print, own={"checkpoint.location"})
    job = [*JOB, f"run_dir={tmp_path / 'new'}", f"checkpoint.location={config.checkpoint.location}", "meta_steps=3"]
    with pytest.raises(InputError, match="checkpoint.location"):
        train(load_config([], job), resume="auto", quiet=True)


def test_a_run_of_metadists_own_parts_needs_no_trust(trained, tmp_path):
    for way in ways(Path(shutil.copytree(trained, tmp_path / "run"))).values():
        way()
    text = CheckpointStore(trained / "checkpoints").load().config
    assert parse_config(text, "it").run_dir == str(trained)


def test_what_could_not_be_loaded_again_is_told_before_training(tmp_path, monkeypatch):
    (tmp_path / "tests_makers.py").write_text(
        "from __future__ import annotations\n\nimport torch\nfrom torch import nn\n\n"
        "def bare(outputs=3):\n    return torch.nn.Linear(1, outputs)\n\n"
        "def told(outputs=3) -> nn.Module:\n    return torch.nn.Linear(1, outputs)\n\n"
        "def broken(outputs=3) -> Nowhere:\n    return torch.nn.Linear(1, outputs)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("bare", "told", "broken")
    jobs = {name: load_config([], ["data.family=digits", f"model.name=tests_makers:{name}"]) for name in names}
    assert unloadable(jobs["told"]) == []
    for name in ("bare", "broken"):
        (note,) = unloadable(jobs[name])
        assert note.startswith(f"model.name=tests_makers:{name} trains, but the run cannot be loaded again with it")
