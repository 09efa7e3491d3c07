"""MLflow, fed by one background thread, so that a slow, broken or hanging server never touches training.

The plain MLflow client blocks for minutes when its server is down, its own asynchronous mode can lose the last numbers,
and a run left alone is shown as finished whatever happened. Hence: one daemon thread imports MLflow and every two
seconds sends what `metrics.jsonl` has beyond the offset it has reached; when that fails it waits longer and longer and
tries again from the same offset; `finish` waits a bounded time.
"""

import functools
import getpass
import json
import logging
import os
import posixpath
import re
import shlex
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from metadist.core.errors import doing_it_again
from metadist.core.files import parse_json_line, replace_text
from metadist.core.redaction import redact, redacted
from metadist.tracking import SavedModel, Status, Tracker
from metadist.tracking.database import database_file, make_database
from metadist.tracking.jsonl import line_batches
from metadist.tracking.models import log_model
from metadist.tracking.reach import shortened

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

OFFSET_FILE = "mlflow_offset"
FLUSH_EVERY_S = 2.0
BEGIN_S = 10.0  # after which a run is shown that has no numbers yet
FIRST_BACKOFF_S, LAST_BACKOFF_S = 5.0, 300.0
_CLOSING_ATTEMPTS, _CLOSING_PAUSE_S = 2, 0.5
_ARTIFACT_ATTEMPTS = 3
HEARTBEAT, HEARTBEAT_EVERY_S = "metadist.heartbeat", 60.0
SILENT_S = 3 * HEARTBEAT_EVERY_S  # after which a run is taken for dead
_END_S, _MODEL_S = 15.0, 120.0  # how long the end of a run is waited for, and where it has models
_KEY_CHARS, _PARAM_CHARS, _TAG_CHARS, _DIGEST_CHARS = 250, 6000, 8000, 36  # MLflow's limits
_REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
_GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
_HALF_MADE = re.compile(r"duplicate column name|table \S+ already exists|no such table")


class ParentGone(Exception):
    """There is no run in which another one should be nested."""


