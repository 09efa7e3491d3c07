"""`metadist submit`, `status`, `stop` and `doctor`: a job on a cluster from its command to its end, and the cluster's
health."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from metadist.cli.config import ANY_ARGUMENTS
from metadist.core.errors import InputError, Interrupted
from metadist.core.files import bare, finite
from metadist.core.redaction import command_line, to_stderr

if TYPE_CHECKING:
    from metadist.run.submission import JobDetails, JobServer

ADDRESS = click.option("--address", help="The cluster's dashboard, http://HOST:8265; default RAY_API_SERVER_ADDRESS.")


@click.command(context_settings=ANY_ARGUMENTS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@ADDRESS
@click.option("--name", help="Of the job; default: that of its run directory.")
@click.option("--include", multiple=True, help="A file or folder that the job needs beside its modules.")
@click.option("--resume", type=click.Choice(["auto"]), help="As with train; submit always does it.")
@click.option("--no-wait", is_flag=True, help="Do not follow the job.")
@click.option("--dry-run", is_flag=True, help="Check the job, print what would be sent, submit nothing.")
@click.pass_context
def submit(
    context: click.Context, arguments: tuple[str, ...], address: str | None, name: str | None,
    include: tuple[str, ...], resume: str | None, no_wait: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Train JOB.yaml [key=value ...] as a job on a cluster, and follow it until its end.

    \b
    metadist submit jobs/digits.yaml run_dir=/shared/runs/digits --address http://localhost:8265

    The same line typed again follows the job that runs, or goes on with one that was stopped, failed or was lost, from
    its newest checkpoint. Ctrl-C leaves it running.
    """
    from metadist.run.job_file import load_config, split_arguments

    files, overrides = split_arguments(arguments)
    if not files and not overrides:
        raise click.UsageError("name a job file, such as jobs/digits.yaml (`metadist config new` writes one)")
    if resume:
        to_stderr("--resume auto may be left out: a submitted job always goes on from its newest checkpoint")
    config = load_config(files, overrides)
    from metadist.run import submission as jobs

    name = name or Path(bare(config.run_dir or "run")).name
    command = command_line(["metadist", *sys.argv[1:]])
    server = None if dry_run else jobs.job_server(address)
    if server:
        jobs.check_versions(server)
    planned = jobs.prepare_submission(config, name, address, include, command, to_stderr)
    if server is None:
        plan = {"entrypoint": planned.entrypoint, "files": jobs.sizes(planned.files),
                "environment": planned.environment, "metadata": planned.metadata}  # fmt: skip
        click.echo(json.dumps(plan, indent=2))
        return
    submission_id = jobs.submit(server, planned, to_stderr)
    where = f" --address {server.url}" if address else ""
    if no_wait:
        to_stderr(f"follow it with the same command; `metadist status {name}{where}`, `metadist stop {name}{where}`")
        click.echo(submission_id)
        return
    try:
        code = jobs.follow(server, submission_id, _write, to_stderr)
    except (KeyboardInterrupt, Interrupted):
        to_stderr(
            f"detached, {submission_id} goes on; follow it again with the same command, see it with `metadist status "
            f"{name}{where}`, end it with `metadist stop {name}{where}`"
        )
        raise
    context.exit(code)


def _write(text: str) -> None:
    click.echo(text, nl=False)


@click.command()
@click.argument("run_or_name", metavar="[RUN|NAME]", required=False)
@ADDRESS
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def status(run_or_name: str | None, address: str | None, as_json: bool) -> None:
    """How a run stands, by its directory or the name of its job; without either, all jobs of metadist on a cluster.

    \b
    metadist status runs/digits
    metadist status digits --address http://localhost:8265
    """
    if run_or_name is None:
        from metadist.run import submission as jobs

        _list(jobs.attempts(jobs.job_server(address)), as_json)
        return
    server, job = _find(run_or_name, address)
    run = _run_directory(run_or_name, job)
    from metadist.run.status import close_in_mlflow, described, unseen
    from metadist.run.status import status as status_of

    known = {"job": f"{job.submission_id} {job.status.lower()}"} if job else {}
    if job and server and (why := unseen(run)):
        lines = [line for line in server.get_job_logs(str(job.submission_id)).splitlines() if line.strip()]
        found = {"run_dir": run, **known, "log": lines[-1] if lines else "nothing yet"}
        click.echo(json.dumps(found, indent=2) if as_json else "\n".join(f"{k:10} {v}" for k, v in found.items()))
        to_stderr(f"this is the last line of the job's log, since the run is not to be seen from here ({why})")
        return
    found = status_of(run) | known
    if "driver" not in found and (said := close_in_mlflow(run)):
        found["mlflow"] = said
    click.echo(json.dumps(finite(found), indent=2) if as_json else described(found))


