"""A learner that is behind, and what its run says to try, typed as it is printed."""

import shlex
from pathlib import Path

import pytest

from metadist.config import load_config
from metadist.run.api import train

JOB = Path(__file__).resolve().parents[2] / "jobs" / "digits.yaml"


@pytest.mark.slow
def test_pictures_of_few_classes_are_told_apart_better_by_the_closed_form_that_is_advised(tmp_path):
    here = ["fleet.backend=local", "meta_steps=20", "tracking.mlflow=false", f"run_dir={tmp_path / 'run'}"]
    behind = train(load_config([JOB], here), quiet=True)
    assert behind["verdict"].startswith("behind its best baseline, logistic regression")
    advised = next(text.split("`")[1] for text in behind["advice"] if "learner.name=" in text)
    program, command, file, *typed = shlex.split(advised)
    assert (program, command) == ("metadist", "train")
    followed = train(load_config([file], typed), quiet=True)
    best = behind["baselines"]["logistic_regression"]["accuracy"]["mean"]
    gaps = [best - each["accuracy"]["after"]["mean"] for each in (behind, followed)]
    assert gaps[1] < 0.5 * gaps[0]
