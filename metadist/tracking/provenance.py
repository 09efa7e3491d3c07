"""What a run was made from, as tags: the git commit, and the versions of what computes."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from metadist.core.redaction import command_line

RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # in which Ray gives a submitted job its metadata


def submitted_job() -> dict[str, str] | None:
    """The metadata of the Ray job that this process is the driver of; None where it was not submitted."""
    try:
        metadata = json.loads(os.environ[RAY_JOB])["metadata"]
    except (KeyError, TypeError, ValueError):
        return {} if RAY_JOB in os.environ else None
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}


def source_tags(argv: Sequence[str], job: Mapping[str, str] | None) -> dict[str, str]:
    """What was run, from the command line or a submitted job's metadata: the job file is the name (MLflow shows what
    follows its last slash)."""
    file = next((word for word in argv[1:] if word.endswith((".yaml", ".yml"))), argv[0])
    command = command_line(argv)
    if job is None:
        return {"mlflow.source.name": file, "mlflow.source.type": "LOCAL", "metadist.command": command}
    tags = {
        "mlflow.source.name": job.get("metadist.job", file),
        "mlflow.source.type": "JOB",
        "metadist.command": job.get("metadist.command", command),
    }
    known = {"job_submission_id": "ray.submission_id", "metadist.dashboard": "ray.dashboard"}
    return tags | {tag: job[key] for key, tag in known.items() if key in job}


def job_git_tags(job: Mapping[str, str] | None) -> dict[str, str]:
    """What `git_tags` said where the job was submitted from: Ray sends no repository along."""
    names = {
        "metadist.git_commit": "mlflow.source.git.commit",
        "metadist.git_branch": "mlflow.source.git.branch",
        "metadist.git_dirty": "metadist.git_dirty",
    }
    return {tag: job[key] for key, tag in names.items() if job and key in job}


def git_tags(cwd: Path) -> dict[str, str]:
    """Commit, branch and whether tracked files differ from the commit; {} outside a repository or without git."""
    commit = _git(cwd, "rev-parse", "HEAD")
    if commit is None:
        return {}
    branch = _git(cwd, "rev-parse", "--abbrev-ref", "HEAD") or ""
    changes = _git(cwd, "status", "--porcelain", "--untracked-files=no")
    return {
        "mlflow.source.git.commit": commit,
        "mlflow.source.git.branch": branch,
        "metadist.git_dirty": str(bool(changes)).lower(),
    }


def version_tags() -> dict[str, str]:
    """`<package>.version` of metadist, torch and ray (those installed) and of Python."""
    tags = {"python.version": platform.python_version()}
    for package in ("metadist", "torch", "ray"):
        try:
            tags[f"{package}.version"] = version(package)
        except PackageNotFoundError:
            continue
    return tags


def _git(cwd: Path, *arguments: str) -> str | None:
    """What git prints; None where there is no git, no repository or no commit."""
    try:
        done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
