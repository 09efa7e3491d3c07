"""Jobs on a Ray cluster by its job server: submitted once, followed, stopped. Lists, raw logs and deletion are `ray
job`."""

import asyncio
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE as MOST_BYTES
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from metadist.config import Config, shown
from metadist.core.errors import SUBMITTED_BY, InputError
from metadist.core.files import bare, is_uri, reason
from metadist.core.redaction import redact
from metadist.fleet.ray.reach import no_token, use_token
from metadist.run.package import JOB_FILE, check_job, check_portable, job_files, pack, sizes
from metadist.tracking.provenance import git_tags

ADDRESSES = "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"
GRACE_S = 120
"""How long Ray waits for a job that is stopped to save, before it kills it."""
CONNECT_S, ANSWER_S, UPLOAD_S, READY_S = 4.0, 8.0, 60.0, 60.0
SILENT_S, RETRY_S, GIVE_UP_S = 20.0, 2.0, 600.0
OVER = ("SUCCEEDED", "FAILED", "STOPPED")


class JobServer(JobSubmissionClient):
    """Ray's client of a job server; what does not answer raises InputError in a sentence, within seconds."""

    def __init__(self, url: str):
        use_token()
        for chatty in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk",
                       "ray._private.runtime_env.packaging"):  # fmt: skip
            logging.getLogger(chatty).setLevel(logging.WARNING)
        self.url = url
        with _preferred(url), self._in_words():
            super().__init__(url)

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> Any:
        patience = ANSWER_S if method == "GET" else UPLOAD_S
        with self._in_words():
            return super()._do_request(method, endpoint, timeout=(CONNECT_S, patience), **kwargs)

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except AuthenticationError as error:
            raise InputError(no_token(self.url)) from error
        except (ConnectionError, requests.ConnectionError, requests.Timeout) as error:
            raise Unreachable(
                f"nothing answers at {self.url}: start the cluster, or forward its dashboard "
                "(ssh -L 8265:localhost:8265 HEAD, then --address http://localhost:8265)"
            ) from error
        except (requests.RequestException, KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.url} is no job server of Ray: give the address of the dashboard") from error

    def _raise_error(self, r: requests.Response) -> NoReturn:
        said = (r.text.strip().splitlines() or ["nothing"])[-1]  # of a traceback what counts
        raise Refused(f"{self.url} answers {r.status_code} ({said[:300]}): see dashboard.log on the cluster's head")

    def versions(self) -> dict[str, str]:
        """What the cluster runs: `ray` and `python`."""
        with self._in_words():
            found = self._do_request("GET", "/api/v0/cluster_metadata").json()["data"]
            return {"ray": found["rayVersion"], "python": found["pythonVersion"]}

    def info(self, submission_id: str) -> JobDetails | None:
        """What Ray says of a job; None where it does not know it."""
        answer = self._do_request("GET", f"/api/jobs/{submission_id}")
        if answer.status_code not in (200, 404):
            self._raise_error(answer)
        return JobDetails(**answer.json()) if answer.status_code == 200 else None


@contextmanager
def _preferred(url: str) -> Iterator[None]:
    """Ray's client asks the server that the environment names, whatever it is given: let that be the same."""
    before = os.environ.get(ADDRESSES[0])
    os.environ[ADDRESSES[0]] = url
    try:
        yield
    finally:
        del os.environ[ADDRESSES[0]]
        os.environ |= {} if before is None else {ADDRESSES[0]: before}


class Unreachable(InputError):
    """A job server that does not answer."""


class Refused(InputError):
    """A job server that answers with an error."""


@dataclass(frozen=True)
class Submission:
    """A job as it is sent: its name, its files, what is in its environment and what the dashboard shows of it."""

    name: str
    files: dict[str, Path | str]
    environment: dict[str, str]
    metadata: dict[str, str]

    @property
    def entrypoint(self) -> str:
        return f"python -m metadist train {JOB_FILE} --resume auto"


