"""What a submitted job takes along, and what is refused before it is."""

import json
import sys

import pytest

from metadist.config import Config, load_config
from metadist.core.errors import SUBMITTED_BY, InputError
from metadist.run.package import JOB_FILE, check_client, check_job, check_portable, job_files, pack, sizes
from metadist.run.trust import outside_code

GOOD = ["data.family=digits", "run_dir=/shared/runs/x", "tracking.mlflow=false"]


def job(*overrides):
    return load_config([], [*GOOD, *overrides])


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with modules of a user's own, in which the command is typed."""
    files = {
        "nets.py": "import torch\nimport yaml\nfrom parts.blocks import Block\nimport letters_helper\n",
        "parts/__init__.py": "",
        "parts/blocks.py": "from . import sizes\nfrom .deep import inner\n\nclass Block:\n    pass\n",
        "parts/sizes.py": "WIDTH = 4\n",
        "parts/deep/__init__.py": "",
        "parts/deep/inner.py": "def late():\n    import parts.lazy\n",
        "parts/lazy.py": "import metadist\n",
        "parts/unused.py": "",
        "letters_helper.py": "import nets  # a circle\ntry:\n    import absent\nexcept ImportError:\n    pass\n",
        "other.py": "",
        "vocabulary/words.txt": "a b c\n",
        "vocabulary/.env": "PASSWORD=x\n",
        "vocabulary/.git/config": "",
        "vocabulary/.gitignore": "*.txt\n",
        "vocabulary/runs/r/config.yaml": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in ("nets", "parts", "letters_helper", "there")]:
        del sys.modules[name]


def test_a_job_takes_the_modules_it_names_and_what_these_import_along(project):
    files, left_out = job_files(job("model.name=nets:Block"))
    assert sorted(files) == [
        "letters_helper.py", "metadist-job.yaml", "nets.py", "parts/__init__.py", "parts/blocks.py",
        "parts/deep/__init__.py", "parts/deep/inner.py", "parts/lazy.py", "parts/sizes.py",
    ]  # fmt: skip
    assert not left_out


OWN = {
    "model.name": ["model.name=nets_own:Thing"],
    "learner.name": ["learner.name=nets_own:Thing"],
    "learner.inner_optimizer": ["learner.inner_optimizer=nets_own:Thing"],
    "learner.inner_optimizer.name": ["learner.inner_optimizer={name: nets_own:Thing, rate: 1}"],
    "loss": ["loss=nets_own:Thing"],
    "data.source": ["data.family=null", "data.source=nets_own:Thing"],
    "evaluation.metrics.a": ["evaluation.metrics={a: 'nets_own:Thing'}", "evaluation.better=lower"],
    "evaluation.figures.a": ["evaluation.figures={a: 'nets_own:Thing'}"],
    "evaluation.baselines.Thing": ["evaluation.baselines=['nets_own:Thing',ridge]"],
}


