import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import metadist
from metadist.core.errors import InputError
from metadist.data import cached, open_dataset

SMALL = {"groups": (2000, 5, 5), "points": 20}


def test_two_processes_share_one_build(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from metadist.data import cached\n"
        "time.sleep(max(0, float(sys.argv[1]) - time.time()))\n"
        f"print(cached('sinusoid', {SMALL!r}))\n"
    )
    environment = {**os.environ, "METADIST_CACHE": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", code, str(time.time() + 0.5)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment),
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment),
    ]
    paths = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert all(process.returncode == 0 for process in processes)
    assert [str(entry) for entry in tmp_path.iterdir()] == list(paths)
    open_dataset(paths.pop(), verify=True)


def test_it_is_built_once_and_options_tell_sets_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path))
    path = cached("sinusoid", SMALL)
    stamp = path.stat().st_mtime_ns
    assert cached("sinusoid", {**SMALL, "groups": [2000, 5, 5], "seed": 0}) == path
    assert path.stat().st_mtime_ns == stamp
    assert cached("sinusoid", {**SMALL, "seed": 1}) != path


def test_home_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METADIST_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cached("sinusoid", SMALL).parent == tmp_path / ".cache" / "metadist"


def test_unknown_names_are_refused_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="did you mean sinusoid"):
        cached("sinus")
    with pytest.raises(InputError, match="did you mean points"):
        cached("sinusoid", {"point": 3})
    with pytest.raises(InputError, match="points >= 1"):
        cached("sinusoid", {"points": 0})
    assert list(tmp_path.iterdir()) == []


def test_a_changed_importer_never_meets_old_data(tmp_path: Path) -> None:
    """The package is copied and the importer's text changed there: its noise must not come from the old cache."""
    package = tmp_path / "changed" / "metadist"
    shutil.copytree(Path(metadist.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import sys; from metadist.data import cached, open_dataset\n"
        f"print(open_dataset(cached('sinusoid', {SMALL!r})).splits['train'].column('y').max())\n"
    )

    def largest() -> float:
        environment = {**os.environ, "METADIST_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(package.parent)}
        command = [sys.executable, "-P", "-c", code]
        return float(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)

    assert 4 < largest() < 5
    importer = package / "data" / "importers" / "sinusoid.py"
    importer.write_text(importer.read_text().replace("(0.1, 5.0)", "(50.0, 55.0)"))
    assert 50 < largest() < 55