def job_server(address: str | None) -> JobServer:
    """The job server at an address such as http://HOST:8265, by default that of RAY_API_SERVER_ADDRESS or RAY_ADDRESS.

    Raises InputError where none answers there, or wants another token.
    """
    chosen = address or next((os.environ[name] for name in ADDRESSES if os.environ.get(name)), None)
    if chosen is None:
        raise InputError("name the cluster: --address http://HOST:8265, the address of its dashboard")
    if urlsplit(chosen).scheme not in ("http", "https"):
        host = chosen.partition("://")[2] or chosen
        raise InputError(
            f"{chosen} is no address of a job server, which is that of the cluster's dashboard: "
            f"--address http://{'HOST' if chosen == 'auto' else host.partition(':')[0]}:8265"
        )
    return JobServer(chosen.rstrip("/"))


def prepare_submission(
    config: Config, name: str, address: str | None, include: Sequence[str | Path], command: str,
    say: Callable[[str], None],
) -> Submission:  # fmt: skip
    """Check a job here, as far as that can be done without its data, and collect what is sent.

    Raises InputError.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.\-]*", name):
        raise InputError(f"the name {name!r} of the job must be of letters, digits, and . _ - between them: --name")
    check_portable(config, urlsplit(address or "").hostname in ("localhost", "127.0.0.1", "::1"))
    files, left_out = job_files(config, include)
    if left_out:
        which = ", ".join(left_out[:3]) + ", ..." * (len(left_out) > 3)
        are = "1 file is" if len(left_out) == 1 else f"{len(left_out)} files are"
        say(f"{are} left out ({which}): --include it by its own name to send it all the same")
    found = sizes(files)
    total = sum(found.values())
    if total > MOST_BYTES:
        largest = ", ".join(f"{file} {_mib(size)}" for file, size in list(found.items())[:3])
        raise InputError(
            f"the job would upload {_mib(total)}, and Ray takes {_mib(MOST_BYTES)} ({largest}): leave that out of "
            "--include, and put data on storage that all nodes share"
        )
    checked = check_job(config)
    names = ", ".join([*found][:6]) + ", ..." * (len(found) > 6)
    say(f"{name}: {checked}; {_mib(total)} will be sent ({names})")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri and redact(uri) != uri:
        raise InputError(
            "MLFLOW_TRACKING_URI holds a password, which all who may look at the cluster's jobs would see: set it "
            "without, and MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment of its nodes"
        )
    version = importlib.metadata.version("metadist")
    environment = {SUBMITTED_BY: version, "RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S)}
    environment |= {"MLFLOW_TRACKING_URI": uri} if uri and not config.tracking.uri else {}
    metadata = {
        "job_name": name,  # which Ray's dashboard shows
        "metadist.job": name,
        "metadist.run_dir": str(config.run_dir),
        "metadist.settings": hashlib.sha256(json.dumps(shown(config), sort_keys=True).encode()).hexdigest()[:16],
        "metadist.version": version,
        "metadist.command": command,
        **{key.replace("mlflow.source.git.", "metadist.git_"): value for key, value in git_tags(Path.cwd()).items()},
    }
    return Submission(name, files, environment, metadata)


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def check_versions(server: JobServer) -> None:
    """Raises InputError where the cluster runs another Ray or Python than this machine. metadist's own version is
    compared by the job when it starts (`check_client`)."""
    there = server.versions()
    here = {"ray": ray.__version__, "python": platform.python_version()}
    if there["ray"] != here["ray"] or there["python"].split(".")[:2] != here["python"].split(".")[:2]:
        raise InputError(
            f"{server.url} runs ray {there['ray']} and python {there['python']}, and this machine ray {here['ray']} "
            f"and python {here['python']}: install the cluster's versions here (pip install ray=={there['ray']}), or "
            "give its nodes the same image"
        )


def submit(server: JobServer, submission: Submission, say: Callable[[str], None]) -> str:
    """The submission id of the job's attempt that runs: one that does already, or a new one, which goes on from the
    checkpoints of those before.

    Raises InputError where the one that runs has other settings, or another one has its run_dir.
    """
    name, run_dir = submission.name, submission.metadata["metadist.run_dir"]
    running_jobs = [job for job in attempts(server) if job.status not in OVER]
    for job in running_jobs:
        own = job.metadata or {}
        if own["metadist.job"] != name and _place(own.get("metadist.run_dir", "")) == _place(run_dir):
            raise InputError(
                f"{job.submission_id} runs in run_dir={run_dir} already, where only one job can write: follow it with "
                f"--name {own['metadist.job']}, `metadist stop {own['metadist.job']}` first, or set another run_dir"
            )
    running = next((job for job in running_jobs if (job.metadata or {})["metadist.job"] == name), None)
    if running is not None:
        own = running.metadata or {}
        if _place(own.get("metadist.run_dir", "")) != _place(run_dir):
            raise InputError(
                f"{running.submission_id} runs with another run_dir, {own.get('metadist.run_dir')}, under the name "
                f"{name}: submit this one under another --name, or `metadist stop {name}` first"
            )
        if own.get("metadist.settings") != submission.metadata["metadist.settings"]:
            raise InputError(
                f"{running.submission_id} runs with other settings than these: `metadist stop {name}` "
                "first, then the same command; or submit this one under another --name, with another run_dir"
            )
        say(f"{running.submission_id} is {running.status.lower()} already: nothing is submitted")
        return str(running.submission_id)
    submission_id = f"{submission.name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    with tempfile.TemporaryDirectory() as folder:
        pack(submission.files, Path(folder))
        submit_when_ready(
            server, entrypoint=submission.entrypoint, submission_id=submission_id, metadata=dict(submission.metadata),
            runtime_env={"working_dir": folder, "env_vars": submission.environment},
        )  # fmt: skip
    say(f"{submission_id} is submitted to {server.url}")
    return submission_id


def _place(run_dir: str) -> str:
    """One text for all ways to write a directory, or a URI, whose options say only how it is reached."""
    return bare(run_dir).rstrip("/") if is_uri(run_dir) else os.path.normpath(run_dir)


def submit_when_ready(server: JobServer, **job: Any) -> str:
    """The submission id of a job that the cluster is sent as soon as it takes any, which it does not for some seconds
    after it has begun. Raises InputError."""
    deadline = time.monotonic() + READY_S
    while True:
        try:
            return server.submit_job(**job)
        except Refused as error:
            if "try again later" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise Refused(
                    f"{server.url} has taken no job for {READY_S:.0f} s, as none of its nodes' agents answers: see "
                    "dashboard_agent.log on the head; where another Ray runs on that machine too, give `ray start` "
                    "--dashboard-agent-listen-port=PORT, a free one"
                ) from error
            time.sleep(RETRY_S)


def attempts(server: JobServer, name: str | None = None, run_dir: str | None = None) -> list[JobDetails]:
    """The submitted jobs of metadist, those of one name or run directory if given; the newest first."""
    jobs = [job for job in server.list_jobs() if (job.metadata or {}).get("metadist.job")]
    chosen = [
        job for job in jobs
        if name in (None, (job.metadata or {})["metadist.job"], job.submission_id)
        and run_dir in (None, (job.metadata or {})["metadist.run_dir"])
    ]  # fmt: skip
    return sorted(chosen, key=lambda job: job.start_time or 0, reverse=True)


def follow(server: JobServer, submission_id: str, write: Callable[[str], object], say: Callable[[str], None]) -> int:
    """Hand on the job's log as it grows, over lost connections, until the job has ended; its exit code."""
    printed, silent_since, waiting = 0, None, ""
    while True:
        try:
            printed = asyncio.run(_tail(server, submission_id, printed, write))
            job = server.info(submission_id)
            if silent_since is not None:
                say(f"{server.url} answers again")
            silent_since = None
        except (Unreachable, Refused, RuntimeError, OSError, aiohttp.ClientError) as error:
            now = time.monotonic()
            if silent_since is None:
                silent_since = now
                say(f"the connection to {server.url} is lost ({reason(error)}); {submission_id} goes on, and its log "
                    "here as soon as it answers (Ctrl-C detaches)")  # fmt: skip
            if now - silent_since > GIVE_UP_S:
                raise Unreachable(
                    f"{server.url} has not answered for {GIVE_UP_S / 60:.0f} minutes: the same command follows "
                    f"{submission_id} again, or goes on from its checkpoints if the cluster is gone"
                ) from error
            time.sleep(RETRY_S)
            continue
        if job is None:
            raise InputError(
                f"{server.url} no longer knows {submission_id}, since the cluster began anew: the same command submits "
                "it again, and it goes on from its newest checkpoint"
            )
        if job.status in OVER:
            return _ended(job, say)
        if job.status == "PENDING" and job.message and job.message != waiting:
            waiting = job.message
            say(f"{submission_id} waits: {' '.join(waiting.split())}")
        time.sleep(RETRY_S / 4)