class MlflowTracker(Tracker):
    """One MLflow run, whose numbers are those in `metrics.jsonl` of `run_dir`. No call waits.

    `uri` defaults to MLFLOW_TRACKING_URI, else to an SQLite file and an artifact folder beside `run_dir`. With `run_id`
    that run is continued, from the line of `metrics.jsonl` that it has reached; when it is gone a new one says so in
    the tag `resumed_from_run`. Parameters cannot change in MLflow: changed ones are listed in the tag `param_drift`.
    Values that are not finite are not sent, but their number is, as `train/nonfinite_metrics`. While it runs, the tag
    `metadist.heartbeat` is the time in seconds since 1970, a minute old at most.

    `opened` is called with the id of the run once there is one, and `say` with failures, one sentence an outage, both
    possibly from another thread. With `parent`, the id of a run there, a new run is nested in it. The best model is
    registered under the name `register`.
    """

    def __init__(
        self,
        uri: str | None,
        experiment: str,
        run_name: str,
        run_id: str | None,
        run_dir: Path,
        say: Callable[[str], None],
        opened: Callable[[str], object] = lambda run_id: None,
        parent: str | None = None,
        register: str | None = None,
    ) -> None:
        set_environment()
        self._metrics, self._run_root = Path(run_dir).absolute() / "metrics.jsonl", Path(run_dir).absolute().parent
        self._uri = tracking_uri(uri, self._run_root)
        self._shown_uri = redact(self._uri)
        self._experiment, self._run_name, self._say, self._opened = experiment, run_name, say, opened
        self._run_id, self._run_opened = run_id, threading.Event()
        self._parent, self._register = parent, register
        self.page: str | None = None
        """Where a browser finds the run, once there is one; see `run_page`."""
        self._beat_s = -HEARTBEAT_EVERY_S
        self._started_ms = int(time.time() * 1000)
        self._offset = _reached(self._metrics, run_id)  # bytes of metrics.jsonl that MLflow has
        self._lock = threading.Lock()  # on what the next four hold, which the writer sends where it is not sent yet
        self._params: dict[str, str] = {}
        self._tags: dict[str, str] = {}
        self._datasets: list[tuple[str, str, str, str]] = []
        self._artifacts: dict[tuple[Path, str], int] = {}  # (path, folder) -> how often it was tried
        self._models: list[SavedModel] = []
        self._sent_params: dict[str, str] = {}
        self._sent_tags: dict[str, str] = {}
        self._refusal_said = False
        self._outage = ""
        self._status: tuple[Status, int] = ("FINISHED", 0)
        self._error: Exception | None = None  # of the last attempt
        self._closing, self._closed = threading.Event(), threading.Event()
        self._wanted = threading.Event()  # MLflow takes seconds to import: not while the first meta-step is prepared
        threading.Thread(target=self._write, name="mlflow-writer", daemon=True).start()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        del values, step  # which the writer finds in metrics.jsonl
        self._wanted.set()

    def params(self, values: dict[str, str]) -> None:
        clean = {clean_key(key): str(value)[:_PARAM_CHARS] for key, value in redacted(values).items()}
        with self._lock:
            self._params |= clean

    def tags(self, values: dict[str, str]) -> None:
        clean = {clean_key(key): str(value)[:_TAG_CHARS] for key, value in redacted(values).items()}
        with self._lock:
            self._tags |= clean

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Only the first 36 characters of `digest` are kept (MLflow's limit)."""
        used = name, digest[:_DIGEST_CHARS], redact(source), context
        with self._lock:
            if used not in self._datasets:
                self._datasets.append(used)

    def artifact(self, path: Path, folder: str = "") -> None:
        with self._lock:
            self._artifacts[Path(path).absolute(), folder] = 0

    def model(self, model: SavedModel) -> None:
        with self._lock:
            self._models.append(model)

    def wait_run_id(self, timeout_s: float) -> str | None:
        """The run's id, for the checkpoint: the one asked for at construction as long as the server has not answered,
        None when there is none yet.
        """
        if timeout_s:
            self._wanted.set()
        self._run_opened.wait(timeout_s)
        return self._run_id

    def finish(self, status: Status, timeout_s: float | None = None) -> None:
        """Sends what is left and the run's end, then returns, after `timeout_s` at the latest (by default 15 seconds,
        two minutes where there are models to send). A second call does nothing.
        """
        if self._closing.is_set():
            return
        if timeout_s is None:
            timeout_s = _MODEL_S if self._models else _END_S
        self._status = (status, int(time.time() * 1000))
        self._closing.set()
        self._wanted.set()
        in_time = self._closed.wait(timeout_s)
        if not in_time or self._error:
            reason = self._reason(self._error) if self._error else f"no answer within {timeout_s:g} s"
            reason = "as said above" if reason == self._outage else reason
            lacking = sum(len(lines) for lines, _ in line_batches(self._metrics, self._offset))
            self._say(
                f"MLflow at {self._shown_uri} did not take the end of this run ({reason}): it lacks {lacking} lines of "
                f"metrics.jsonl in {self._metrics.parent} and may show the run as running; once it answers, "
                f"{'the same command' if self._parent else doing_it_again()} sends them"
            )

    def _write(self) -> None:
        """The writer thread. It catches every exception of MLflow: tracking must not stop training; each is said."""
        client: MlflowClient | None = None
        backoff_s, wait_s = FIRST_BACKOFF_S, 0.0
        self._wanted.wait(BEGIN_S)
        attempts_left = _CLOSING_ATTEMPTS
        while attempts_left:
            closing = self._closing.wait(wait_s)
            try:
                client = client or self._connect()
                self._send_all(client)
                if closing:
                    client.set_terminated(str(self._run_id), *self._status)
            except ParentGone as error:
                self._say(f"{error}: it is not shown there")
                attempts_left, self._error = 0, None
            except Exception as error:
                self._error = error
                if closing:
                    attempts_left -= 1
                    time.sleep(_CLOSING_PAUSE_S)
                elif backoff_s == FIRST_BACKOFF_S and not self._closing.is_set():  # else `finish` says it
                    self._report_outage(error)
                wait_s, backoff_s = backoff_s, min(2 * backoff_s, LAST_BACKOFF_S)
            else:
                self._error = None
                if backoff_s > FIRST_BACKOFF_S and not closing:
                    self._say(f"MLflow at {self._shown_uri} answers again.")
                wait_s, backoff_s = FLUSH_EVERY_S, FIRST_BACKOFF_S
                attempts_left = 0 if closing else attempts_left
        self._closed.set()

    def _report_outage(self, error: Exception) -> None:
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
            tags = {"mlflow.user": _user()} | ({"resumed_from_run": gone} if gone else {})
            if self._parent:
                tags["mlflow.parentRunId"] = self._parent
            experiment_id = self._experiment_of_parent(client) if self._parent else self._experiment_id(client)
            run = client.create_run(experiment_id, start_time=self._started_ms, run_name=self._run_name, tags=tags)
            self._run_id = run.info.run_id
            self._note_offset(0)
            if gone:
                self._say(
                    f"MLflow at {self._shown_uri} no longer has run {gone}: a new run, {self._run_id}, was started."
                )
        assert self._run_id is not None
        experiment_id = client.get_run(self._run_id).info.experiment_id
        self.page = run_page(self._uri, experiment_id, self._run_id)
        self._opened(self._run_id)
        self._run_opened.set()
        if not self.page.startswith("#"):
            self._say(f"MLflow shows this run at {self.page}")
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
        self._sent_params = dict(run.data.params)
        return True

    def _experiment_of_parent(self, client: "MlflowClient") -> str:
        from mlflow.exceptions import MlflowException

        try:
            return client.get_run(str(self._parent)).info.experiment_id
        except MlflowException as error:
            if error.error_code in _GONE:
                raise ParentGone(f"MLflow at {self._shown_uri} has no run {self._parent} to nest this in") from None
            raise

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

    def _send_all(self, client: "MlflowClient") -> None:
        """Sends all that MLflow lacks; what it takes is noted, so that the next attempt goes on from there."""
        self._send_settings(client)
        for lines, end in line_batches(self._metrics, self._offset):
            self._log_batch(client, metrics=[value for line in lines for value in _values(line)])
            self._note_offset(end)
        self._send_datasets(client)
        self._send_artifacts(client)
        self._send_models(client)

    def _note_offset(self, offset: int) -> None:
        """For a resumed run; where it cannot be written, that one sends a part twice, which harms nothing."""
        self._offset = offset
        with suppress(OSError):
            replace_text(self._metrics.with_name(OFFSET_FILE), f"{self._run_id} {offset}\n")

    def _send_settings(self, client: "MlflowClient") -> None:
        from mlflow.entities import Param, RunTag

        if time.monotonic() - self._beat_s >= HEARTBEAT_EVERY_S:
            self._beat_s = time.monotonic()
            self.tags({HEARTBEAT: f"{time.time():.0f}"})
        with self._lock:
            params, tags = dict(self._params), dict(self._tags)
        sent = self._sent_params
        changed = [f"{key}: {sent[key]} -> {value}" for key, value in params.items() if sent.get(key, value) != value]
        if changed:
            tags["param_drift"] = "; ".join(changed)[:_TAG_CHARS]
        params = {key: value for key, value in params.items() if key not in sent}
        tags = {key: value for key, value in tags.items() if self._sent_tags.get(key) != value}
        if params or tags:
            self._log_batch(
                client,
                params=[Param(key, value) for key, value in params.items()],
                tags=[RunTag(key, value) for key, value in tags.items()],
            )
            self._sent_params |= params
            self._sent_tags |= tags

    def _log_batch(self, client: "MlflowClient", **batch: Any) -> None:
        """Sends it; what MLflow refuses for its form is said once, and not sent again."""
        from mlflow.exceptions import MlflowException

        try:
            client.log_batch(str(self._run_id), **batch)
        except MlflowException as error:
            if error.error_code not in _REFUSED:
                raise
            if not self._refusal_said:
                self._say(
                    f"MLflow at {self._shown_uri} refused some values ({shortened(error)}); they are in metrics.jsonl."
                )
            self._refusal_said = True

    def _send_datasets(self, client: "MlflowClient") -> None:
        """The entities that MLflow's MetaDataset stands for, without its guess at the kind of source, which warns."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        while self._datasets:
            name, digest, source, context = self._datasets[0]
            scheme = source.partition("://")[0] if "://" in source else "file"
            kind = {"file": "local"}.get(scheme, scheme)
            data = Dataset(name, digest, source_type=kind, source=json.dumps({"uri": source}))
            client.log_inputs(str(self._run_id), [DatasetInput(data, [InputTag("mlflow.data.context", context)])])
            with self._lock:
                del self._datasets[0]

    def _send_artifacts(self, client: "MlflowClient") -> None:
        """A file that cannot be stored (no credentials, no space) is tried thrice, and does not hold up the numbers."""
        with self._lock:
            artifacts = dict(self._artifacts)
        for (path, folder), attempts in artifacts.items():
            try:
                client.log_artifact(str(self._run_id), str(path), folder or None)
            except Exception as error:
                if attempts + 1 < _ARTIFACT_ATTEMPTS and path.exists() and not self._closing.is_set():
                    with self._lock:
                        self._artifacts[path, folder] = attempts + 1
                    continue
                self._say(f"MLflow at {self._shown_uri} did not take the file {path} ({shortened(error)}).")
            with self._lock:
                del self._artifacts[path, folder]

    def _send_models(self, client: "MlflowClient") -> None:
        """Each is tried once, whatever comes of it: it can be made again from the run, and must not hold up its end."""
        while self._models:
            model = self._models[0]
            try:
                lines = (line for batch, _ in line_batches(self._metrics, 0) for line in batch)
                judged = (line for line in lines if b'"validation/' in line or b'"test/' in line)  # few of many
                figures = (metric for line in judged for metric in _values(line) if metric.step == model.step)
                own = [metric for metric in figures if metric.key.startswith(("validation/", "test/"))]
                log_model(client, str(self._run_id), model, own, self._register)
            except Exception as error:
                self._say(
                    f"MLflow at {self._shown_uri} did not take the {model.name} model ({shortened(error)}); "
                    f"`metadist.load` reads it from {self._metrics.parent}."
                )
            with self._lock:
                del self._models[0]

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
        return shortened(error)


def set_environment() -> None:
    """What MLflow's client does by default: it gives up soon, says nothing of itself and draws no bars. The user's own
    settings hold."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def tracking_uri(uri: str | None, run_root: Path) -> str:
    """The job's `tracking.uri`, else that of the environment, else SQLite beside the run directories in `run_root`."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_root.absolute() / 'mlflow.db'}"


def run_page(uri: str, experiment_id: str, run_id: str) -> str:
    """Where a browser finds a run, in the view for training: an address at a server, else (for a server that the user
    starts himself) what follows its address, from the `#` on."""
    page = f"#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return page
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path.rstrip('/')}/{page}"


def close_run(uri: str, run_id: str, status: Status) -> str:
    """End a run that MLflow shows as running and has not heard of for minutes, at its last sign of life; what was done
    or hinders, in a sentence, or "" where it shows it as ended."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    set_environment()
    file = database_file(uri)
    if file is not None and not file.exists():  # which the client would make
        return f"{redact(uri)}, where the run was shown, is not there"
    try:
        client = MlflowClient(tracking_uri=uri)
        run = client.get_run(run_id)
        if run.info.status != "RUNNING":
            return ""
        beat = run.data.tags.get(HEARTBEAT, "")
        heard_ms = int(beat) * 1000 if beat.isdecimal() else run.info.start_time
        silent_s = time.time() - heard_ms / 1000
        if silent_s < SILENT_S:  # a copy of a run, or one on a file system without locks, may well go on
            return (
                f"shown as running, heard of {silent_s:.0f} s ago: closed when asked after {SILENT_S:.0f} s of silence"
            )
        client.set_terminated(run_id, status, heard_ms)
        return f"the run, killed and still shown as running, is {status} there now"
    except MlflowException as error:
        return f"whether it shows the run as running is not known ({shortened(error)})"


def _reached(metrics: Path, run_id: str | None) -> int:
    """The bytes of `metrics.jsonl` that the MLflow run has; all that is there now where an earlier metadist, which
    noted nothing, sent it."""
    size = metrics.stat().st_size if metrics.exists() else 0
    try:
        noted_id, _, noted = metrics.with_name(OFFSET_FILE).read_text().partition(" ")
        return min(max(int(noted), 0), size) if noted_id == run_id else 0
    except (OSError, ValueError):
        return size if run_id else 0


def _values(line: bytes) -> list["Metric"]:
    """The numbers of a line of `metrics.jsonl`, which holds those that are not finite as texts."""
    from mlflow.entities import Metric

    row = parse_json_line(line) or {}
    step, at_ms = row.pop("step", 0), int(1000 * row.pop("time", 0))
    finite = [
        Metric(clean_key(key), value, at_ms, step) for key, value in row.items() if isinstance(value, int | float)
    ]
    others = len(row) - len(finite)
    return [*finite, Metric("train/nonfinite_metrics", float(others), at_ms, step)] if others else finite


@functools.lru_cache(maxsize=4096)
def clean_key(key: str) -> str:
    """The nearest name MLflow accepts for a metric, parameter or tag: `loss@5` becomes `loss_5`."""
    clean = re.sub(r"[^\w\-. :/]", "_", key)[:_KEY_CHARS]
    return posixpath.normpath(clean).lstrip("./") or "_"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
