"""The words that errors share."""

import ast
from pathlib import Path

import pytest

import metadist
from metadist.core.errors import SUBMITTED_BY, StorageFailed, doing_it_again
from metadist.core.files import writing


def test_in_a_submitted_job_another_thing_goes_on(tmp_path, monkeypatch):
    monkeypatch.delenv(SUBMITTED_BY, raising=False)
    assert doing_it_again() == "the same command with --resume auto"
    monkeypatch.setenv(SUBMITTED_BY, "1.0")
    with pytest.raises(StorageFailed, match="submitting the job again goes on from") as raised, writing(tmp_path / "f"):
        raise OSError(28, "No space left on device")
    assert "--resume" not in str(raised.value)


def test_no_sentence_of_training_names_the_option_that_a_submitted_job_has_already():
    """But for those on a run that is there though nobody said --resume auto, which a submitted job always does."""
    package = Path(metadist.__file__).parent
    rooms = ("core", "data", "checkpoint", "tracking", "fleet", "run")
    found = {
        (str(path.relative_to(package)), node.value)
        for path in package.rglob("*.py") if path.relative_to(package).parts[0] in rooms
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "--resume auto" in node.value
    }  # fmt: skip
    assert sorted({file for file, _ in found}) == [
        "core/errors.py",  # what is tested above
        "run/identity.py", "run/new_job.py", "run/saved.py", "run/submission.py",  # commands
    ]  # fmt: skip
    assert [text for file, text in found if "same command" in text] == [doing_it_again()]
