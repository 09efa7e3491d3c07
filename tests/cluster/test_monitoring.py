"""Grafana's dashboard and what Prometheus scrapes."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cluster.files import CLUSTER

FOLDER = CLUSTER / "monitoring"
DASHBOARD = (FOLDER / "grafana.json").read_text()
SOURCE = CLUSTER.parent / "metadist" / "fleet" / "ray" / "metrics.py"
METRICS = set(re.findall(r'"(metadist_[a-z_]+)"', SOURCE.read_text()))
"""What a run exports; Ray puts `ray_` before it."""


def metrics_in(text: str) -> set[str]:
    """Names of metrics in queries, as the code has them."""
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"ray_(metadist_\w+)", text)}


def test_the_dashboard_shows_every_metric_there_is_and_no_other():
    assert metrics_in(DASHBOARD) == METRICS and len(METRICS) == 8


def test_the_page_names_them_all():
    page = (CLUSTER / "README.md").read_text()
    assert all(f"`{name.removeprefix('metadist_')}`" in page for name in METRICS)


def test_a_metric_that_does_not_exist_is_found():
    assert metrics_in(DASHBOARD.replace("workers_alive", "workers_living")) != METRICS


def test_each_panel_has_a_place_of_its_own_and_queries_one_run():
    panels = json.loads(DASHBOARD)["panels"]
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken)) and max(x for x, _ in taken) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"] and all('{run=~"$run"}' in target["expr"] for target in panel["targets"])


def promtool(path: Path) -> subprocess.CompletedProcess[str]:
    if not shutil.which("promtool"):
        pytest.skip("there is no promtool here: apt-get install prometheus")
    return subprocess.run(["promtool", "check", "config", "--syntax-only", path], capture_output=True, text=True)


def test_prometheus_accepts_what_it_is_to_scrape_and_refuses_a_key_it_does_not_know(tmp_path):
    done = promtool(FOLDER / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    broken = tmp_path / "prometheus.yml"
    broken.write_text((FOLDER / "prometheus.yml").read_text().replace("http_sd_configs", "http_sd_config"))
    assert promtool(broken).returncode != 0
