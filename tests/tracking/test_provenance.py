import platform
import subprocess

from metadist.tracking.provenance import git_tags, version_tags


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
