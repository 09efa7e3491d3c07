"""The house: which room may import from which, in what order the files of a room stand, and that each can be read."""

import ast
from pathlib import Path

import pytest

from tests.benchmarks.structure import circles, imports, modules

PACKAGE = Path(__file__).resolve().parents[1] / "metadist"
FLOORS = [
    ["core"], ["data", "models", "environments", "config", "checkpoint", "tracking"], ["learners"], ["engine"],
    ["fleet"], ["evaluation"], ["run"], ["cli"],
]  # fmt: skip
"""From the ground up: a room imports from lower floors only."""
FILES = {
    "core": ["redaction", "errors", "files", "storage", "measure", "task", "messages", "random", "garbage"],
    "data": [
        "mapped", "notes", "progress", "duplicates", "files", "download", "importers.names", "importers.arrays",
        "importers.delimited", "importers.pictures", "importers.table_files", "importers.columns",
        "importers.categories", "importers.survey", "splits", "importers.table_splits", "importers.class_folders",
        "importers.text_files", "table", "sources", "online", "shapes", "tokenizer", "description", "contact_sheet",
        "writer", "glyphs", "cache", "remote", "importers.cifar_fs", "importers.digits", "importers.images",
        "importers.letters", "importers.omniglot", "importers.sinusoid", "importers.table", "importers.text",
        "preprocessing", "raw_files"
    ],
    "models": [
        "bag", "bandit", "encoder", "losses", "mlp", "noise", "policy", "layers", "conv4", "model", "resnet12", "siren"
    ],
    "environments": ["environment", "gymnasium", "navigation", "point_mass"],
    "config": ["schema", "yaml", "template", "load"],
    "checkpoint": ["format", "journal", "store", "saver"],
    "tracking": [
        "best", "console", "database", "description", "jsonl", "logged_model", "models", "reach", "mlflow", "provenance"
    ],
    "learners": [
        "inner_optimizers", "learner", "heads", "maml", "cavia", "evolution", "imaml", "maml_plus_plus",
        "meta_curvature", "meta_sgd", "platipus", "policy_gradient", "prototypes", "reptile", "ridge", "task_adaptive"
    ],
    "engine": [
        "differentiation", "frozen_trunk", "recording", "graph_cache", "layout", "method", "optimizers", "remedies",
        "engine", "estimate", "gradient_check"
    ],
    "fleet": [
        "events", "executor", "limits", "vitals", "controller", "ray.capacity", "ray.reach", "ray.cluster", "server",
        "worker", "actors", "ray.actors", "ray.metrics", "recovery", "roster", "dispatch", "local", "ray.fleet"
    ],
    "evaluation": [
        "baselines", "evaluator", "figures", "intervals", "comparison", "joint", "verdict", "advice", "protocol"
    ],
    "run": [
        "auto", "machine", "initial_weights", "plugins", "job_file", "build", "trust", "resolved", "task_sizes",
        "learner_settings", "new_job", "bench", "identity", "prepare", "pictures", "preflight", "signals", "tracker",
        "mirror", "compare", "saved", "places", "directory", "fleets", "inputs", "few_shot", "predictor", "demo",
        "export", "facts", "remedies", "judge", "measures", "replay", "results", "evaluate", "resume", "watch",
        "trainer",
        "dry_run", "api", "package", "status", "submission", "doctor"
    ],
    "cli": ["tables", "predictions", "bench", "config", "cluster", "data", "report", "runs", "train", "use", "main"],
}  # fmt: skip
"""A file imports from files before it in its room only."""
RAY = {
    "fleet.ray.actors", "fleet.ray.capacity", "fleet.ray.cluster", "fleet.ray.fleet", "fleet.ray.metrics",
    "fleet.ray.reach", "run.doctor", "run.submission",
}  # fmt: skip
LONGEST_FILE, LONGEST_FUNCTION, MOST_IMPORTS = 500, 60, 12
GRAPH, PATHS = imports(PACKAGE), modules(PACKAGE)
NAMES = sorted(set(GRAPH) - {"", "__main__"})


def room(name: str) -> str:
    return name.partition(".")[0]


def is_facade(name: str) -> bool:
    """An `__init__`, which only names what is in its folder."""
    return PATHS[name].name == "__init__.py"


@pytest.mark.parametrize("name", NAMES)
def test_a_file_imports_from_lower_floors_and_from_files_before_it(name):
    floor = {each: number for number, rooms in enumerate(FLOORS) for each in rooms}
    own, order = room(name), [*FILES[room(name)]]
    for other in GRAPH[name]:
        if room(other) != own:
            assert floor[room(other)] < floor[own], f"{name} imports {other}, which is no lower floor"
        elif not is_facade(name) and not is_facade(other):
            places = [order.index(each.partition(".")[2]) for each in (other, name)]
            assert places[0] < places[1], f"{name} imports {other}, which comes after it"


def test_every_file_has_its_place_and_nothing_runs_in_circles():
    assert {f"{own}.{file}" for own, files in FILES.items() for file in files} == {
        name for name in NAMES if not is_facade(name)
    }
    assert circles(GRAPH) == []


@pytest.mark.parametrize("name", NAMES)
def test_ray_and_mlflow_are_imported_where_they_may_be(name):
    tops = {
        found.split(".")[0]
        for node in ast.walk(ast.parse(PATHS[name].read_text()))
        for found in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert "ray" not in tops or name in RAY
    assert "mlflow" not in tops or room(name) == "tracking"


@pytest.mark.parametrize("name", NAMES)
def test_files_and_functions_can_be_read(name):
    text = PATHS[name].read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    assert is_facade(name) or len(GRAPH[name]) <= MOST_IMPORTS
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1 - len((ast.get_docstring(node) or "").splitlines())
            assert lines <= LONGEST_FUNCTION, f"{node.name} is too long"
