"""What a clumsy user or an attacker gives: refused in one sentence, nothing in it executed, nothing crashing."""

import copy
import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import metadist
from metadist.checkpoint.format import Checkpoint, encode, load_checkpoint
from metadist.checkpoint.store import CheckpointStore
from metadist.config import Config, load_config
from metadist.core.errors import InputError
from metadist.data import open_dataset
from metadist.run.api import dry_run, train
from metadist.run.mirror import asked_target
from metadist.run.replay import replay
from metadist.run.saved import scale
from tests.data.example import write_example
from tests.data.test_table import rewrite

TASK = "data: {family: digits}\ntask: {ways: 3, shots: 1, queries: 2}\nfleet: {backend: local}\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def assert_one_sentence(text: str) -> None:
    assert "\n" not in text and "Traceback" not in text and 20 < len(text) < 700


@pytest.fixture(autouse=True)
def nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("text", "sentence"), [
    ("seed: !!python/object/apply:os.system ['touch executed']\n", "constructor"),
    ("model: {name: !!python/name:os.system ''}\n", "constructor"),
    (BOMB, "aliases"),
    ("model: &m {name: mlp, x: *m}\n", "nested"),
    ("model: {hidden: " + "[" * 3000 + "]" * 3000 + "}\n", "nested"),
    ("data: {family: digits}\nseed: 1\nseed: 2\n", "'seed'"),
    ("seed: " + "9" * 5000 + "\n", "limit"),
    ("? [1, 2]\n: 3\n", "unhashable"),
    ("seed: 1\0\n", "special characters"),
    ("\x01\x02", "special characters"),
])  # fmt: skip
def test_yaml_that_is_more_than_plain_values_is_refused(text, sentence):
    Path("job.yaml").write_text(text)
    with pytest.raises(InputError, match="job.yaml") as raised:
        load_config(["job.yaml"])
    assert sentence in str(raised.value)
    assert_one_sentence(str(raised.value))


def test_aliases_and_merges_of_ordinary_size_are_taken():
    Path("job.yaml").write_text("data: &d {family: digits}\nmodel: {<<: {name: mlp}, hidden: &h [3, 4], other: *h}\n")
    assert load_config(["job.yaml"]).model.options == {"hidden": [3, 4], "other": [3, 4]}


