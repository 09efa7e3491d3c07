"""The Dockerfile, with hadolint; `compose.yaml`, with the models of the compose specification."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec.models import ComposeSpecification
from pydantic import ValidationError

from tests.cluster.files import CLUSTER, check_ray_start

FOLDER = CLUSTER / "docker"
COMPOSE = (FOLDER / "compose.yaml").read_text()
SERVICES = yaml.safe_load(COMPOSE)["services"]


def tool(name: str) -> str:
    """A program that a package of the `dev` extra brings."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"no {name} beside this Python: pip install -e '.[dev]'"
    return found


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool("hadolint"), "-"], input=text, capture_output=True, text=True)


def test_hadolint_has_nothing_to_say():
    done = hadolint((FOLDER / "Dockerfile").read_text())
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("right", "wrong", "rule"),
    [("WORKDIR /opt/metadist", "WORKDIR opt", "DL3000"), ("COPY jobs", "COPIE jobs", "unexpected")],
)
def test_hadolint_refuses_what_is_wrong(right, wrong, rule):
    done = hadolint((FOLDER / "Dockerfile").read_text().replace(right, wrong, 1))
    assert done.returncode != 0 and rule in done.stdout + done.stderr


def test_all_that_is_copied_is_let_through():
    text = (FOLDER / "Dockerfile").read_text()
    sources = [word for line in text.splitlines() if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert {f"!{source}" for source in sources} <= set((FOLDER / "Dockerfile.dockerignore").read_text().split())
    assert all((CLUSTER.parent / source).exists() for source in sources)


def lost(given: Any, kept: Any, place: str = "") -> list[str]:
    """Keys of `given` that are not in `kept`: the models leave out what the specification does not have."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [
            found for key, value in given.items()
            for found in (lost(value, kept[key], f"{place}.{key}") if key in kept else [f"{place}.{key}"])
        ]  # fmt: skip
    if isinstance(given, list) and isinstance(kept, list):
        return [found for one, other in zip(given, kept, strict=True) for found in lost(one, other, place)]
    return []


def unknown_keys(text: str) -> list[str]:
    given = {key: value for key, value in yaml.safe_load(text).items() if not key.startswith("x-")}
    kept = ComposeSpecification.model_validate(given).model_dump(mode="json", by_alias=True, exclude_unset=True)
    return lost(given, kept)


def test_compose_has_no_key_that_its_specification_does_not_have():
    assert unknown_keys(COMPOSE) == []


@pytest.mark.parametrize("key", ["shm_size", "condition", "capabilities", "dockerfile", "healthcheck"])
def test_a_key_that_is_not_one_of_compose_is_found(key):
    broken = COMPOSE.replace(f"{key}:", f"{key}s:")
    try:
        found = unknown_keys(broken)
    except ValidationError as error:  # the right one was required
        found = [str(error)]
    assert found and all(key in place for place in found)


def test_a_value_that_is_not_one_of_compose_is_refused():
    with pytest.raises(ValidationError):
        unknown_keys(COMPOSE.replace("condition: service_healthy", "condition: service_well"))


def test_only_this_machine_reaches_the_ports_and_secrets_are_files():
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)
    secrets = yaml.safe_load(COMPOSE)["secrets"]
    assert all(set(secret) == {"file"} for secret in secrets.values())
    for service in SERVICES.values():
        assert set(service.get("secrets", [])) <= set(secrets)
        named = [name for name in service.get("environment", {}) if "PASSWORD" in name or "TOKEN" in name]
        assert all(service["environment"][name].startswith("/run/secrets/") for name in named)


@pytest.mark.parametrize("name", ["head", "worker", "worker-gpu"])
def test_the_commands_that_start_ray_are_ones_of_ray(name):
    check_ray_start([re.sub(r"\$\{\w+:-(\w+)\}", r"\1", word) for word in SERVICES[name]["command"]])


def test_mlflow_answers_to_the_name_that_the_workers_call_it_by():
    address = SERVICES["worker"]["environment"]["MLFLOW_TRACKING_URI"]
    script = SERVICES["mlflow"]["command"][-1]
    allowed = script.partition("--allowed-hosts '")[2].partition("'")[0].split(",")
    assert address.removeprefix("http://") in allowed and "--artifacts-destination /mlartifacts" in script
