"""The floors of the house: a file imports only from lower floors, and stays small enough to read."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "metadist"
FLOORS = [
    {"redaction"},
    {"errors"},
    {"task", "disk"},
    {"noise", "layout", "draws", "losses", "messages", "events", "data", "checkpoint_format", "journal", "tracking",
     "figures", "stopping", "lock"},
    {"models"},
    {"checkpoint", "learners", "sources", "cost_model", "simulated"},
    {"engine", "stream", "saving"},
    {"baselines"},
    {"worker", "server", "patience", "deals"},
    {"server_proof"},
    {"controller", "config", "resuming", "ray_actors", "recovery"},
    {"ray_server", "ray_workers"},
    {"ray_calls", "ray_head"},
    {"ray_cluster", "ray_fleet", "local_fleet", "fewshot", "identity"},
    {"joint", "recording", "run_dir"},
    {"evaluation"},
    {"online"},
    {"trainer", "prepare"},
    {"fleets", "preflight"},
    {"run"},
    {"replay", "bench", "scaling"},
    {"cli_arguments"},
    {"cli_data", "cli_bench"},
    {"cli"},
    {"__main__"},
]  # fmt: skip
RAY = {"ray_cluster", "ray_fleet", "ray_server", "ray_workers", "ray_calls", "ray_actors", "ray_head"}
MLFLOW = {"tracking"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The file or folder directly under metadist/ that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


def imported(path: Path) -> set[str]:
    """Top-level names, and `metadist.x` names, that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {
                f"{node.module}.{alias.name}" if node.module == "metadist" else node.module for alias in node.names
            }
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_lower_floors(path: Path):
    own = room(path)
    if own == "__init__":
        return
    for name in imported(path):
        if not name.startswith("metadist."):
            continue
        other = name.split(".")[1]
        allowed = other == own or floor(other) < floor(own)
        assert allowed, f"{path.name} (floor {floor(own)}) imports {other} (floor {floor(other)})"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ray_and_mlflow_are_imported_where_they_may_be(path: Path):
    tops = {name.split(".")[0] for name in imported(path)}
    assert "ray" not in tops or room(path) in RAY
    assert "mlflow" not in tops or room(path) in MLFLOW


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path: Path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= 60, f"{node.name} is too long"


def test_every_file_has_a_floor():
    assert {room(path) for path in FILES} - {"__init__"} == set().union(*FLOORS)
