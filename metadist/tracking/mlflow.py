"""MLflow, fed by one background thread, so that a slow, broken or hanging server never touches training.

The plain MLflow client blocks for minutes when its server is down, its own asynchronous mode can lose the last numbers,
and a run left alone is shown as finished whatever happened. Hence: callers only ever append to a bounded buffer; one
daemon thread imports MLflow, writes a batch every two seconds, retries by itself; `finish` waits a bounded time.
"""

import getpass
import json
import logging
import os
import re
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from metadist.core.redaction import command_line, redact, redacted
from metadist.tracking import Status
from metadist.tracking.pending import Pending, tag_value

if TYPE_CHECKING:
    from mlflow import MlflowClient

_FLUSH_EVERY_S = 2.0
_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 5.0, 300.0
_CLOSING_ATTEMPTS, _CLOSING_PAUSE_S = 2, 0.5
_ARTIFACT_ATTEMPTS = 3
_REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
_HALF_MADE = re.compile(r"duplicate column name|table \S+ already exists|no such table")
_MOST_CHARS = 300
_MIGRATING = threading.Lock()  # MLflow's migrations are not for several threads
_GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


class MlflowTracker:
    """One MLflow run. No call waits: each only appends to a buffer of bounded size (the oldest metrics go first and are
    counted in `tracking/dropped`; non-finite values are not sent but counted in `tracking/nonfinite`).

    `uri` defaults to MLFLOW_TRACKING_URI, else to an SQLite file and an artifact folder under `run_root`. With `run_id`
    that run is continued; when it is gone a new one says so in the tag `resumed_from_run`. Parameters cannot change in
    MLflow: changed ones are listed in the tag `param_drift`. `opened` is called, from another thread, with the id of
    the run once there is one. Failures are told through `say`, one sentence an outage,
    possibly from another thread.
    """

    def __init__(
        self,
        uri: str | None,
        experiment: str,
        run_name: str,
        run_id: str | None,
        run_root: Path,
        say: Callable[[str], None],
        opened: Callable[[str], object] = lambda run_id: None,
    ) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._run_root = Path(run_root).absolute()
        self._uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self._run_root / 'mlflow.db'}"
        self._shown_uri = redact(self._uri)
        self._experiment, self._run_name, self._say, self._opened = experiment, run_name, say, opened
        self._run_id, self._run_opened = run_id, threading.Event()
        self._started_ms = int(time.time() * 1000)
        self._known_params: dict[str, str] = {}
        self._drift: dict[str, str] = {}
        self._pending, self._lock = Pending(), threading.Lock()
        self._refusal_told = False
        self._outage = ""
        self._status: tuple[Status, int] = ("FINISHED", 0)
        self._close_error: Exception | None = None
        self._closing, self._closed = threading.Event(), threading.Event()
        threading.Thread(target=self._write, name="mlflow-writer", daemon=True).start()

    def params(self, values: dict[str, str]) -> None:
        with self._lock:
            self._pending.add_params(redacted(values))

    def tags(self, values: dict[str, str]) -> None:
        with self._lock:
            self._pending.add_tags(redacted(values))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        with self._lock:
            self._pending.add_metrics(values, step, int(time.time() * 1000))

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Only the first 36 characters of `digest` are kept (MLflow's limit)."""
        with self._lock:
            self._pending.datasets[name, digest[:36], redact(source), context] = None

    def artifact(self, path: Path, folder: str = "") -> None:
        with self._lock:
            self._pending.artifacts[Path(path).absolute(), folder] = 0

    def wait_run_id(self, timeout_s: float) -> str | None:
        """The run's id, for the checkpoint: the one asked for at construction as long as the server has not answered,
        None when there is none yet.
        """
        self._run_opened.wait(timeout_s)
        return self._run_id

    def finish(self, status: Status, timeout_s: float = 15.0) -> None:
        """Writes what is left and the run's end, then returns, after `timeout_s` at the latest. A second call does
        nothing.
        """
        if self._closing.is_set():
            return
        self._status = (status, int(time.time() * 1000))
        self._closing.set()
        in_time = self._closed.wait(timeout_s)
        if not in_time or self._close_error:
            reason = self._reason(self._close_error) if self._close_error else f"no answer within {timeout_s:g} s"
            reason = "as told above" if reason == self._outage else reason
            self._say(
                f"MLflow at {self._shown_uri} did not take the end of this run ({reason}) and may show it as running; "
                "all its numbers are in metrics.jsonl in the run directory."
            )

    def _write(self) -> None:
        """The writer thread. It catches every exception of MLflow: tracking must not stop training; each is told."""
        client: MlflowClient | None = None
        backoff_s, wait_s = _FIRST_BACKOFF_S, 0.0
        attempts_left = _CLOSING_ATTEMPTS
        while attempts_left:
            closing = self._closing.wait(wait_s)
            try:
                client = client or self._connect()
                self._flush(client)
                if closing:
                    client.set_terminated(str(self._run_id), *self._status)
            except Exception as error:
                self._close_error = error
                if closing:
                    attempts_left -= 1
                    time.sleep(_CLOSING_PAUSE_S)
                elif backoff_s == _FIRST_BACKOFF_S:
                    self._tell_outage(error)
                wait_s, backoff_s = backoff_s, min(2 * backoff_s, _LAST_BACKOFF_S)
            else:
                self._close_error = None
                if backoff_s > _FIRST_BACKOFF_S and not closing:
                    self._say(f"MLflow at {self._shown_uri} answers again.")
                wait_s, backoff_s = _FLUSH_EVERY_S, _FIRST_BACKOFF_S
                attempts_left = 0 if closing else attempts_left
        self._closed.set()

    def _tell_outage(self, error: Exception) -> None:
        self._outage = self._reason(error)
        self._say(
            f"MLflow at {self._shown_uri} cannot be written to ({self._outage}); training goes on, its numbers are in "
            "metrics.jsonl, and MLflow is tried again from time to time."
        )

    def _connect(self) -> "MlflowClient":
        """A client whose run is open. The first import takes seconds, as does the first use of a new database."""
        from mlflow import MlflowClient

        for chatty in ("mlflow.store.db.utils", "alembic"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        if (file := database_file(self._uri)) is not None and not file.exists():
            make_database(file, self._run_root / "mlartifacts")
        client = MlflowClient(tracking_uri=self._uri)
        if not self._continue_run(client):
            gone = self._run_id
            tags = _context_tags() | ({"resumed_from_run": gone} if gone else {})
            experiment_id = self._experiment_id(client)
            run = client.create_run(experiment_id, start_time=self._started_ms, run_name=self._run_name, tags=tags)
            self._run_id = run.info.run_id
            if gone:
                self._say(
                    f"MLflow at {self._shown_uri} no longer has run {gone}: a new run, {self._run_id}, was started."
                )
        assert self._run_id is not None
        self._opened(self._run_id)
        self._run_opened.set()
        return client

    def _continue_run(self, client: "MlflowClient") -> bool:
        """Sets the run asked for to running again; False when none was, or when it is gone or deleted."""
        from mlflow.exceptions import MlflowException

        if self._run_id is None:
            return False
        try:
            run = client.get_run(self._run_id)
        except MlflowException as error:
            if error.error_code in _GONE:
                return False
            raise
        if run.info.lifecycle_stage != "active":
            return False
        client.update_run(self._run_id, status="RUNNING")
        self._known_params = dict(run.data.params)
        return True

    def _experiment_id(self, client: "MlflowClient") -> str:
        """The experiment, created if need be. A database keeps no files, and MLflow would put them under the current
        directory, which for a Ray job is thrown away: hence a place under the run root.
        """
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self._experiment)
        if found is not None:
            return found.experiment_id
        server = self._uri.startswith(("http://", "https://", "databricks", "uc:"))
        location = None if server else (self._run_root / "mlartifacts").as_uri()
        try:
            return client.create_experiment(self._experiment, artifact_location=location)
        except MlflowException as error:
            other = client.get_experiment_by_name(self._experiment)
            if error.error_code == "RESOURCE_ALREADY_EXISTS" and other is not None:
                return other.experiment_id
            raise

    def _flush(self, client: "MlflowClient") -> None:
        """Sends all that is pending; what could not be sent is kept for the next time before the error is raised."""
        with self._lock:
            pending, self._pending = self._pending, self._pending.successor()
        try:
            while pending.metrics or pending.params or pending.tags:
                self._send_batch(client, pending)
            for dataset in list(pending.datasets):
                self._send_dataset(client, *dataset)
                del pending.datasets[dataset]
            self._send_artifacts(client, pending)
        finally:
            with self._lock:
                self._pending.put_back(pending)

    def _send_batch(self, client: "MlflowClient", pending: Pending) -> None:
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        known = self._known_params
        new = {key: value for key, value in pending.params.items() if key not in known}
        changed = {key: value for key, value in pending.params.items() if known.get(key, value) != value}
        self._drift.update({key: f"{key}: {known[key]} -> {value}" for key, value in changed.items()})
        if changed:
            pending.tags["param_drift"] = tag_value("; ".join(self._drift.values()))
        batch = pending.metrics[:1000]
        try:
            client.log_batch(
                str(self._run_id),
                metrics=[Metric(key, value, at_ms, step) for key, value, at_ms, step in batch],
                params=[Param(key, value) for key, value in new.items()],
                tags=[RunTag(key, value) for key, value in pending.tags.items()],
            )
        except MlflowException as error:
            if error.error_code not in _REFUSED:
                raise
            self._tell_refusal(error)
        known.update(new)
        pending.sent(len(batch))

    def _send_dataset(self, client: "MlflowClient", name: str, digest: str, source: str, context: str) -> None:
        """The entity that MLflow's MetaDataset stands for, without its guess at the kind of source, which warns."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        scheme = source.partition("://")[0] if "://" in source else "file"
        kind = {"file": "local"}.get(scheme, scheme)
        data = Dataset(name, digest, source_type=kind, source=json.dumps({"uri": source}))
        client.log_inputs(str(self._run_id), [DatasetInput(data, [InputTag("mlflow.data.context", context)])])

    def _send_artifacts(self, client: "MlflowClient", pending: Pending) -> None:
        """A file that cannot be stored (no credentials, no space) is tried thrice, and does not hold up the numbers."""
        for (path, folder), attempts in list(pending.artifacts.items()):
            try:
                client.log_artifact(str(self._run_id), str(path), folder or None)
            except Exception as error:
                pending.artifacts[path, folder] = attempts + 1
                if attempts + 1 < _ARTIFACT_ATTEMPTS and path.exists() and not self._closing.is_set():
                    continue
                self._say(f"MLflow at {self._shown_uri} did not take the file {path} ({_sentence(error)}).")
            del pending.artifacts[path, folder]

    def _reason(self, error: Exception) -> str:
        """What is wrong, with the remedy where MLflow's own words have none that is of use here."""
        file = database_file(self._uri)
        if file is not None and _HALF_MADE.search(str(error)):
            aside = shlex.join(["mv", str(file), f"{file}.broken"])
            return f"its first use was cut off and left it half made: `{aside}`, and the next run makes a new one"
        if urlsplit(self._uri).scheme in ("", "file") and "maintenance mode" in str(error):
            return (
                f"MLflow keeps runs in files no longer: set tracking.uri=sqlite:///{self._run_root / 'mlflow.db'}, or "
                "leave it and MLFLOW_TRACKING_URI out; `mlflow migrate-filestore` takes over what the files hold"
            )
        return _sentence(error)

    def _tell_refusal(self, error: Exception) -> None:
        if not self._refusal_told:
            self._say(
                f"MLflow at {self._shown_uri} refused some values ({_sentence(error)}); they are in metrics.jsonl."
            )
        self._refusal_told = True


def _context_tags() -> dict[str, str]:
    """What MLflow shows in the run list; only its global API, not the client, would fill these in."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    command = command_line([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {
        "mlflow.user": user,
        "mlflow.source.name": tag_value(command),
        "mlflow.source.type": "LOCAL",
    }


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


def _sentence(error: Exception) -> str:
    line = redact((str(error).strip().splitlines() or [type(error).__name__])[0])
    return line if len(line) <= _MOST_CHARS else f"{line[:_MOST_CHARS]} ..."
