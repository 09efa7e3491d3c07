"""Every command and every piece of Python in every README runs, as it stands there but for shorter training.

A block fenced as ```bash no_run needs a download, another machine or much time: its commands are parsed, its settings
checked, and nothing is run; Python so marked is compiled.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from metadist.cli.main import commands
from metadist.config.load import load_config, split_arguments
from tests.cli.command import run

ROOT = Path(__file__).resolve().parents[1]
READMES = [path for folder in (".", "jobs", "cluster", "tests/benchmarks", "metadist")
           if (path := ROOT / folder / "README.md").exists()]  # fmt: skip
SET_UP = re.compile(r"python3 -m venv .venv && .venv/bin/pip install -q -e \S+ && ")
TOOLS = ("pytest", "ruff", "pyright", "pip", "pre-commit", "mlflow")
SHORTER = "meta_steps=2 evaluation.every=1 evaluation.tasks=4 evaluation.test_tasks=4 evaluation.baseline_tasks=2"
SHORTER += " evaluation.joint_steps=2 evaluation.scratch_steps=2"
SMALL = "model.name=mlp model.channels=null"


class Block(NamedTuple):
    readme: str
    language: str
    runs: bool
    text: str

    @property
    def commands(self) -> Iterator[list[str]]:
        for line in self.text.replace("\\\n", " ").splitlines() if self.language == "bash" else ():
            for command in SET_UP.sub("", line.strip()).split(" && "):
                if words := shlex.split(command, comments=True):
                    yield [re.sub(r"^(\S*/)?\.venv/bin/", "", words[0]), *words[1:]]


BLOCKS = [
    Block(str(path.relative_to(ROOT)), language, "no_run" not in info, text)
    for path in READMES
    for language, info, text in re.findall(r"^```(bash|python)\b(.*)\n([\s\S]*?)^```", path.read_text(), re.MULTILINE)
]
FILES = [(match[1], block.text) for block in BLOCKS if (match := re.match(r"# (\w+\.py)\n", block.text))]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A directory with the jobs, and the data that a reader would have."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "jobs", folder / "jobs")
    for number in range(160):
        place = folder / "my_images" / f"bird{number % 20}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 60).save(place)
    for name in ("garden/wren/1", "garden/wren/2", "garden/lark/1", "garden/lark/2", "new", "other"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 60).save(folder / f"{name}.png")
    users = np.repeat(np.arange(20), 30)
    rng = np.random.default_rng(0)
    columns = {"user": users, "age": rng.normal(size=600), "income": rng.normal(size=600), "clicked": users % 2}
    pq.write_table(pa.table(columns), folder / "my_table.parquet")
    lines = [f'{{"text": "please {word} number {i}", "intent": "{word}"}}' for word in "abcdefgh" for i in range(8)]
    (folder / "my_texts.jsonl").write_text("\n".join(lines))
    for name, text in FILES:
        (folder / name).write_text(text)
    return folder


def shortened(arguments: list[str], first: bool) -> list[str]:
    """With short training; only the first run is on Ray's actors, with the job's own model, and shown in MLflow."""
    if arguments[0] == "bench":
        return [*arguments, "--seconds", "0.1", *SMALL.split(), "learner.first_order=true"]
    if arguments[0] != "train" or "--dry-run" in arguments:
        return arguments
    if first:
        return [*arguments, *SHORTER.split()]
    quick = [*SHORTER.split(), "fleet.backend=local"]
    if "--resume" not in arguments:
        quick += ["tracking.mlflow=false"]
    if "jobs/digits.yaml" in arguments and any(word.startswith("run_dir=") for word in arguments):
        quick += SMALL.split()
    return [*arguments, *quick]


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_commands_run_in_their_order(clone, ray_cluster):
    """One after another, as a reader would paste them: later ones use what earlier ones made."""
    trained = 0
    for block in BLOCKS:
        for program, *arguments in block.commands if block.runs else ():
            if program in TOOLS:
                continue
            assert program == "metadist", f"{block.readme}: {program} is not run here; fence its block as bash no_run"
            done = run(*shortened(arguments, first=trained == 0), cwd=clone)
            assert done.returncode == 0, f"{block.readme}: {arguments}\n{done.stdout}\n{done.stderr}"
            trained += arguments[0] == "train"
    assert trained > 3 and (clone / "runs" / "mlflow.db").exists()
    with chdir(clone):
        for block in BLOCKS:
            if block.language == "python":
                code = compile(block.text, block.readme, "exec")
                if block.runs:
                    exec(code, {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_run_is_far_ahead_of_its_baselines(tmp_path):
    """The whole job, in one process: the bits of a run do not depend on where it is computed."""
    where = ["fleet.backend=local", "tracking.mlflow=false", "run_dir=run"]
    done = run("train", str(ROOT / "jobs" / "letters.yaml"), *where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["accuracy"]["after"]["mean"] >= 0.75
    assert max(found["accuracy"]["mean"] for found in results["baselines"].values()) < 0.45
    assert "verdict    ahead of its best baseline" in done.stdout


NOT_RUN = [(block.readme, command) for block in BLOCKS if not block.runs for command in block.commands]


@pytest.mark.filterwarnings("ignore")  # of MLflow's own, when its command is imported
@pytest.mark.parametrize(("readme", "command"), NOT_RUN, ids=lambda part: part if isinstance(part, str) else part[0])
def test_commands_that_are_not_run_can_be_parsed(readme, command, tmp_path, monkeypatch):
    del readme
    monkeypatch.chdir(ROOT)
    program, *arguments = command
    if program == "python" and arguments[:2] == ["-m", "metadist"]:
        program, arguments = "metadist", arguments[2:]
    if program == "metadist":
        check_metadist(arguments)
    elif program == "ray":
        from ray.scripts.scripts import cli

        parse(cli, arguments)
        if "--" in arguments:
            check_metadist(arguments[arguments.index("metadist") + 1 :])
    elif program == "mlflow":
        from mlflow.cli import cli

        parse(cli, arguments)
    elif program == "python":
        check_script(arguments, monkeypatch)
    elif program.endswith(".sh"):
        assert re.search(rf"^  {arguments[0]}\)", Path(program).read_text(), re.MULTILINE), f"no {arguments[0]} in it"


def check_metadist(arguments: list[str]) -> None:
    parse(commands, arguments)
    if arguments[0] in ("train", "bench", "submit"):
        words = [word for word in arguments[1:] if "=" in word or word.endswith(".yaml")]
        files, overrides = split_arguments([word for word in words if not word.startswith("--")])
        if files and all(Path(file).exists() for file in files):
            load_config(files, overrides)


def parse(command: click.Command, arguments: list[str]) -> None:
    """Raises click's error where an option or an argument is not one of the command's."""
    context = click.Context(command)
    while isinstance(command, click.Group):
        name, *arguments = arguments
        found = command.get_command(context, name)
        assert found is not None, f"there is no command {name}"
        command = found
    command.make_context(command.name, arguments)


def check_script(arguments: list[str], monkeypatch) -> None:
    """It has a --help, and every option that is given; a script without options compiles."""
    script, *given = arguments
    text = Path(script).read_text()
    assert all(f'"{option.partition("=")[0]}"' in text for option in given if option.startswith("--"))
    if "argparse" not in text:
        compile(text, script, "exec")
        return
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", [str(Path(script).parent.absolute()), *sys.path])
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert not ended.value.code


@pytest.mark.wide
def test_the_commands_about_omniglot_run_where_its_files_are(omniglot_folder, clone):
    (clone / "downloads").symlink_to(omniglot_folder)
    for _, (program, *arguments) in NOT_RUN:
        if program == "metadist" and any("omniglot" in word or "protonet" in word for word in arguments):
            files = " ".join(arguments).replace("--download", "--source downloads").split()  # no test downloads
            done = run(*shortened(files, first=False), cwd=clone)
            assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"


def anchors(path: Path) -> set[str]:
    """What a link may name of a page: its headings, as a forge writes them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```[\s\S]*?^```", "", path.read_text(), flags=re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_linked_and_named_is_there(path):
    """Links lead to files and headings; code that is named as `file.py`: `Class.method` is in that file."""
    text = path.read_text()
    for place, anchor in re.findall(r"\]\(([^):#]+)(?:#([^)]+))?\)", text):
        there = path.parent / place
        assert there.exists() and (not anchor or anchor in anchors(there)), f"{place}#{anchor}"
    for file, names in re.findall(r"`(\w+/[\w/]+\.py)`:\s+((?:`[\w.]+`(?:,| and)?\s*)+)", text):
        source = (path.parent / file).read_text()
        for name in re.findall(r"[\w.]+", names.replace("` and `", "` `")):
            for part in name.split("."):
                assert re.search(rf"^\s*(def|class) {part}\b", source, re.MULTILINE), f"{file} has no {part}"


def test_the_two_set_up_commands_begin_from_nothing():
    first, second = [line for line in (ROOT / "README.md").read_text().splitlines() if SET_UP.match(line)]
    assert SET_UP.sub("", first).startswith(".venv/bin/metadist train")
    assert second.endswith("/pytest -n 2")


def test_the_learner_of_the_readme_is_short_and_its_gradient_exact(tmp_path, monkeypatch):
    """Against central differences in float64; a first-order gradient would be found out."""
    import torch

    from metadist import Engine, Model, Task
    from metadist.models.losses import mean_squared_error
    from metadist.run.build import resolve

    ((name, text),) = [(name, text) for name, text in FILES if "class HeldBack" in text]
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