@pytest.mark.parametrize(("override", "sentence"), [
    ("meta_lr=.nan", "finite"), ("meta_lr=.inf", "finite"), ("max_time_s=.inf", "finite"), ("meta_lr=0", "greater"),
    ("optimizer.weight_decay=.nan", "finite"), ("optimizer.clip_norm=-1", "greater"), ("num_workers=1e999", "finite"),
    ("num_workers=-2", "greater"), ("num_workers=1000000000", "less"), ("meta_batch_size=999999999999", "less"),
    ("meta_steps=99999999999999999999", "less"), ("task.shots=0", "greater"), ("task.ways=-1", "greater"),
    ("fleet.resources={x: -1}", "greater"), ("fleet.cpus_per_worker=.inf", "finite"),
    ("fleet.gpus_per_worker=1.5", "whole"), ("run_dir='a\\0b'", ""), ('run_dir="a\\0b"', "match pattern"),
    ('checkpoint.location="a\\0b"', "match pattern"), ("learner.name=[1]", "string"), ("model=[1]", "dictionary"),
    ("model.name=mlp", ""), ("{a: 1}=3", "not a setting"), ("data.family=numbers", "'digits'"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(override, sentence):
    if not sentence:
        load_config([], ["data.family=digits", override])
        return
    with pytest.raises(InputError) as raised:
        load_config([], ["data.family=digits", override])
    assert sentence in str(raised.value)
    assert_one_sentence(str(raised.value))


@pytest.mark.parametrize(("overrides", "sentence"), [
    (["model.name=:x"], "module:attribute"), (["model.name=..:x"], "module:attribute"),
    (["learner.inner_lr=.nan"], "finite"), (["learner.inner_lr=.inf"], "finite"), (["learner.inner_lr=-1"], "above 0"),
    (["learner.inner_steps=-1"], "0 or more"), (["model.name=mlp", "model.hidden=[-3]"], "negative dimension"),
    (["model.name=mlp", "model.hidden=[10000000000000]"], "model mlp: "),
    (["model.name=mlp", "model.hidden=[.nan]"], "finite"),
    (["task.shots=99999999999999999999999"], "less"), (["task.shots=100000"], "shots"),
    (["task.ways=100"], "ways"), (["task.scheme=values"], ""),
    (["data.options={turned: maybe}"], "turned='maybe'"), (["data.options={seed: .nan}"], "seed=nan"),
    (["data.options={nothing: 1}"], "'nothing'"), (["model.weights=/"], "safetensors"),
])  # fmt: skip
def test_jobs_that_cannot_be_are_refused_before_any_worker_starts(overrides, sentence):
    Path("job.yaml").write_text(TASK)
    with pytest.raises(InputError) as raised:
        dry_run(load_config(["job.yaml"], overrides))
    assert sentence in str(raised.value)
    assert_one_sentence(str(raised.value))


def job(run_dir: Path, *overrides: str) -> Config:
    own = ["model.name=mlp", "model.hidden=[4]", "meta_steps=2", "evaluation.every=0", "evaluation.baselines=[]",
           "evaluation.test_tasks=2", "tracking.mlflow=false", f"run_dir={run_dir}", *overrides]  # fmt: skip
    (run_dir.parent / "own.yaml").write_text(TASK)
    return load_config([run_dir.parent / "own.yaml"], own)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("bad_input") / "run"
    train(job(run_dir), quiet=True)
    return run_dir


def forge(folder: Path, checkpoint: Checkpoint, replaced: dict[str, bytes] | None = None, **changes) -> Path:
    """A checkpoint whose hashes are all right, by someone who knows how they are made."""
    contents = encode(checkpoint) | (replaced or {})
    meta = json.loads(contents.pop("meta.json")) | changes
    described = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()
    }
    meta["files"] = described | changes.get("files", {})
    meta.pop("sha256")
    meta["sha256"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def zipped(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A trainer's file with other entries."""
    buffer = io.BytesIO(saved({"a": 1}))
    with zipfile.ZipFile(buffer) as old:
        contents = {name: old.read(name) for name in old.namelist()} | entries
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as new:
        for name, content in contents.items():
            new.writestr(name, content)
    return made.getvalue()


class Large:
    def __reduce__(self):
        return bytearray, (10**9,)


def tensors(header: dict) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 4


@pytest.mark.parametrize("files", [
    {"trainer.pt": pickle.dumps(Evil())}, {"trainer.pt": pickle.dumps(Evil(), 2)}, {"trainer.pt": saved([Evil()])},
    {"trainer.pt": b"PK\3\4 and no more"}, {"trainer.pt": b""}, {"trainer.pt": saved([1])},
    {"weights.safetensors": pickle.dumps(Evil())}, {"weights.safetensors": (2**62).to_bytes(8, "little") + b"{}"},
    {"weights.safetensors": tensors({"w": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}})},
    {"weights.safetensors": tensors({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}})},
    {"weights.safetensors": tensors({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}})},
    {"config.yaml": b"\xff\xfe"}, {"trainer.pt": zipped({"archive/data/9": bytes(10**8)}, zipfile.ZIP_DEFLATED)},
    {"trainer.pt": zipped({"archive/data.pkl": pickle.dumps({"a": Large()}, 2)})},
    {"trainer.pt": zipped({"archive/data.pkl": pickle.dumps({"a": Large()}, 4)})},
], ids=lambda files: f"{min(files)}-{len(min(files.values()))}")  # fmt: skip
def test_files_with_the_right_hash_and_other_content_are_refused(trained, tmp_path, files):
    folder = forge(tmp_path / "forged", CheckpointStore(trained / "checkpoints").load(), files)
    with pytest.raises(InputError, match="was not loaded") as raised:
        load_checkpoint(folder)
    assert_one_sentence(str(raised.value))


@pytest.mark.parametrize("changes", [
    {"files": {"../../../etc/passwd": {"bytes": 1, "sha256": ""}}}, {"files": {"/etc/passwd": {}}}, {"step": "../x"},
    {"files": {"trainer.pt": 3}}, {"files": {"trainer.pt": {"bytes": "x", "sha256": 3}}}, {"step": -1}, {"step": True},
    {"step": 10**30}, {"weights": "abc"}, {"weights": [["a"]]}, {"run": []}, {"metrics": 3}, {"format": True},
    {"format": -1}, {"format": "1"}, {"format": 99},
], ids=str)  # fmt: skip
def test_a_description_of_something_else_is_refused(trained, tmp_path, changes):
    folder = forge(tmp_path / "forged", CheckpointStore(trained / "checkpoints").load(), **changes)
    with pytest.raises(InputError) as raised:
        load_checkpoint(folder)
    assert_one_sentence(str(raised.value))


def state(**changes):
    return lambda trainer: trainer["server"]["optimizer"]["state"][0].update(changes)


def group(**changes):
    return lambda trainer: trainer["server"]["optimizer"]["param_groups"][0].update(changes)


def moments(change):
    """What becomes of Adam's mean of gradients."""
    return lambda trainer: trainer["server"]["optimizer"]["state"][0].update(
        exp_avg=change(trainer["server"]["optimizer"]["state"][0]["exp_avg"])
    )


def share(trainer):
    kept = trainer["server"]["optimizer"]["state"][0]
    kept["exp_avg_sq"] = kept["exp_avg"] = kept["exp_avg"].abs()


@pytest.mark.parametrize("change", [
    lambda trainer: trainer.clear(), lambda trainer: trainer.update(server=3), state(exp_avg=torch.zeros(3)),
    lambda trainer: trainer["server"].update(step=7), lambda trainer: trainer["server"]["optimizer"].clear(),
    lambda trainer: trainer["server"]["optimizer"]["state"].clear(), state(exp_avg=torch.zeros(3, dtype=torch.int32)),
    lambda trainer: trainer["server"]["optimizer"].update(param_groups=[]), lambda trainer: trainer.update(target=-3),
    lambda trainer: trainer.update(target=10**9), lambda trainer: trainer.update(progress={"x": 1}),
    lambda trainer: trainer["progress"].update(best="x"), lambda trainer: trainer["progress"].update(best=math.nan),
    lambda trainer: trainer["progress"].update(best=math.inf), lambda trainer: trainer["progress"].update(validated=3),
    lambda trainer: trainer["server"].update(more=1), lambda trainer: trainer["server"]["optimizer"].update(more=1),
    lambda trainer: trainer["server"]["optimizer"]["state"].update({1: {}}), state(max_exp_avg_sq=torch.zeros(271)),
    state(momentum_buffer=torch.zeros(271)), state(exp_avg=None), state(exp_avg=[0.0]), state(step=2),
    state(step=torch.tensor(3.0)), state(step=torch.tensor(math.inf)), state(step=torch.tensor(math.nan)),
    state(step=torch.tensor(-2.0)), state(step=torch.tensor(2.5)), state(step=torch.tensor(2)),
    state(step=torch.tensor(2.0, dtype=torch.float64)), state(step=torch.tensor([2.0])),
    moments(torch.Tensor.double), moments(torch.Tensor.half), moments(torch.Tensor.to_sparse),
    moments(lambda tensor: torch.nn.Parameter(tensor)), moments(lambda tensor: tensor.clone().requires_grad_()),
    moments(lambda tensor: tensor[:-1].clone()), moments(lambda tensor: tensor[None].clone()),
    moments(lambda tensor: tensor.to(torch.complex64)), moments(lambda tensor: tensor.to("meta")),
    moments(lambda tensor: tensor + math.inf), moments(lambda tensor: tensor * math.nan),
    moments(lambda tensor: tensor[:1].expand(len(tensor))), share,
    lambda trainer: trainer["server"]["optimizer"]["state"][0]["exp_avg_sq"].neg_(),
    group(maximize=True), group(weight_decay=0.1), group(lr=0.1), group(lr=math.inf), group(lr=torch.tensor(0.001)),
    group(betas=(0.5, 0.999)), group(betas=[0.9, 0.999]), group(eps=1e9), group(amsgrad=True), group(capturable=True),
    group(differentiable=True), group(fused=True), group(foreach=True), group(decoupled_weight_decay=True),
    group(more=1), group(params=[0, 1]), group(maximize=0),
    lambda trainer: trainer["server"]["optimizer"]["param_groups"][0].pop("betas"),
])  # fmt: skip
def test_a_trainer_state_that_does_not_fit_is_not_continued(trained, tmp_path, change):
    genuine = CheckpointStore(trained / "checkpoints").load()
    trainer = copy.deepcopy(genuine.trainer)
    change(trainer)
    folder = forge(tmp_path / "forged", dataclasses.replace(genuine, trainer=trainer))
    with pytest.raises(InputError, match="cannot be continued|was not loaded") as raised:
        train(job(tmp_path / "run", "meta_steps=4"), resume=folder, quiet=True)
    assert_one_sentence(str(raised.value))
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("option", [
    "optimizer.name=adamw", "optimizer.name=sgd", "optimizer.schedule=cosine", "optimizer.warmup_steps=5",
    "optimizer.weight_decay=0.1", "optimizer.delay=1", "tasks_per_worker=2",
])  # fmt: skip
def test_a_genuine_trainer_state_is_continued(tmp_path, option):
    """Else the comparison asks for more than training leaves behind."""
    own = ["meta_steps=3", "meta_batch_size=2"] if "tasks_per" not in option else ["meta_steps=3"]
    own += ["optimizer.momentum=0.9"] if option.endswith("sgd") else []
    own += ["optimizer.batch_rule=linear"] if "tasks_per" in option else []
    half = [*own, "meta_steps=2"] if "schedule" not in option else own
    train(job(tmp_path / "whole", *own, option), quiet=True)
    train(job(tmp_path / "run", *half, option, "checkpoint.every=1"), quiet=True)
    resumed = train(job(tmp_path / "run", *own, option), resume="auto", quiet=True)
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert resumed["theta_sha256"] == whole["theta_sha256"]


def replaced(**changes):
    return lambda checkpoint: dataclasses.replace(checkpoint, **changes)


def weights(change):
    return lambda checkpoint: dataclasses.replace(
        checkpoint, weights={name: change(array) for name, array in checkpoint.weights.items()}
    )


@pytest.mark.parametrize("change", [
    replaced(run={}), replaced(run={"identity": 3, "shapes": [], "run_dir": 5}), replaced(weights={}),
    weights(np.ravel), weights(lambda array: array.astype(np.int64)),
    lambda checkpoint: dataclasses.replace(checkpoint, run={**checkpoint.run, "shapes": {"inputs": "x"}}),
    lambda checkpoint: dataclasses.replace(
        checkpoint, run={**checkpoint.run, "shapes": {**checkpoint.run["shapes"], "outputs": -4}}
    ),
    lambda checkpoint: dataclasses.replace(
        checkpoint, config=checkpoint.config.replace("name: mlp", "name: os:system\n  command: touch executed")
    ),
    replaced(config="[1]"), replaced(config="seed: !!python/object/apply:os.system ['touch executed']"),
    replaced(config="data: {family: digits}\nnonsense: 1\n"),
])  # fmt: skip
def test_a_checkpoint_of_something_else_is_not_loaded(trained, tmp_path, change):
    folder = forge(tmp_path / "forged", change(CheckpointStore(trained / "checkpoints").load()))
    with pytest.raises(InputError) as raised:
        metadist.load(folder)
    assert_one_sentence(str(raised.value))


def test_weights_of_another_precision_are_not_continued(trained, tmp_path):
    genuine = CheckpointStore(trained / "checkpoints").load()
    folder = forge(tmp_path / "forged", weights(lambda array: array.astype(np.float64))(genuine))
    with pytest.raises(InputError, match="float64.*float32"):
        train(job(tmp_path / "run"), resume=folder, quiet=True)


@pytest.mark.parametrize("line", [
    '{"step":0,"tasks":"x"}', '{"step":[0],"tasks":1}', '{"step":0,"tasks":-1}', '{"done":1}',
    '{"done":"1","theta_sha256":"x"}', "[" * 5000,
])  # fmt: skip
def test_a_journal_of_something_else_is_refused(trained, tmp_path, line):
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    (run_dir / "journal.jsonl").write_text(f'{line}\n{{"step":1,"tasks":32}}\n')
    with pytest.raises(InputError, match="journal") as raised:
        replay(run_dir, print)
    assert_one_sentence(str(raised.value))


def test_a_target_that_no_run_can_have_is_refused_and_one_written_by_hand_ignored(trained, tmp_path):
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    for target in (0, -1, 10**9):
        with pytest.raises(InputError, match="100000"):
            scale(run_dir, target)
    for text in ("lots", "", "-3", "9" * 5000):
        (run_dir / "target_workers").write_text(text)
        assert asked_target(run_dir) is None


def field(**changes):
    return lambda header: header["fields"][0].update(changes)


@pytest.mark.parametrize("change", [
    field(shape=[-1, 2, 3]), field(shape=[10**9] * 3), field(shape=[0]), field(shape=["a"]), field(shape=[1.0, 2, 3]),
    field(dtype="object"), field(dtype="i4,i4"), field(dtype="datetime64[s]"), field(dtype="complex64"),
    field(dtype=">f8"), field(dtype=None), field(dtype=[["a", "O"]]), field(scale=float("nan")), field(scale="x"),
    field(offset=float("inf")), field(scale=0.0), field(scale=10**400), field(role="evil"), field(name=3),
    field(name="nothing"), field(shared="yes"), field(shared=True), field(evil=1),
    lambda header: header.update(fields=[]), lambda header: header.update(fields=["x"]),
    lambda header: header["fields"].append(header["fields"][0]), lambda header: header.update(version="1"),
    lambda header: header.update(version=-1), lambda header: header.update(version=float("nan")),
    lambda header: header.update(kind="evil"), lambda header: header.update(counts=[]),
    lambda header: header.update(counts={"rows": -1}), lambda header: header.update(extra=[]),
    lambda header: header.update(source={"a": 1}), lambda header: header.update(notes={"a": 1}),
    lambda header: header.update(notes=["x"]), lambda header: header.update(notes=[{"what": "x"}]),
    lambda header: header.update(notes=[dict.fromkeys(("what", "count", "why", "example", "remedy"), 3)]),
])  # fmt: skip
def test_a_table_whose_header_describes_something_else_is_refused(tmp_path, change):
    write_example(tmp_path / "set")
    for split in ("train", "validation", "test"):
        rewrite(tmp_path / "set" / f"{split}.arrow", change)
    with pytest.raises(InputError) as raised:
        open_dataset(tmp_path / "set")
    assert_one_sentence(str(raised.value))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"version": ' + "9" * 5000 + "}", "\xff", "3", "[]", '{"version": 1e999}']
)
def test_a_table_whose_header_is_no_header_is_refused(tmp_path, text):
    write_example(tmp_path / "set")
    file = tmp_path / "set" / "train.arrow"
    batch = (
        pa.ipc.open_file(file.read_bytes()).get_batch(0).replace_schema_metadata({"metadist": text.encode("latin1")})
    )
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as out:
        out.write_batch(batch)
    with pytest.raises(InputError, match="train.arrow") as raised:
        open_dataset(tmp_path / "set")
    assert_one_sentence(str(raised.value))


