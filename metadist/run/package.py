"""What is sent to a cluster with a job: its file, with every setting resolved, and its own code; checked and packed."""

import ast
import importlib.metadata
import importlib.util
import os
import shutil
import site
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from metadist.config import Config, dump_config, shown
from metadist.core.errors import SUBMITTED_BY, InputError
from metadist.run.build import Job
from metadist.run.plugins import find_modules_here, resolve
from metadist.run.prepare import prepare
from metadist.run.resume import evaluated_splits
from metadist.run.trust import outside_code

JOB_FILE = "metadist-job.yaml"
"""Of no name that a file of the user's own has, which may be included."""
LEFT_OUT = {
    ".git",
    ".hg",
    ".venv",
    "venv",
    "__pycache__",
    "node_modules",
    "runs",
    "mlruns",
    "mlartifacts",
    ".ssh",
    ".aws",
    ".gitignore",  # by which, as by the next, Ray would leave out more in silence
    ".rayignore",
}
_LEFT_OUT_ENDINGS = (".env", ".pem", ".key", ".db", ".arrow", ".pyc", "auth_token")
_INSTALLED = [
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), *site.getsitepackages(),
    site.getusersitepackages(),
]  # fmt: skip
_HERE = ("localhost", "127.0.0.1", "::1")


def check_portable(config: Config, on_this_machine: bool) -> None:
    """Raises InputError where a job means something else on the cluster's machines than here: relative places, which
    lie in a copy of its files that is thrown away, addresses of this machine, and secrets, which all may read there.

    `on_this_machine`: the cluster's head is here, so that an address such as 127.0.0.1 means the same.
    """
    places = {
        "run_dir": config.run_dir,
        "data.path": config.data.path,
        "model.weights": config.model.weights,
        "checkpoint.location": config.checkpoint.location,
    }
    if config.run_dir is None:
        raise InputError(
            "run_dir is not set, and would vanish with the job: give an absolute path on storage that all nodes share, "
            "or a URI, such as run_dir=s3://bucket/runs/NAME"
        )
    relative = [f"{key}={place}" for key, place in places.items() if place and not _is_absolute(place)]
    if relative:
        raise InputError(
            f"{' and '.join(relative)}: a relative path lies, on a cluster, in a copy of the job's files that vanishes "
            "with it: give an absolute path on storage that all nodes share, or a URI such as s3://bucket/..."
        )
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if config.tracking.mlflow and uri and not _is_absolute(uri.replace("sqlite:///", "", 1)):
        raise InputError(
            f"the MLflow address {uri} is a relative path, which on a cluster vanishes with the job: give that of a "
            "server, http://HOST:5000, or sqlite:////shared/mlflow.db"
        )
    if config.tracking.mlflow and urlsplit(uri).hostname in _HERE and not on_this_machine:
        raise InputError(
            f"the MLflow address {uri} is that of whichever machine uses it: give the server's own NAME, as the "
            f"cluster's nodes see it, and have it take that: `{_serve(urlsplit(uri).port or 5000)}`"
        )
    if config.fleet.address:
        raise InputError(f"fleet.address={config.fleet.address}: a submitted job uses its own cluster, leave it out")
    plain = config.model_dump(mode="json")
    if secret := sorted(set(_flat(plain)) - set(_flat(shown(config)))):
        raise InputError(
            f"{', '.join(key for key, _ in secret)} holds a secret, which all who may look at the cluster's jobs would "
            "see: leave it out here, and set it in the environment of the cluster's nodes (MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )


def _serve(port: int) -> str:
    """What starts a server of MLflow that other machines may use: it answers 403 to names that it was not told."""
    return f"mlflow server --host 0.0.0.0 --port {port} --allowed-hosts 'NAME:{port},localhost:{port}'"


def _is_absolute(place: str) -> bool:
    return "://" in place or Path(place).is_absolute()


def _flat(tree: object, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of every leaf."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, repr(tree)


def check_job(config: Config) -> str:
    """Try what needs no files of the cluster, and say what that was: code that the job names is imported; a job with
    built-in data, and without weights to begin with, computes one task. Raises InputError."""
    if config.data.family and not config.model.weights:
        prepare(Job(config), evaluated_splits(config))
        return "one task was computed here"
    for name in outside_code(config).values():
        resolve(name)
    return "settings and code were checked here, what needs the data is when the job starts"


def job_files(config: Config, include: Sequence[str | Path] = ()) -> tuple[dict[str, Path | str], list[str]]:
    """What is sent: name in the job's directory -> file here, or text; and the paths that are left out.

    That is the job file, the modules it names with those modules beside them that they import, and what `include` adds
    by its path under the current directory; of an included folder without history, environments, runs, data and keys.
    Raises InputError on a path that is not there, or elsewhere, and on a module that is no Python.
    """
    files: dict[str, Path | str] = {JOB_FILE: dump_config(config)}
    find_modules_here()
    for name in outside_code(config).values():
        _add_module(name.partition(":")[0], files)
    here, left_out = Path.cwd(), []
    for given in include:
        path = Path(given).absolute()
        if not path.exists() or not path.is_relative_to(here):
            raise InputError(f"--include {given}: give a file or folder in {here}, so that its path is the same there")
        for file in [path] if path.is_file() else sorted(filter(Path.is_file, path.rglob("*"))):
            inside, name = file.relative_to(path), str(file.relative_to(here))
            if LEFT_OUT.isdisjoint(inside.parts) and not (inside.parts and file.name.endswith(_LEFT_OUT_ENDINGS)):
                files[name] = file
            else:
                left_out.append(name)
    return files, [name for name in dict.fromkeys(left_out) if name not in files]


def _add_module(name: str, files: dict[str, Path | str]) -> None:
    """Adds the source files of a module, of the packages it is in and of all that they import, but for what is
    installed, each by its path from where modules are looked for."""
    parts = name.split(".")
    for module in [".".join(parts[:count]) for count in range(1, len(parts) + 1)]:
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError, AttributeError):
            return  # an optional import, or the last part names no module but something in one
        if spec is None or module.partition(".")[0] == "metadist":
            return
        if spec.origin is None or not spec.origin.endswith(".py"):
            continue  # a folder without __init__, or no Python
        path = Path(spec.origin)
        is_package = path.name == "__init__.py"
        place = "/".join(module.split(".")) + ("/__init__.py" if is_package else ".py")
        if place not in files and not any(path.is_relative_to(root) for root in _INSTALLED):
            files[place] = path
            for other in _imports(path, module if is_package else module.rpartition(".")[0]):
                _add_module(other, files)


def _imports(path: Path, package: str) -> list[str]:
    """Full names of what a source file imports, anywhere in it; of `from a import b` both `a` and `a.b`."""
    names: list[str] = []
    try:
        tree = ast.parse(path.read_bytes(), path)
    except SyntaxError as error:
        raise InputError(f"{path}, line {error.lineno}: {error.msg}") from None
    except ValueError as error:  # zero bytes
        raise InputError(f"{path}: {error}") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)] if base else []
    return names


def pack(files: Mapping[str, Path | str], folder: Path) -> None:
    """Write them to a folder."""
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            target.write_text(content)
        else:
            shutil.copyfile(content, target)


def sizes(files: Mapping[str, Path | str]) -> dict[str, int]:
    """Bytes of each, the largest first."""
    found = {name: len(c.encode()) if isinstance(c, str) else c.stat().st_size for name, c in files.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def check_client() -> None:
    """Raises InputError in a job that was submitted by another version of metadist than runs it."""
    here, client = importlib.metadata.version("metadist"), os.environ.get(SUBMITTED_BY)
    if client not in (None, here):
        raise InputError(
            f"this cluster has metadist {here}, and the job was submitted by {client}: install metadist=={here} where "
            f"it is submitted, or {client} on the cluster's nodes"
        )
