"""What a run was made from, as tags: the git commit, and the versions of what computes."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


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
