from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from metadist.config import Config, dump_config, load_config
from metadist.config.schema import BUILT_IN_MODELS, LEARNER_OPTIONS
from metadist.core.errors import InputError
from metadist.learners import Learner
from metadist.models import MODELS

DATA = "data.family=digits"
JOBS = sorted((Path(__file__).resolve().parents[2] / "jobs").glob("*.yaml"))


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def refusal(*overrides: str, files=()) -> str:
    with pytest.raises(InputError) as raised:
        load_config(files, overrides)
    return str(raised.value)


@pytest.mark.parametrize("overrides", [
    [],
    ["meta_lr=1e-5", "max_time_s=1e20", "meta_batch_size=7", "evaluation.baselines=[ridge]"],
    ["model.name=mlp", "model.hidden=[3, 4]", "learner.inner_lr=1e-7", "learner.adapted=head.*"],
    ["fleet.resources={special: 0.5}", "data.options={seed: 3}"],
    ["tracking.run_name='1e3'", "tracking.experiment='12e4567'", "run_dir='null'", "data.options={text: '5e1'}"],
    ["tracking.run_name='yes'", "run_dir='a: b # c'", "tracking.experiment='über'"],
], ids=str)  # fmt: skip
def test_what_is_dumped_loads_to_the_same(tmp_path, overrides):
    config = load_config([], [DATA, *overrides])
    text = dump_config(config)
    assert load_config([written(tmp_path, "job.yaml", text)]) == config
    assert Config.model_validate(yaml.safe_load(text)) == config


def test_files_merge_from_left_to_right_and_lists_replace(tmp_path):
    first = written(tmp_path, "a.yaml", "seed: 1\ndata: {family: digits}\nmodel: {name: mlp, hidden: [1, 2, 3]}\n"
                                        "task: {ways: 3, shots: 4}\n")  # fmt: skip
    second = written(tmp_path, "b.yaml", "meta_lr: 0.5\nmodel: {hidden: [9]}\ntask: {shots: 7}\n")
    config = load_config([first, second], ["seed=2", "task.queries=1"])
    assert (config.seed, config.meta_lr, config.model.name, config.model.options) == (2, 0.5, "mlp", {"hidden": [9]})
    assert (config.task.ways, config.task.shots, config.task.queries) == (3, 7, 1)
    assert load_config([second, first]).task.shots == 4


@pytest.mark.parametrize(("override", "value"), [
    ("meta_lr=1e-3", 1e-3), ("meta_lr=1E-3", 1e-3), ("meta_lr=2.5e-4", 2.5e-4), ("meta_lr=1.e-2", 1e-2),
    ("meta_lr=.5", 0.5), ("meta_lr=5", 5), ("--meta_lr=0.1", 0.1), ("--meta-lr=0.1", 0.1),
])  # fmt: skip
def test_an_override_takes_every_way_to_write_a_number(override, value):
    assert load_config([], [DATA, override]).meta_lr == value


def test_an_exponent_is_a_number_in_files_and_in_options(tmp_path):
    job = written(tmp_path, "job.yaml", "meta_lr: 1e-3\ndata: {family: digits}\nlearner: {inner_lr: 4e-1}\n")
    config = load_config([job], ["model.weird=1e2", "fleet.resources.big=2e1", "data.options={x: -1e-2}"])
    assert config.meta_lr == 1e-3 and config.learner.options == {"inner_lr": 0.4}
    assert config.model.options == {"weird": 100.0} and config.data.options == {"x": -0.01}
    assert config.fleet.resources == {"big": 20.0}


def test_overrides_take_lists_mappings_null_and_values_with_equals_signs():
    config = load_config(
        [], ["data.source=my.module:Tasks", "data.options={a: [1, 2], b: {c: x}}", "tracking.uri=http://host?a=b",
             "meta_batch_size=8", "meta_batch_size=null", "tasks_per_worker=4"],
    )  # fmt: skip
    assert config.data.options == {"a": [1, 2], "b": {"c": "x"}}
    assert config.tracking.uri == "http://host?a=b"
    assert config.meta_batch_size is None and config.batch_size(3) == 12