async def _tail(server: JobServer, submission_id: str, printed: int, write: Callable[[str], object]) -> int:
    """Write what the log has beyond `printed` characters until the connection ends, or nothing comes for long; how many
    characters have been written then. Each connection brings the log from its beginning."""
    seen = 0
    lines = aiter(server.tail_job_logs(submission_id))
    try:
        while True:
            text = await asyncio.wait_for(anext(lines), SILENT_S)
            if seen + len(text) > printed:
                write(text[max(0, printed - seen) :])
                printed = seen + len(text)
            seen += len(text)
    except (StopAsyncIteration, TimeoutError):
        return printed


def _ended(job: JobDetails, say: Callable[[str], None]) -> int:
    """Say how a job ended, where its log may not; its exit code."""
    code = 0 if job.status == "SUCCEEDED" else job.driver_exit_code
    if job.status == "FAILED" and code is None:
        say(f"{job.submission_id} was lost ({' '.join((job.message or 'no reason known').split())[:300]}): the same "
            "command goes on from its newest checkpoint")  # fmt: skip
    elif job.status == "STOPPED":
        say(f"{job.submission_id} was stopped: the same command goes on from its newest checkpoint")
    elif job.status == "FAILED" and "No module named metadist" in (job.message or ""):
        say(f"{job.submission_id}: the cluster has no metadist: install "
            f"metadist=={importlib.metadata.version('metadist')} on every node, best in their image")  # fmt: skip
    return (143 if job.status == "STOPPED" else 1) if code is None else code


