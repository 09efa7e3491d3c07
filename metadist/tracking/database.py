"""The SQLite database in which MLflow keeps runs where there is no server."""

import os
import threading
import uuid
from pathlib import Path

_MIGRATING = threading.Lock()  # MLflow's migrations are not for several threads


def database_file(uri: str) -> Path | None:
    """The file of an SQLite database, None where the URI is of another kind."""
    scheme, mark, path = uri.partition(":///")
    in_file = mark and scheme.partition("+")[0] == "sqlite" and path.partition("?")[0] not in ("", ":memory:")
    return Path(path.partition("?")[0]).absolute() if in_file else None


def make_database(path: Path, artifacts: Path) -> None:
    """A new database under a name of its own until it is whole: a process may be killed, and several may do the same.
    Readable by its user alone."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with _MIGRATING:
        if path.exists():
            return
        try:
            os.close(os.open(aside, os.O_CREAT | os.O_EXCL, 0o600))
            SqlAlchemyStore(f"sqlite:///{aside}", artifacts.as_uri()).engine.dispose()
            _appear(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def _appear(aside: Path, path: Path) -> None:
    """By a link, which unlike a rename replaces nothing that another process has made meanwhile."""
    try:
        os.link(aside, path)
    except FileExistsError:
        return
    except OSError:  # a file system without links
        os.rename(aside, path)
