"""Every test process computes on one thread: two processes with two threads each crawl, and bits depend on it."""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a test must not write a token into the user's home
os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from tests.raw_runs import RawRuns

torch.set_num_threads(1)

FORWARD_MODE = "ignore:`torch.jit.script` is deprecated:DeprecationWarning"  # torch's own rules for it, at first use

SAVEFIG = Figure.savefig
REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", FORWARD_MODE)


def pytest_collection_modifyitems(items):
    """Those with actors wait more than they compute: first, so that others fill the gaps of tests run in parallel."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


@pytest.fixture(scope="session", autouse=True)
def session(tmp_path_factory) -> Iterator[None]:
    """Built-in data sets are built once, outside the home; figures are drawn but not written, which takes longer than a
    small run (the fixture `figures` writes them)."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METADIST_CACHE", str(folder / "metadist_cache"))
        patch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())
        yield


@pytest.fixture
def figures(session, monkeypatch) -> None:
    """Figures are written in this test."""
    monkeypatch.setattr(Figure, "savefig", SAVEFIG)


@pytest.fixture(scope="session")
def omniglot_folder() -> Path:
    """The official zips, where this machine has them."""
    folder = REAL_DATA / "omniglot"
    if not folder.is_dir():
        pytest.skip(f"no Omniglot in {folder}: put images_background.zip and images_evaluation.zip there")
    return folder


@pytest.fixture(scope="session")
def raw_runs(session, tmp_path_factory) -> Iterator["RawRuns"]:
    """Small runs on raw files."""
    from tests.raw_runs import RawRuns

    folder = tmp_path_factory.mktemp("raw")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield RawRuns(folder)


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory) -> Path:
    """An MLflow database as new, to be copied: making one takes seconds."""
    from metadist.tracking.database import make_database

    folder = tmp_path_factory.mktemp("mlflow")
    make_database(folder / "mlflow.db", folder / "mlartifacts")
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def s3() -> Iterator[Callable[[str], str]]:
    """Names places in a bucket of an S3 server on this machine: s3("runs/one") is a URI."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = pytest.importorskip("moto.server", reason="no S3 server: pip install 'moto[server]'")
    from pyarrow import fs

    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    options = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
        fs.FileSystem.from_uri(f"s3://bucket?{options}&allow_bucket_creation=true")[0].create_dir("bucket")
        yield lambda place: f"s3://bucket/{place}?{options}"
    running.stop()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for all tests that need actors; it claims more CPUs than there are, so that workers can join."""
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
