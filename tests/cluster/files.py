"""The files of `cluster/`, and the versions they share."""

from pathlib import Path

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file() and "secrets" not in path.parts)
VERSIONS = dict(
    line.split("=") for line in (CLUSTER / "versions.env").read_text().splitlines() if not line.startswith("#")
)
"""By name: PYTHON, RAY, TORCH, MLFLOW, METADIST."""


def check_ray_start(words: list[str]) -> None:
    """Raises click's error where an option, or its value, is not one of `ray start`."""
    from ray.scripts.scripts import start

    assert words[:2] == ["ray", "start"]
    start.make_context("start", words[2:])
