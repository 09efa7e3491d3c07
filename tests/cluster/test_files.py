"""What holds for all files of `cluster/`: one set of versions, Ray started alike, and what was not run says so."""

import re
import subprocess
import tomllib

import pytest

from tests.cluster.files import CLUSTER, FILES, VERSIONS

ROOT = CLUSTER.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MENTIONS = {
    "PYTHON": [r"ARG PYTHON=(.*)", r'PYTHON: "?([\d.]+)'],
    "RAY": [r"rayVersion: (.*)", r"^ray==(.*)", r"\bRay (2\.\d+\.\d+)"],
    "TORCH": [r"ARG TORCH=(.*)", r"TORCH: (.*)", r"^torch==(.*)"],
    "MLFLOW": [r"^mlflow(?:-skinny|-tracing)?==(.*)"],
    "METADIST": [r"metadist:(\d+\.\d+\.\d+)"],
}
"""How a file names each version."""
HEALTH = {"initial_delay_ms": "0", "period_ms": "500", "timeout_ms": "1500", "failure_threshold": "3"}
RUN_HERE = {"local.sh", "slurm.sbatch"}
"""Run by tests; the others are only checked."""


def other_versions(text: str) -> list[str]:
    """Those a file names that are not the ones of `versions.env`."""
    found = [(name, match) for name, forms in MENTIONS.items() for form in forms
             for match in re.findall(form, text, re.MULTILINE)]  # fmt: skip
    return [f"{name} {match}" for name, match in found if match != VERSIONS[name]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_file_names_the_versions_of_one_file(path):
    assert other_versions(path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_files_that_a_file_names_are_there(path):
    named = re.findall(r"(?<![\w/])(?:cluster|jobs|tests)/[\w/-]+\.(?:py|sh|sbatch|yaml|env|lock)\b", path.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    "line", ["ARG PYTHON=3.12", "  rayVersion: 2.59.0", "torch==2.12.1", "  image: x/metadist:0.1.9-cpu"]
)
def test_another_version_is_found(line):
    assert other_versions(line)


def test_the_versions_are_those_of_the_package_and_all_are_in_use():
    assert VERSIONS["METADIST"] == PROJECT["version"]
    everything = "\n".join(path.read_text() for path in FILES if path.name != "README.md")
    for name, forms in MENTIONS.items():
        assert any(re.search(form, everything, re.MULTILINE) for form in forms), name


def test_the_lock_has_all_that_the_package_needs_once():
    lines = (CLUSTER / "docker" / "requirements.lock").read_text().splitlines()
    names = [re.sub(r"[-_.]+", "-", line.partition("==")[0].lower()) for line in lines if not line.startswith("#")]
    needed = {re.match(r"[\w.-]+", each)[0].lower() for each in PROJECT["dependencies"]}  # pyright: ignore
    assert needed <= set(names) and len(names) == len(set(names))


def health_settings(text: str) -> dict[str, str]:
    """Of Ray's health checks, as shell, Dockerfile, compose and Kubernetes write an environment."""
    return dict(re.findall(r"RAY_health_check_(\w+)(?:=|: |\s+value: )\"?(\d+)", text))


@pytest.mark.parametrize(
    "path", [path for path in FILES if re.search(r"ray\W+start|kind: Ray|^FROM", path.read_text(), re.MULTILINE)
             and path.suffix != ".md"], ids=lambda path: path.name)  # fmt: skip
def test_where_ray_is_started_a_dead_host_is_noticed_soon_and_a_token_is_asked_for(path):
    text = path.read_text()
    assert health_settings(text) == HEALTH
    assert re.search(r"RAY_AUTH_MODE(=|: )token|mode: token", text)
    assert text.count("RAY_health_check_period_ms") == max(1, text.count("ray start --address=$RAY_HEAD_IP") * 2)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_was_not_run_says_so(path):
    if path.name in RUN_HERE:
        assert "only" not in re.findall(r"# Checked by.*", path.read_text())
    elif path.suffix in (".yaml", "") and path.name != "versions.env":
        assert re.search(r"^# Checked by .* only, never", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "path", ["metadist-7.token", "token", "cluster/monitoring/token", "cluster/docker/secrets/ray_token"]
)
def test_git_leaves_out_the_secrets_that_the_files_here_have_one_write(path):
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    assert subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT).returncode == 0
