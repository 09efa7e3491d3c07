"""Whether MLflow can be reached and written to, within seconds: its own client tries for minutes."""

import os
import socket
import ssl
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from metadist.core.files import reason
from metadist.core.redaction import redact

ANSWER_S = 5.0
_MOST_CHARS = 300


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
    """Asked as MLflow's own client asks: with the passwords, tokens, certificates and proxies that are set for it."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    address, asked = redact(uri).rstrip("/"), "/api/2.0/mlflow/experiments/create"
    try:
        answer: Any = http_request(
            get_default_host_creds(uri), asked, "POST", max_retries=0, timeout=ANSWER_S, raise_on_status=False,
            json={"name": "Default"},
        )  # fmt: skip
    except (MlflowException, OSError) as error:
        return f"{address} does not answer ({redact(reason(_innermost(error)))[:200]})"
    if answer.ok or (answer.status_code == 400 and "RESOURCE_ALREADY_EXISTS" in answer.text):
        return ""
    if answer.status_code == 403 and "Invalid Host header" in answer.text:
        host = urlsplit(address).netloc
        return f"{address} does not take this name (403, Invalid Host header): start it with --allowed-hosts '{host}'"
    if answer.status_code in (401, 403):
        return (
            f"{address} does not let this user write ({answer.status_code}): set MLFLOW_TRACKING_USERNAME and _PASSWORD"
        )
    return f"{address} answers {answer.status_code} {answer.reason}"


def shortened(error: BaseException) -> str:
    """What an exception of MLflow says: where the network failed the system's own words, such as "Connection refused",
    without the layers around them, each of which repeats the address; else its first line."""
    if isinstance(_innermost(error), ConnectionError | TimeoutError | socket.gaierror | ssl.SSLError):
        return redact(reason(_innermost(error)))
    line = redact((str(error).strip().splitlines() or [type(error).__name__])[0])
    return line if len(line) <= _MOST_CHARS else f"{line[:_MOST_CHARS]} ..."


def _innermost(error: BaseException) -> BaseException:
    while cause := error.__cause__ or error.__context__:
        error = cause
    return error


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
