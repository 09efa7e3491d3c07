"""A virtual environment for each peer, made once and used again."""

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

Say = Callable[[str], None]


class CannotInstall(RuntimeError):
    """A peer that is not to be had on this machine, and why."""


@dataclass(frozen=True)
class Environment:
    """What is installed, in this order: `requirements` with what they need, `alone` without, and `source`, a source
    distribution whose generated C files are for older Pythons, built anew with the Cython among the requirements."""

    requirements: tuple[str, ...]
    alone: tuple[str, ...] = ()
    source: str | None = None


def prepare(name: str, environment: Environment, torch: str, root: Path, say: Say) -> Path:
    """The interpreter of an environment with that torch, made if there is none as described. Raises CannotInstall."""
    folder = root / name
    python, record = folder / "bin" / "python", folder / "installed.json"
    wanted = {**json.loads(json.dumps(asdict(environment))), "torch": torch, "base": sys.version}
    if record.exists() and json.loads(record.read_text()) == wanted:
        return python
    say(f"installing {name} in {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    _install_torch(python, torch)
    if environment.requirements:
        _pip(python, "install", *environment.requirements)
    if environment.alone:
        _pip(python, "install", "--no-deps", *environment.alone)
    if environment.source:
        _build(python, environment.source)
    record.write_text(json.dumps(wanted))
    return python


def _install_torch(python: Path, version: str) -> None:
    """Exactly the running version; a build such as +cpu is on pytorch's own index, if not on the one pip is set to."""
    build = version.partition("+")[2]
    try:
        _pip(python, "install", f"torch=={version}")
    except CannotInstall:
        if not build:
            raise
        index = f"https://download.pytorch.org/whl/{build}"
        _pip(python, "install", f"torch=={version}", "--extra-index-url", index)


def _build(python: Path, requirement: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = ("--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", name)
        _pip(python, "download", requirement, *options)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        sources = folder / archive.name.removesuffix(".tar.gz")
        for pyx in sources.rglob("*.pyx"):
            pyx.with_suffix(".c").unlink(missing_ok=True)
        _run([str(python), "setup.py", "-q", "build_ext", "bdist_wheel"], sources)
        _pip(python, "install", "--no-deps", *map(str, (sources / "dist").glob("*.whl")))


def _pip(python: Path, command: str, *arguments: str) -> None:
    _run([str(python), "-m", "pip", command, "-q", "--disable-pip-version-check", *arguments])


def _run(command: list[str], folder: Path | None = None) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise CannotInstall(f"`{' '.join(command[1:5])} ...` failed: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    """The line of an error output that says what was wrong: the last one that is neither empty nor a rule."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" =-")]
    return lines[-1][:300] if lines else "nothing was said"