def test_the_later_override_wins():
    assert load_config([], [DATA, "seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("text", ["seed", "=1", "seed:1", ""])
def test_an_override_without_key_and_equals_sign_is_refused(text):
    assert "key=value" in refusal(DATA, text)


@pytest.mark.parametrize(("override", "hint"), [
    ("num_worker=2", "did you mean num_workers?"),
    ("task.shot=2", "did you mean task.shots?"),
    ("evaluation.evry=2", "did you mean evaluation.every?"),
    ("shots=5", "did you mean task.shots?"),
    ("inner_lr=5", "did you mean learner.inner_lr?"),
    ("inner_steps=5", "did you mean learner.inner_steps?"),
    ("batch_size=5", "did you mean meta_batch_size?"),
    ("checkpoint.keep=2", "did you mean checkpoint.keep_last?"),
    ("task.inner_lr=2", "did you mean learner.inner_lr?"),
    ("engine.shots=2", "did you mean task.shots?"),
    ("fleet.xyzzy=2", "known: fleet.backend, fleet.address"),
])  # fmt: skip
def test_an_unknown_key_suggests_the_nearest(override, hint):
    assert hint in refusal(DATA, override)


def test_every_mistake_is_reported_with_its_source(tmp_path):
    first = written(tmp_path, "a.yaml", "seed: -1\ndata: {family: digits}\ntask: {ways: 1}\n")
    second = written(tmp_path, "b.yaml", "meta_steps: many\nevaluation: {baselines: [ridge, rigde]}\n")
    lines = refusal("fleet.backend=slurm", "metasteps=3", files=[first, second]).splitlines()
    assert len(lines) == 6
    for start, source in [
        ("seed=-1", "a.yaml"), ("task.ways=1", "a.yaml"), ("meta_steps='many'", "b.yaml"),
        ("evaluation.baselines.1='rigde'", "b.yaml"), ("fleet.backend='slurm'", "the command line"),
        ("metasteps is not a setting", "the command line"),
    ]:  # fmt: skip
        (line,) = [line for line in lines if line.startswith(start)]
        assert f"(in {source}" in line or f"{source})" in line


@pytest.mark.parametrize(("overrides", "sentence"), [
    ([DATA, "task.ways=1"], "task.ways=1 (in the command line)"),
    ([DATA, "meta_lr=0"], "meta_lr=0"),
    ([DATA, "meta_lr=true"], "meta_lr=True"),
    ([DATA, "task.shots=true"], "task.shots=True"),
    ([DATA, "engine.keep=sqrt", "engine.differentiation=unroll"], "engine.keep=sqrt"),
    ([DATA, "optimizer.momentum=1"], "optimizer.momentum=1"),
    ([DATA, "task.scheme=class"], "'auto', 'classes', 'labelled' or 'values'"),
    ([DATA, "meta_steps=2.5"], "meta_steps=2.5"),
    ([DATA, "meta_batch_size=8", "tasks_per_worker=4"], "tasks_per_worker"),
    ([DATA, "fleet.min_workers=3"], "fleet.min_workers=3"),
    ([DATA, "engine.device=cuda"], "fleet.gpus_per_worker"),
    ([DATA, "data.path=x"], "data.path, data.family and data.source"),
    (["data.options={}"], "data.path, data.family and data.source"),
    ([], "data"),
])  # fmt: skip
def test_values_out_of_range_and_against_each_other_are_refused(overrides, sentence):
    assert sentence in refusal(*overrides)


def test_a_job_file_that_is_not_there_suggests_its_neighbour(tmp_path):
    written(tmp_path, "digits.yaml", "seed: 1\n")
    assert "did you mean digits.yaml?" in refusal(files=[tmp_path / "digit.yaml"])
    assert "`metadist config new` writes one" in refusal(files=[tmp_path / "zzz.yaml"])


@pytest.mark.parametrize(("text", "sentence"), [
    ("seed: [1\n", "YAML"),
    ("- seed\n", "list"),
    ("", "NoneType"),
    ("seed: 1\n\tways: 2\n", "YAML"),
])  # fmt: skip
def test_a_file_that_is_no_job_is_refused_by_name(tmp_path, text, sentence):
    told = refusal(files=[written(tmp_path, "job.yaml", text)])
    assert "job.yaml" in told and sentence in told and "\n" not in told


def test_a_configuration_does_not_change():
    config = load_config([], [DATA])
    with pytest.raises(ValueError):
        config.seed = 3
    with pytest.raises(ValueError):
        config.task.ways = 3


def test_the_batch_follows_its_mode():
    assert load_config([], [DATA]).batch_size(7) == 32
    assert load_config([], [DATA, "meta_batch_size=10"]).batch_size(7) == 10
    assert load_config([], [DATA, "tasks_per_worker=10"]).batch_size(7) == 70


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_every_job_file_loads_and_survives_a_dump(job):
    config = load_config([job])
    assert Config.model_validate(yaml.safe_load(dump_config(config))) == config


def test_there_are_job_files():
    assert len(JOBS) >= 4


@pytest.mark.parametrize(
    "text", ["2026-11-26", "007", "on", "1e3", "0x1F", "1:59:59", "a #b", ".inf", "2026-11-26 10:00:00"]
)
def test_what_is_typed_for_a_text_stays_as_it_was_typed(tmp_path, text):
    config = load_config([], [DATA, f"tracking.run_name={text}", f"run_dir={text}", f"--tracking.uri={text}"])
    assert (config.tracking.run_name, config.run_dir, config.tracking.uri) == (text, text, text)
    assert load_config([written(tmp_path, "job.yaml", dump_config(config))]) == config
    quoted = load_config([], [DATA, f"tracking.run_name='{text}'", "run_dir=null", "tracking.uri="])
    assert (quoted.tracking.run_name, quoted.run_dir, quoted.tracking.uri) == (text, None, None)


@pytest.mark.parametrize("text", ["1:59:59", "1:30", "1:59:59.5", "2026-11-26"])
def test_numbers_of_base_sixty_and_dates_are_no_numbers(tmp_path, text):
    for files, overrides in (
        ([written(tmp_path, "job.yaml", f"max_time_s: {text}\n")], [DATA]),
        ([], [f"max_time_s={text}", DATA]),
    ):
        with pytest.raises(InputError, match=f"max_time_s='{text}'"):
            load_config(files, overrides)


def test_the_names_that_settings_repeat_are_those_of_models_and_learners():
    assert tuple(MODELS) == BUILT_IN_MODELS
    assert {field.name for field in fields(Learner)} == {"model", "loss", *LEARNER_OPTIONS}