@pytest.mark.parametrize("setting", OWN)
def test_every_module_that_a_setting_may_name_is_sent_though_nothing_has_found_it_yet(setting, tmp_path, monkeypatch):
    """An installed command, unlike `python -m`, does not have the current directory where modules are looked for."""
    (tmp_path / "nets_own.py").write_text("import helper_own\nclass Thing: pass\n")
    (tmp_path / "helper_own.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != ""])
    try:
        files, _ = job_files(job(*OWN[setting]))
    finally:
        for name in ("nets_own", "helper_own"):
            sys.modules.pop(name, None)
    assert list(files) == [JOB_FILE, "nets_own.py", "helper_own.py"]


def test_every_setting_that_names_code_of_the_users_own_is_known():
    """The settings above are those that the schema offers, and no other is missing from what is sent."""
    described = json.dumps(Config.model_json_schema())
    named = {
        "model.name",
        "learner.name",
        "loss",
        "data.source",
        *(key for key in OWN if key.startswith("evaluation.")),
    }
    assert described.count("`module:") + described.count("module:callable` of (") == len(named)
    for setting, overrides in OWN.items():
        assert list(outside_code(job(*overrides))) == [setting.removesuffix(".name") if "inner" in setting else setting]


@pytest.mark.parametrize(("text", "said"), [("import x\ndef (\n", "bad_own.py, line 2: "), ("a\0b", "bad_own.py")])
def test_a_module_that_is_no_python_is_named(text, said, project):
    (project / "bad_own.py").write_text(text)
    with pytest.raises(InputError, match=said):
        job_files(job("loss=bad_own:x"))


def test_what_is_left_out_is_counted_once_and_not_where_it_is_sent_all_the_same(project):
    found = job_files(job(), ["vocabulary", ".", "vocabulary/.env"])[1]
    assert sorted(found) == ["vocabulary/.git/config", "vocabulary/.gitignore", "vocabulary/runs/r/config.yaml"]


def test_the_job_file_holds_every_setting_and_loads_as_the_same_configuration(tmp_path):
    config = job("meta_lr=0.25")
    pack(job_files(config)[0], tmp_path)
    assert load_config([tmp_path / "metadist-job.yaml"]) == config


def test_an_included_folder_comes_without_history_keys_and_runs_which_are_counted(project):
    files, left_out = job_files(job(), ["vocabulary"])
    assert sorted(files) == ["metadist-job.yaml", "vocabulary/words.txt"]
    assert sorted(left_out) == [
        "vocabulary/.env", "vocabulary/.git/config", "vocabulary/.gitignore", "vocabulary/runs/r/config.yaml",
    ]  # fmt: skip
    assert "vocabulary/.env" in job_files(job(), ["vocabulary/.env"])[0]  # named by itself it is sent


def test_a_job_file_of_the_users_own_does_not_take_the_place_of_the_resolved_one(project, tmp_path):
    (project / "job.yaml").write_text("meta_lr: 0.5\n")
    pack(job_files(job("meta_lr=0.25"), ["."])[0], tmp_path / "there")
    assert load_config([tmp_path / "there" / JOB_FILE]).meta_lr == 0.25


def test_a_packed_job_is_equal_to_what_was_collected(project, tmp_path):
    files, _ = job_files(job("model.name=nets:Block"), ["vocabulary/words.txt"])
    folder = tmp_path / "there"
    pack(files, folder)
    found = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert found == sizes(files)
    assert list(sizes(files).values()) == sorted(found.values(), reverse=True)


@pytest.mark.parametrize("given", ["/etc/hostname", "absent.txt", "../elsewhere"])
def test_what_is_included_lies_in_the_current_folder(project, given):
    with pytest.raises(InputError, match="--include"):
        job_files(job(), [given])


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        (["run_dir=runs/x"], "run_dir"),
        (["run_dir=null"], "run_dir"),
        (["data.family=null", "data.path=data/omniglot"], "data.path"),
        (["model.weights=w.safetensors"], "model.weights"),
        (["checkpoint.location=checkpoints"], "checkpoint.location"),
        (["tracking.mlflow=true", "tracking.uri=sqlite:///mlflow.db"], "MLflow"),
        (["tracking.mlflow=true", "tracking.uri=./mlruns"], "MLflow"),
        (["tracking.mlflow=true", "tracking.uri=http://localhost:5000"], "MLflow"),
        (["tracking.mlflow=true", "tracking.uri=http://me:pw@server:5000"], "tracking.uri"),
        (["checkpoint.location=s3://key:pw@bucket/x"], "checkpoint.location"),
        (["fleet.address=10.0.0.1:6379"], "fleet.address"),
    ],
)
def test_what_means_something_else_on_other_machines_is_refused(overrides, setting):
    with pytest.raises(InputError, match=setting) as refusal:
        check_portable(job(*overrides), on_this_machine=False)
    assert "pw" not in str(refusal.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["run_dir=s3://bucket/runs/x", "checkpoint.location=gs://bucket/c"],
        ["tracking.mlflow=true", "tracking.uri=http://server:5000"],
        ["tracking.mlflow=true", "tracking.uri=sqlite:////shared/mlflow.db"],
        ["data.family=null", "data.path=/shared/omniglot"],
    ],
)
def test_shared_places_are_taken(overrides):
    check_portable(job(*overrides), on_this_machine=False)


def test_what_starts_an_mlflow_that_a_cluster_can_use_is_said():
    with pytest.raises(InputError, match="--host 0.0.0.0 --port 5043 --allowed-hosts 'NAME:5043,localhost:5043'"):
        check_portable(job("tracking.mlflow=true", "tracking.uri=http://127.0.0.1:5043"), on_this_machine=False)


def test_an_address_of_this_machine_is_fine_for_a_cluster_on_it():
    check_portable(job("tracking.mlflow=true", "tracking.uri=http://localhost:5000"), on_this_machine=True)


def test_code_that_is_not_there_is_refused_here(project):
    with pytest.raises(InputError, match="absent"):
        check_job(job("data.family=null", "data.path=/shared/x", "model.name=absent:Net"))


def test_a_job_without_data_computes_a_task_here():
    check_job(job("task.ways=3", "task.queries=2", "evaluation.queries=2"))
    with pytest.raises(InputError, match="inner_stps"):
        check_job(job("task.ways=3", "task.queries=2", "learner.inner_stps=3"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.weights=/shared/w.safetensors"],
        ["data.family=null", "data.source=there:Tasks", "data.options.root=/shared"],
    ],
)
def test_files_that_only_the_cluster_has_are_not_asked_for_here(project, overrides):
    (project / "there.py").write_text("class Tasks:\n    def __init__(self, seed, root):\n        open(root)\n")
    assert "when the job starts" in check_job(job(*overrides))


def test_a_job_submitted_by_another_version_ends_with_both_versions(monkeypatch):
    check_client()
    monkeypatch.setenv(SUBMITTED_BY, "0.0.7")
    with pytest.raises(InputError, match=r"0\.0\.7"):
        check_client()
