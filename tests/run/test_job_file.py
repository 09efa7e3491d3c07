"""What is typed behind a job file, where it is another learner, model or data than the file's."""

from pathlib import Path

import pytest

from metadist.core.errors import InputError
from metadist.run.job_file import load_config
from metadist.run.replay import load_config as load_saved

JOB = """
data: {family: digits, options: {turned: false}}
model: {name: conv4, channels: 8}
learner: {name: maml, inner_lr: 0.3, inner_steps: 2, adapted: "head.*", inner_optimizer: {name: momentum, beta: 0.5}}
evaluation: {inner_steps: 7, inner_lr: 0.2}
"""


@pytest.fixture
def job(tmp_path) -> Path:
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path / "job.yaml"


def read(job: Path, *typed: str):
    said: list[str] = []
    return load_config([job], typed, said.append), said


def test_one_file_needs_no_list(job):
    assert load_config(job) == load_config(str(job)) == load_config([job])


def test_nothing_is_said_where_nothing_is_replaced(job):
    config, said = read(job, "learner.inner_lr=0.5", "task.ways=3", "data.options.seed=2", "model.name=conv4")
    assert said == [] and config.learner.options["inner_lr"] == 0.5 and config.model.options == {"channels": 8}


def test_another_learner_keeps_what_it_takes_and_loses_the_rest(job):
    config, said = read(job, "learner.name=meta_sgd")
    assert config.learner.options == {
        "inner_steps": 2, "adapted": "head.*", "inner_optimizer": {"name": "momentum", "beta": 0.5},
    }  # fmt: skip
    assert (config.evaluation.inner_steps, config.evaluation.inner_lr) == (7, None)
    (line,) = said
    assert line == (
        f"left out for learner.name=meta_sgd (the command line): learner.inner_lr=0.3, evaluation.inner_lr=0.2 ({job})"
    )
    config, (line,) = read(job, "learner.name=protonet")
    assert config.learner.options == {} and config.evaluation.inner_steps is None
    assert "learner.inner_optimizer={'name': 'momentum', 'beta': 0.5}" in line


def test_what_is_typed_itself_is_never_left_out(job):
    config, (line,) = read(job, "learner.name=protonet", "learner.inner_lr=0.7", "evaluation.inner_steps=9")
    assert config.learner.options == {"inner_lr": 0.7} and config.evaluation.inner_steps == 9
    assert "0.7" not in line and "evaluation.inner_steps" not in line


def test_a_preset_of_a_learner_wins_over_the_file(job):
    job.write_text("data: {family: digits}\nlearner: {name: maml, first_order: false, inner_lr: 0.1}\n")
    config, (line,) = read(job, "learner.name=fomaml")
    assert config.learner.options == {"inner_lr": 0.1} and "learner.first_order=False" in line


def test_another_model_and_other_data_likewise(job):
    config, (line,) = read(job, "model.name=mlp", "model.hidden=[3]")
    assert config.model.options == {"hidden": [3]} and "model.channels=8" in line
    config, said = read(job, "data.path=data/mine")
    assert (config.data.path, config.data.family, config.data.options) == ("data/mine", None, {})
    assert said == [
        f"data.path=data/mine (the command line) takes the place of data.family=digits ({job})",
        f"left out for data.path=data/mine (the command line): data.options.turned=False ({job})",
    ]
    config, said = read(job, "data.family=sinusoid", "data.options.points=4")
    assert (config.data.family, config.data.options) == ("sinusoid", {"points": 4}) and "turned=False" in said[0]


def test_a_family_takes_the_place_of_a_path_and_null_says_nothing(job):
    job.write_text("data: {path: data/omniglot}\n")
    config, (line,) = read(job, "data.family=digits")
    assert config.data.family == "digits" and "takes the place of data.path=data/omniglot" in line
    config, said = read(job, "data.path=null", "data.family=digits")
    assert config.data.path is None and said == []


def test_two_kinds_of_data_typed_at_once_are_refused(job):
    with pytest.raises(InputError, match="exactly one of data.path, data.family and data.source"):
        read(job, "data.path=x", "data.family=digits")


def test_a_later_file_counts_as_typed_behind_an_earlier_one(job, tmp_path):
    (tmp_path / "more.yaml").write_text("learner: {name: protonet}\ndata: {path: x}\n")
    said: list[str] = []
    config = load_config([job, tmp_path / "more.yaml"], [], said.append)
    assert config.learner.options == {} and config.data.path == "x" and len(said) == 3
    assert f"learner.name=protonet ({tmp_path / 'more.yaml'})" in said[-1] or "protonet" in said[1]


def test_a_learner_of_ones_own_is_asked_too(job, tmp_path, monkeypatch):
    (tmp_path / "own_for_leftovers.py").write_text(
        "from dataclasses import dataclass\nfrom metadist import MAML\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Own(MAML):\n    factor: float = 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    job.write_text("data: {family: digits}\nlearner: {name: reptile, inner_batch: 3, inner_lr: 0.1}\n")
    config, (line,) = read(job, "learner.name=own_for_leftovers:Own", "learner.factor=2")
    assert config.learner.options == {"inner_lr": 0.1, "factor": 2} and "learner.inner_batch=3" in line
    assert read(job, "learner.name=nowhere:Own")[1] == []  # refused where it is made


def test_without_the_knowledge_of_learners_options_stay(job):
    assert load_saved([job], ["learner.name=protonet"]).learner.options["inner_lr"] == 0.3