def stop(server: JobServer, job: JobDetails, say: Callable[[str], None]) -> str:
    """Stop a job and wait until it has saved; what became of it, in a sentence. Raises InputError where it does not end
    in time."""
    submission_id = str(job.submission_id)
    server.stop_job(submission_id)
    say(f"{submission_id} saves after its meta-step, which may take up to {GRACE_S} s")
    deadline = time.monotonic() + GRACE_S + ANSWER_S
    while True:
        found = server.info(submission_id)
        if found is None or found.status in OVER:
            break
        if found.status == "PENDING" and time.monotonic() > deadline - GRACE_S:
            raise InputError(
                f"{submission_id} has not begun, and Ray stops only jobs that have: free what it waits for, or `ray "
                f"job delete --address {server.url} {submission_id}` once it has failed"
            )
        if time.monotonic() > deadline:
            raise InputError(f"{submission_id} has not ended {GRACE_S + ANSWER_S:.0f} s after it was stopped: see "
                             f"`ray job logs --address {server.url} {submission_id}`")  # fmt: skip
        time.sleep(RETRY_S / 4)
    saved = [line for line in server.get_job_logs(submission_id).splitlines() if line.startswith("saved at step ")]
    if found is not None and found.status == "STOPPED":
        return f"{submission_id} is stopped: " + (saved[-1] if saved else "it goes on from its newest checkpoint")
    return f"{submission_id} had ended already: {(found.status if found else 'unknown').lower()}"