def damaged(draw: random.Random, whole: bytes) -> bytes:
    """A part of it, or all of it with some bytes changed, some of them to what is special in binary formats."""
    if draw.random() < 0.3:
        return whole[: draw.randrange(len(whole))]
    content = bytearray(whole)
    for _ in range(draw.choice([1, 2, 16])):
        content[draw.randrange(len(content))] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)])
    return bytes(content)


def test_a_damaged_table_gives_equal_data_or_an_input_error(tmp_path):
    draw = random.Random(3)
    write_example(tmp_path / "set")
    file = tmp_path / "set" / "train.arrow"
    whole = file.read_bytes()
    rows = np.arange(5)
    expected = open_dataset(tmp_path / "set").splits["train"].gather(rows)
    refused = 0
    for _ in range(300):
        file.unlink()  # the old one may still be mapped
        file.write_bytes(damaged(draw, whole))
        try:
            found = open_dataset(tmp_path / "set", verify=True).splits["train"].gather(rows)
        except InputError as error:
            refused += 1
            assert_one_sentence(str(error))
            continue
        for part, own in zip(expected, found, strict=True):
            for array, other in zip(part, own, strict=True):
                np.testing.assert_array_equal(array, other)
    assert refused > 100


def test_a_damaged_file_with_the_right_hash_loads_or_is_an_input_error(trained, tmp_path):
    """The hashes keep accidents out; this is what the formats behind them do with an attacker's bytes."""
    draw = random.Random(4)
    genuine = CheckpointStore(trained / "checkpoints").load()
    contents = encode(genuine)
    for case in range(300):
        name = ("weights.safetensors", "trainer.pt", "config.yaml")[case % 3]
        folder = forge(tmp_path / "forged", genuine, {name: damaged(draw, contents[name])})
        try:
            assert isinstance(load_checkpoint(folder), Checkpoint)
        except InputError as error:
            assert_one_sentence(str(error))