def _list(jobs: "list[JobDetails]", as_json: bool) -> None:
    rows = [
        {"name": (job.metadata or {})["metadist.job"], "job": job.submission_id, "status": job.status.lower(),
         "run_dir": (job.metadata or {})["metadist.run_dir"]} for job in jobs
    ]  # fmt: skip
    newest = list({row["name"]: row for row in reversed(rows)}.values())
    if as_json:
        click.echo(json.dumps(newest, indent=2))
        return
    for row in newest:
        click.echo(f"{row['name']:20} {row['status']:10} {row['job']:40} {row['run_dir']}")
    to_stderr(f"jobs of metadist: {len(newest)}; attempts: {len(rows)} (`ray job list` has all)")


@click.command()
@click.argument("run_or_name", metavar="RUN|NAME")
@ADDRESS
def stop(run_or_name: str, address: str | None) -> None:
    """Have a run save and end, by its directory or the name of its job, and wait until it has.

    \b
    metadist stop digits --address http://localhost:8265
    """
    server, job = _find(run_or_name, address)
    if server and job:
        from metadist.run import submission as jobs

        click.echo(jobs.stop(server, job, to_stderr))
        return
    from metadist.run.status import described, stop_here

    click.echo(described(stop_here(run_or_name)))


def _find(run_or_name: str, address: str | None) -> "tuple[JobServer | None, JobDetails | None]":
    """The cluster that is asked, if any, and the newest attempt there of a name or run directory."""
    is_run = _is_run(run_or_name)
    if address is None and is_run and "RAY_API_SERVER_ADDRESS" not in os.environ:
        return None, None
    from metadist.run import submission as jobs

    try:
        server = jobs.job_server(address)
    except jobs.Unreachable as error:
        if address or not is_run:
            raise
        to_stderr(f"only this machine is looked at: {error}")
        return None, None
    run_dir = run_or_name if "://" in run_or_name else str(Path(run_or_name).absolute())
    found = jobs.attempts(server, run_dir=run_dir) if is_run else jobs.attempts(server, run_or_name)
    if not found and not is_run:
        known = sorted({(job.metadata or {})["metadist.job"] for job in jobs.attempts(server)})
        raise InputError(f"{server.url} has no job {run_or_name!r}; it has {', '.join(known) or 'none of metadist'}")
    return server, found[0] if found else None


def _is_run(text: str) -> bool:
    """Whether it is a run directory rather than the name of a job."""
    return "/" in text or (Path(text) / "config.yaml").exists()


def _run_directory(run_or_name: str, job: Any) -> str:
    return run_or_name if job is None or _is_run(run_or_name) else job.metadata["metadist.run_dir"]


@click.command()
@click.option("--address", help="A cluster: host:port or auto, or its job server's http://... Default: this machine.")
@click.option("--mlflow", metavar="URI", help="MLflow's tracking URI to try; default MLFLOW_TRACKING_URI.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(address: str | None, mlflow: str | None, as_json: bool) -> int:
    """Check what runs need: versions, token, ports, GPUs, disk, memory, clocks, MLflow; exit code 1 where one fails.

    \b
    metadist doctor
    metadist doctor --address ray-head:6379
    metadist doctor --address http://localhost:8265 --mlflow http://localhost:5000
    """
    from metadist.run.doctor import examine

    found = examine(address, mlflow)
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in found], indent=2))
    else:
        for finding in found:
            where, remedy = f"{finding.node}: " * bool(finding.node), f"; {finding.remedy}" * bool(finding.remedy)
            click.echo(f"{finding.status:4}  {where}{finding.what}{remedy}")
    return int(any(finding.status == "fail" for finding in found))
