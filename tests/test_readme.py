"""Every command and every piece of Python in the README runs, as it stands there but for shorter training."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines() if line]
FILES = [(block[2:].split("\n")[0], block) for language, block in BLOCKS if re.match(r"# \w+\.py\n", block)]
SET_UP = re.compile(r"python3 -m venv .venv && .venv/bin/pip install -q -e \S+ && .venv/bin/")
SHORTER = "meta_steps=2 evaluation.every=1 evaluation.tasks=4 evaluation.test_tasks=4 evaluation.baseline_tasks=2"
IN_ONE_PROCESS = ("jobs/omniglot", "runs/omniglot", "my_job.yaml", "my_learner:")
"""What is not about workers is computed without actors, whose start takes longer than all the rest."""
NOT_HERE = {
    "python tests/benchmarks/scaling.py": "takes minutes; its --quick has a test of its own",
    "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db": "a server that does not end; the database is looked at",
    "ray job submit --working-dir . -- python -m metadist train jobs/digits.yaml run_dir=/shared/runs/digits":
        "has its own test, test_submit.py, with a cluster of its own",
}  # fmt: skip


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A directory with the jobs, and the data that a reader would have."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "jobs", folder / "jobs")
    for number in range(160):
        place = folder / "my_images" / f"bird{number % 20}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 60).save(place)
    users = np.repeat(np.arange(20), 30)
    rng = np.random.default_rng(0)
    columns = {"user": users, "age": rng.normal(size=600), "income": rng.normal(size=600), "clicked": users % 2}
    pq.write_table(pa.table(columns), folder / "my_table.parquet")
    lines = [f'{{"text": "please {word} number {i}", "intent": "{word}"}}' for word in "abcdefgh" for i in range(8)]
    (folder / "my_texts.jsonl").write_text("\n".join(lines))
    return folder


def runnable(command: str) -> str:
    """The command without the set-up that this environment already has, and with short training."""
    command = SET_UP.sub("", command)
    if "train" in command.split():
        command += f" {SHORTER}"
    if any(name in command for name in IN_ONE_PROCESS):
        command += " fleet.backend=local"
    small = "--seconds 0.3 model.name=mlp model.channels=null"
    return f"{command} {small}" if "bench" in command.split() else command


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_readme_commands_in_their_order(clone, omniglot_downloads):
    """One after another, as a reader would paste them: later ones use what earlier ones made."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for name, text in FILES:
        (clone / name).write_text(text)
    for command in COMMANDS:
        if command in NOT_HERE or command.endswith("/pytest -n 2"):
            continue
        if "omniglot" in command and not omniglot_downloads:
            continue
        shorter = runnable(command)
        done = subprocess.run(
            shorter, shell=True, cwd=clone, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, f"{shorter}\n{done.stdout}\n{done.stderr}"
    assert (clone / "runs" / "mlflow.db").exists()
    for language, block in BLOCKS:
        if language == "python":
            done = subprocess.run([sys.executable, "-c", block], cwd=clone, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, f"{block}\n{done.stderr}"


@pytest.fixture(scope="module")
def omniglot_downloads(clone) -> bool:
    """The Omniglot zips as `downloads`, where this machine has them."""
    folder = ROOT.parent / "shared" / "data" / "omniglot"
    if folder.is_dir():
        (clone / "downloads").symlink_to(folder)
    return folder.is_dir()


def test_the_two_set_up_commands_begin_from_nothing():
    first, second = [command for command in COMMANDS if command.startswith("python3 -m venv")]
    assert SET_UP.match(first)
    assert SET_UP.match(second)
    assert second.endswith("/pytest -n 2")


def test_the_learner_of_the_readme_is_short_and_its_gradient_exact(tmp_path, monkeypatch):
    """Against central differences in float64; a first-order gradient would be found out."""
    import torch

    from metadist import Engine, Model, Task
    from metadist.models.losses import mean_squared_error
    from metadist.run.build import resolve

    ((name, text),) = FILES
    assert len(text.splitlines()) < 60
    (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    model = Model(torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)))
    learner = resolve(f"{name.removesuffix('.py')}:HeldBack")(model=model, loss=mean_squared_error, inner_steps=3)
    engine = Engine(learner, "vmap", dtype=torch.float64)
    x, theta = np.linspace(-1, 1, 8)[:, None], engine.initial_theta()
    tasks = [Task.of(x, np.sin(3 * x), x / 2, np.cos(x))]
    found = engine.meta_gradients(theta, tasks).rows[0]
    steps = 1e-5 * torch.eye(len(theta), dtype=theta.dtype)
    losses = [engine.meta_gradients(theta + sign * step, tasks).losses[0] for step in steps for sign in (1, -1)]
    numeric = (torch.stack(losses[::2]) - torch.stack(losses[1::2])) / 2e-5
    assert (found - numeric).norm() < 1e-6 * numeric.norm()
    assert numeric[-4:].abs().min() > 1e-6
