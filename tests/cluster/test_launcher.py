"""The files for Ray's cluster launcher, with the checks of the launcher."""

import copy
import re
import shlex

import click
import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.files import CLUSTER, check_ray_start


@pytest.fixture(params=["aws", "gcp", "onprem"])
def config(request) -> dict:
    return yaml.safe_load((CLUSTER / f"{request.param}.yaml").read_text())


def test_the_launcher_accepts_it_and_the_head_takes_no_tasks(config):
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    head = prepared["available_node_types"][prepared["head_node_type"]]
    start = prepared["head_start_ray_commands"][-1]
    assert head["resources"].get("CPU") == 0 or "--num-cpus=0" in start
    assert "--dashboard-host=127.0.0.1" in start  # reached by `ray dashboard`, which forwards it


def test_the_launcher_refuses_a_key_it_does_not_know(config):
    with pytest.raises(ValidationError, match="idle_timeout_secs"):
        validate_config(prepare_config({**config, "idle_timeout_secs": 3}))


def test_the_commands_that_start_ray_are_ones_of_ray(config):
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        words = [word for word in shlex.split(command) if not re.match(r"RAY_\w+=", word)]
        check_ray_start(words)
        with pytest.raises(click.ClickException):
            check_ray_start([*words, "--num-cpu=1"])


def test_workers_in_a_cloud_are_spot_machines(config):
    workers = [each["node_config"] for name, each in config.get("available_node_types", {}).items() if name != "head"]
    for worker in workers:
        market = worker.get("InstanceMarketOptions", {}).get("MarketType")
        assert market == "spot" or worker["scheduling"]["provisioningModel"] == "SPOT"
    assert bool(workers) == (config["provider"]["type"] != "local")
