"""Whether MLflow can be reached and written to, within seconds: its own client tries for minutes."""

import base64
import json
import os
import ssl
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from metadist.core.files import reason
from metadist.core.redaction import redact

ANSWER_S = 5.0


def unwritable(uri: str) -> str:
    """Why a run could not be tracked at this tracking URI, in words; nothing where it could.

    A server is asked for an experiment of a name that it has, which it refuses to those only who may make one; a
    database is asked to change no row of a table.
    """
    scheme = urlsplit(uri).scheme
    check: Callable[[str], str] | None = {"http": _server, "https": _server, "sqlite": _file}.get(scheme)
    if check is None and scheme.partition("+")[0] in ("postgresql", "mysql", "mssql"):
        check = _database
    if check is None:
        return f"{redact(uri)} is neither a server (http, https) nor a database (sqlite, postgresql, mysql, mssql)"
    return check(uri)


def _server(uri: str) -> str:
    parts = urlsplit(uri)
    port = f":{parts.port}" if parts.port else ""
    address = f"{parts.scheme}://{parts.hostname}{port}{parts.path.rstrip('/')}"
    headers = {"Content-Type": "application/json", **_authorization(parts.username, parts.password)}
    asked = Request(f"{address}/api/2.0/mlflow/experiments/create", json.dumps({"name": "Default"}).encode(), headers)
    unsafe = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() == "true"
    context = ssl._create_unverified_context() if unsafe else None
    try:
        with urlopen(asked, timeout=ANSWER_S, context=context):
            return ""
    except HTTPError as error:
        answer = error.read(10_000).decode(errors="replace")
        if error.code == 400 and "RESOURCE_ALREADY_EXISTS" in answer:
            return ""
        if error.code in (401, 403):
            return f"{address} does not let this user write ({error.code}): set MLFLOW_TRACKING_USERNAME and _PASSWORD"
        return f"{address} answers {error.code} {error.reason}"
    except (URLError, OSError) as error:
        return f"{address} does not answer ({reason(getattr(error, 'reason', error))})"  # pyright: ignore


def _authorization(user: str | None, password: str | None) -> dict[str, str]:
    """As MLflow's own client takes them: from the environment, or the address."""
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    user = os.environ.get("MLFLOW_TRACKING_USERNAME") or unquote(user or "")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or unquote(password or "")
    both = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {both}"} if user else {}


def _file(uri: str) -> str:
    path = Path(uri.partition(":///")[2]).absolute()
    place = path if path.exists() else next(parent for parent in path.parents if parent.exists())
    if not os.access(place, os.W_OK) or not os.access(place if place.is_dir() else place.parent, os.W_OK):
        return f"{place} cannot be written to"
    return _database(uri) if path.exists() else ""


def _database(uri: str) -> str:
    from sqlalchemy import create_engine, inspect, text
    from sqlalchemy.exc import SQLAlchemyError

    seconds = {"sqlite": "timeout", "postgresql": "connect_timeout", "mysql": "connect_timeout", "mssql": "timeout"}
    kind = urlsplit(uri).scheme.partition("+")[0]
    try:
        engine = create_engine(uri, connect_args={seconds[kind]: int(ANSWER_S)})
        with closing(engine.raw_connection()):
            pass
        if inspect(engine).has_table("experiments"):  # else MLflow makes its tables at first use
            with engine.connect() as connection:
                connection.execute(text("UPDATE experiments SET name = name WHERE 1 = 0"))
                connection.rollback()
        engine.dispose()
    except (SQLAlchemyError, ImportError, OSError) as error:
        return f"{redact(uri)} does not take anything ({redact(reason(getattr(error, 'orig', None) or error))[:200]})"
    return ""
