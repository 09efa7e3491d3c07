"""A job file for a dataset runs as it is, whatever the data and the learner."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metadist.config import load_config
from metadist.core.errors import InputError
from metadist.core.task import TaskId
from metadist.data import importers
from metadist.learners import LEARNERS
from metadist.run.build import Job
from metadist.run.learner_settings import CLASSES_ONLY, WITHOUT_TEXT
from metadist.run.new_job import suited_job
from tests.cli.command import run

KINDS = ("pictures", "classes", "labelled", "values", "texts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset of each kind, small."""
    root, rng = tmp_path_factory.mktemp("kinds"), np.random.default_rng(0)
    for place, classes, size in (("pictures", 12, 16), ("few", 3, 8)):
        for number in range(classes):
            (root / "raw" / place / f"c{number}").mkdir(parents=True)
            for shot in range(6):
                Image.fromarray(rng.integers(0, 255, (size, size), dtype=np.uint8)).save(
                    root / "raw" / place / f"c{number}" / f"{shot}.png"
                )
        importers.images(root / "raw" / place, root / place, size=(size, size), mode="gray")
    rows = [(u, r, rng.normal(), 5000 * rng.random()) for u in range(15) for r in range(10 + u)]
    lines = [f"u{u},{a},{b},{int(a > 0)},{2 * a}" for u, _, a, b in rows]
    (root / "table.csv").write_text("\n".join(["user,a,b,sign,twice", *lines]) + "\n")
    table = {"group": "user", "inputs": ("x=a,b",)}
    importers.table(root / "table.csv", root / "classes", **table, standardize=True)
    importers.table(root / "table.csv", root / "labelled", **table, standardize=True, targets=("sign",))
    importers.table(root / "table.csv", root / "values", **table, standardize=True, targets=("twice",))
    importers.table(root / "table.csv", root / "raw_values", **table, targets=("twice",))
    texts = [{"text": f"word{c} and {n}", "label": f"l{c}"} for c in range(15) for n in range(8)]
    (root / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    importers.text(root / "texts.jsonl", root / "texts")
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_the_job_validates_and_passes_a_dry_run_with_no_further_argument(folder, tmp_path, kind):
    made = run("config", "new", str(tmp_path / "job"), "--data", str(folder / kind), cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert made.stdout == f"wrote {tmp_path / 'job.yaml'}: metadist train {tmp_path / 'job.yaml'}\n"
    assert run("config", "validate", "job.yaml", cwd=tmp_path).stdout == "valid\n"
    done = run("train", "job.yaml", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    config = load_config([tmp_path / "job.yaml"])
    assert plan["resolved"]["model.name"] == config.model.name == {"pictures": "conv4", "texts": "bag"}.get(kind, "mlp")
    assert plan["resolved"]["task.scheme"] == config.task.scheme
    assert (config.fleet.backend == "local") or kind == "pictures"


@pytest.mark.parametrize("kind", KINDS)
def test_every_learner_that_suits_the_data_builds_and_the_others_say_why(folder, tmp_path, kind):
    for learner in LEARNERS:
        unsuited = (kind == "values" and learner in CLASSES_ONLY) or (kind == "texts" and learner in WITHOUT_TEXT)
        if unsuited or LEARNERS[learner][0].measures:
            with pytest.raises(InputError, match=f"{learner} .*: take "):
                suited_job(str(folder / kind), learner)
            continue
        text, _ = suited_job(str(folder / kind), learner)
        (tmp_path / "job.yaml").write_text(text)
        job = Job(load_config([tmp_path / "job.yaml"]))
        assert job.config.learner.name == learner
        for split in ("train", "validation", "test"):
            job.evaluation_source(TaskId(split, 0, 0))
        engine = job.engine("cpu")
        losses, rows = engine.meta_gradients(engine.initial_theta(), [job.source(TaskId("train", 0, 0))])
        assert losses.isfinite().all() and rows.isfinite().all(), (kind, learner)


def test_every_choice_has_its_reason(folder):
    text, notes = suited_job(str(folder / "pictures"))
    for line in text.splitlines():
        if not re.match(r"#|\w+:$|  path: ", line):
            assert re.search(r"  # \S.{6,}", line), line
    assert "ways: 2  # N: the smallest split, validation, has 2 classes" in text and notes == []
    assert "shots: 2  # K examples of each class to adapt on: K + Q is 6" in text
    assert "queries: 4  # " in text and "backend: " in text
    assert "patience: 4  # stop after so many validations" in text and "order:" not in text


def test_rows_in_the_order_of_time_are_drawn_so(folder, tmp_path):
    table = {"group": "user", "inputs": ("x=a",), "targets": ("twice",)}
    importers.table(folder / "table.csv", tmp_path / "timed", **table, time="b", standardize=True)
    text, _ = suited_job(str(tmp_path / "timed"))
    assert "  order: time  # adapt on earlier rows, judge on later ones: the import ordered them by b" in text


def test_numbers_far_from_zero_are_told_and_standardized_ones_not(folder):
    text, (note,) = suited_job(str(folder / "raw_values"))
    assert note.startswith("input 'x' goes from ") and note.endswith("import with --standardize")
    assert f"# Mind: {note}" in text
    assert suited_job(str(folder / "values"))[1] == []


def test_labels_that_all_groups_share_keep_their_meaning(folder):
    text, _ = suited_job(str(folder / "labelled"))
    assert "permute_labels: false  # all groups share 2 labels" in text and "ways: 2" in text


def test_too_little_data_and_unknown_learners_are_one_sentence(folder, tmp_path):
    done = run("config", "new", "few", "--data", str(folder / "few"), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "import more classes" in done.stderr
    done = run("config", "new", "job", "--data", str(folder / "texts"), "--learner", "mamll", cwd=tmp_path)
    assert done.returncode == 2 and "did you mean maml?" in done.stderr
    done = run("config", "new", "job", "--data", "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and "there is no data in nowhere" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_split_to_validate_on_or_to_test_on(folder, tmp_path):
    table = {"group": "user", "inputs": ("x=a,b",)}
    importers.table(folder / "table.csv", tmp_path / "tested", **table, fractions=(0.6, 0.0, 0.4))
    text, _ = suited_job(str(tmp_path / "tested"))
    assert "every: 0  # no usable split validation" in text and "split:" not in text and "patience" not in text
    importers.table(folder / "table.csv", tmp_path / "validated", **table, fractions=(0.6, 0.4, 0.0))
    text, _ = suited_job(str(tmp_path / "validated"))
    assert "every: 0  # validation serves as the test" in text and "split: validation" in text


def test_a_learner_alone_is_for_the_digits(tmp_path):
    done = run("config", "new", "job", "--learner", "r2d2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = load_config([tmp_path / "job.yaml"])
    assert (config.data.family, config.task.ways, config.learner.name) == ("digits", 3, "r2d2")
    assert "--overwrite" in run("config", "new", "job", cwd=tmp_path).stderr
    assert run("config", "new", "job", "--overwrite", cwd=tmp_path).returncode == 0
    assert load_config([tmp_path / "job.yaml"]).learner.name != "r2d2"
