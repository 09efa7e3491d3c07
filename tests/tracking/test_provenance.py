import json
import platform
import subprocess

import pytest

from metadist.tracking.provenance import RAY_JOB, git_tags, job_git_tags, source_tags, submitted_job, version_tags


def git(folder, *arguments):
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_commit_and_whether_files_differ_from_it(tmp_path):
    git(tmp_path, "init", "-b", "work")
    assert git_tags(tmp_path) == {}
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "first")
    (tmp_path / "untracked").write_text("1")
    tags = git_tags(tmp_path)
    assert len(tags["mlflow.source.git.commit"]) == 40
    assert tags["mlflow.source.git.branch"] == "work" and tags["metadist.git_dirty"] == "false"
    (tmp_path / "a").write_text("2")
    assert git_tags(tmp_path)["metadist.git_dirty"] == "true"


def test_no_repository_or_no_git_is_no_tag(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_tags(tmp_path) == {}
    monkeypatch.setenv("PATH", "")
    assert git_tags(tmp_path) == {}


def test_versions():
    tags = version_tags()
    assert tags["python.version"] == platform.python_version()
    assert "torch.version" in tags


@pytest.mark.parametrize("argv", [["metadist", "train", "jobs/digits.yaml", "a=b.yaml"], ["/x/m", "jobs/digits.yaml"]])
def test_the_source_is_the_job_file(argv, monkeypatch):
    monkeypatch.delenv(RAY_JOB, raising=False)
    assert submitted_job() is None
    tags = source_tags(argv, None)
    assert (tags["mlflow.source.name"], tags["mlflow.source.type"]) == ("jobs/digits.yaml", "LOCAL")
    assert job_git_tags(None) == {}


def test_a_submitted_job_says_what_it_was_submitted_from(monkeypatch):
    metadata = {
        "job_submission_id": "digits-1", "metadist.job": "digits.yaml", "metadist.git_commit": "c" * 40,
        "metadist.git_branch": "work", "metadist.git_dirty": "true", "metadist.command": "metadist submit digits.yaml",
    }  # fmt: skip
    monkeypatch.setenv(RAY_JOB, json.dumps({"runtime_env": {}, "metadata": metadata}))
    tags = source_tags(["m", "train", "/tmp/ray/x.yaml"], submitted_job()) | job_git_tags(submitted_job())
    assert tags == {
        "mlflow.source.name": "digits.yaml", "mlflow.source.type": "JOB", "ray.submission_id": "digits-1",
        "metadist.command": "metadist submit digits.yaml", "mlflow.source.git.commit": "c" * 40,
        "mlflow.source.git.branch": "work", "metadist.git_dirty": "true",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"metadata": null}'])
def test_a_job_without_metadata_is_a_job(text, monkeypatch):
    monkeypatch.setenv(RAY_JOB, text)
    assert submitted_job() == {}
    assert source_tags(["m", "x.yaml"], {})["mlflow.source.type"] == "JOB"
