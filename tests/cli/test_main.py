"""The command as people use it: output, exit codes, signals."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
from PIL import Image

from metadist.checkpoint.journal import read_journal
from metadist.cli.main import commands
from metadist.cli.report import next_commands, quoted, report
from metadist.config.load import load_config, split_arguments
from metadist.learners import LEARNERS
from tests.cli.command import run

JOBS = Path(__file__).resolve().parents[2] / "jobs"
SMALL = [
    "fleet.backend=local", "model.name=mlp", "model.hidden=[16]", "meta_steps=4", "meta_batch_size=4",
    "evaluation.every=2", "evaluation.tasks=4", "evaluation.test_tasks=4", "evaluation.baseline_tasks=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A directory with a job file and its finished run in runs/small."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "small.yaml").write_text(
        "data: {family: digits}\ntask: {ways: 3, shots: 2, queries: 3}\nmodel: {name: mlp, hidden: [16]}\n"
        "tracking: {mlflow: false}\n"
    )
    done = run("train", "small.yaml", *[o for o in SMALL if not o.startswith("model")], cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "out.txt").write_text(done.stdout)
    return folder


def test_train_prints_results_to_stdout_and_leaves_the_run(trained):
    out = (trained / "out.txt").read_text()
    assert "before adaptation" in out
    assert "nearest class mean" in out
    assert "from scratch" in out
    assert "evaluation.inner_steps=10" in out
    left = {path.name for path in (trained / "runs" / "small").iterdir()}
    assert left >= {"config.yaml", "metrics.jsonl", "journal.jsonl", "results.json", "checkpoints", "tasks.arrow"}
    told = json.loads((trained / "runs" / "small" / "results.json").read_text())
    assert told["theta_sha256"] in out
    assert told["meta_steps"] == 4


def test_a_used_run_directory_is_refused_without_resume(trained):
    done = run("train", "small.yaml", *SMALL, cwd=trained)
    assert done.returncode == 2
    assert "already holds a run" in done.stderr
    assert "--resume auto" in done.stderr


def test_a_run_that_was_refused_before_its_first_step_is_in_nobodys_way(trained):
    """No GPU is found here once the directory is there."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    job = ["train", "small.yaml", *[o for o in SMALL if not o.startswith("model")], "run_dir=runs/refused"]
    refused = run(*job, "fleet.gpus_per_worker=1", cwd=trained)
    assert refused.returncode == 2 and (trained / "runs" / "refused" / "config.yaml").exists(), refused.stderr
    assert run(*job, cwd=trained).returncode == 0
    assert "already holds a run" in run(*job, cwd=trained).stderr


def test_resume_of_a_finished_run_gives_the_same_theta(trained):
    first = json.loads((trained / "runs" / "small" / "results.json").read_text())["theta_sha256"]
    job = [o for o in SMALL if not o.startswith("model")]
    done = run("train", "small.yaml", *job, "--resume", "auto", "--json", cwd=trained)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["theta_sha256"] == first


def test_resume_as_another_run_is_refused_key_by_key(trained):
    job = [o for o in SMALL if not o.startswith("model")]
    done = run("train", "small.yaml", *job, "learner.inner_lr=0.3", "--resume", "auto", cwd=trained)
    assert done.returncode == 2
    assert "learner.inner_lr None -> 0.3" in done.stderr


def test_a_run_that_has_done_more_meta_steps_than_are_asked_for_is_left_as_it_is(trained):
    job = [o for o in SMALL if not o.startswith(("model", "meta_steps"))]
    before = (trained / "runs" / "small" / "config.yaml").read_text()
    done = run("train", "small.yaml", *job, "meta_steps=3", "--resume", "auto", cwd=trained)
    assert done.returncode == 2
    assert "4 meta-steps are done, and meta_steps=3: set meta_steps=4 to evaluate the run again" in done.stderr
    assert (trained / "runs" / "small" / "config.yaml").read_text() == before


def test_evaluate_says_which_settings_it_does_not_look_at(trained):
    said = "of training alone, which an evaluation does not look at"
    done = run("evaluate", "runs/small", "run_dir=elsewhere", "evaluation.tasks=9", cwd=trained)
    assert done.returncode == 0 and f"evaluation.tasks, run_dir: {said}" in done.stderr
    assert not (trained / "elsewhere").exists()
    assert said not in run("evaluate", "runs/small", "evaluation.test_tasks=4", cwd=trained).stderr


@pytest.mark.parametrize(
    "command",
    [["predict", "runs/small", "--support", "a", "--query", ""], ["data", "describe", ""], ["train", "small.yaml", ""]],
)
def test_an_empty_argument_is_no_folder(trained, command):
    done = run(*command, cwd=trained)
    assert done.returncode == 2 and "one of the arguments is empty" in done.stderr and not done.stdout


def test_code_that_ends_the_process_is_told(tmp_path):
    (tmp_path / "tests_exits.py").write_text(
        "import sys\nfrom torch import nn\n\nclass Net(nn.Linear):\n    def __init__(self):\n"
        "        super().__init__(64, 3)\n\n    def forward(self, x):\n        sys.exit(3)\n"
    )
    own = ["model.name=tests_exits:Net", *[o for o in SMALL if not o.startswith("model")], "tracking.mlflow=false"]
    done = run("train", "data.family=digits", "task.ways=3", *own, cwd=tmp_path)
    assert done.returncode == 1 and "ended it by sys.exit(3)" in done.stderr


def test_evaluate_takes_other_inner_steps(trained):
    done = run(
        "evaluate", "runs/small", "evaluation.inner_steps=3", "evaluation.transductive=false", "--json", cwd=trained
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told["accuracy"]["by_inner_step"]) == 4
    assert told["protocol"]["transductive"] is False
    assert {path.name for path in Path(trained, told["folder"]).iterdir()} == {
        "results.json", "tasks.arrow", "adaptation_curve.png",
    }  # fmt: skip


def test_evaluate_refuses_other_settings_of_training(trained):
    for change in ("meta_lr=3", "learner.inner_optimizer=adam"):
        done = run("evaluate", "runs/small", change, cwd=trained)
        assert done.returncode == 2
        assert change.partition("=")[0] in done.stderr


def test_a_closed_form_is_reported_as_what_it_is(tmp_path):
    job = ["data.family=digits", "task.ways=3", "task.queries=3", *SMALL, "tracking.mlflow=false", "run_dir=run"]
    done = run("train", *job, "learner.name=protonet", "evaluation.every=0", "evaluation.baselines=[]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "with class means" in done.stdout and "before adaptation" not in done.stdout
    assert "metadist evaluate run evaluation.test_tasks=1000" in done.stdout


def test_replay_verifies_and_notices_a_wrong_hash(trained):
    done = run("replay", "runs/small", "--verify", cwd=trained)
    assert done.returncode == 0, done.stderr
    journal = trained / "runs" / "small" / "journal.jsonl"
    kept = journal.read_text()
    last = [record for record in read_journal(journal) if "done" in record][-1]["theta_sha256"]
    journal.write_text(kept.replace(last, "0" * 64))
    done = run("replay", "runs/small", cwd=trained)
    journal.write_text(kept)
    assert done.returncode == 1
    assert "the journal says 000" in done.stderr


def test_replay_of_one_task_traces_it(trained):
    done = run("replay", "runs/small", "--task", "train:4:1", cwd=trained)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row.get("inner_step") for row in rows] == [0, 1, None]
    assert rows[-1]["meta_gradient_norm"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train", "nothing.yaml"], 2, "there is no job file nothing.yaml"),
        (["train"], 2, "name a job file"),
        (["train", "data.family=digits", "lerner.inner_lr=1"], 2, "did you mean learner"),
        (["train", "data.family=digits", "meta_lr=-1", "meta_steps=x"], 2, "meta_lr=-1"),
        (["train", "data.family=digits"], 2, "lower ways, shots or queries"),
        (["train", "data.path=nowhere"], 2, "nowhere: make it with"),
        (["train", "data.family=digits", "task.ways=3", "task.shots=1", "model.name=nomodule:Net"], 2, "No module"),
        (["train", "data.family=digits", "task.ways=3", "learner.name=mamll"], 2, "did you mean maml"),
        (["train", "data.family=digits", "task.ways=3", "learner.inner_lrr=1"], 2, "did you mean inner_lr"),
        (["train", "data.family=digits", "task.ways=3", "model.name=mlp", "model.hiden=[3]"], 2, "did you mean hidden"),
        (["evaluate", "nowhere"], 2, "is not a run directory"),
        (["scale", "nowhere", "3"], 2, "is not a run directory"),
        (["data", "describe", "nowhere"], 2, "is not a dataset folder"),
        (["data", "omniglot", "--source", "nowhere", "--out", "x"], 2, "nowhere"),
        (["nonsense"], 2, "No such command"),
        (["replay", ".", "--task", "x"], 2, "train:STEP:INDEX"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path, arguments, code, said):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_import_says_what_it_left_out_and_describe_keeps_it(tmp_path):
    for name in ("ant", "bee", "cat"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for shot in range(3):
            colour = (100 * shot, ord(name[0]), 0)
            Image.new("RGB", (8, 8), colour).save(tmp_path / "set" / name / f"{shot}.png")
    (tmp_path / "set" / "cat" / ".hidden.png").write_bytes(b"")
    (tmp_path / "set" / "cat" / "bad.png").write_bytes(b"")
    command = ["data", "images", "--source", "set", "--size", "8", "8", "--out", "out"]
    refused = run(*command, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "cat/bad.png is not a picture" in refused.stderr and "--skip-bad" in refused.stderr
    done = run(*command, "--skip-bad", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: files left out: 1, hidden or made by a tool (for example cat/.hidden.png)" in done.stderr
    assert "note: pictures left out: 1, each is not a picture that can be read or is cut short" in done.stderr
    assert "2 notes above" in done.stdout and done.stdout.count("\n") == 1
    told = json.loads(run("data", "describe", "out", "--json", cwd=tmp_path).stdout)["notes"]
    assert [note["count"] for note in told] == [1, 1]


def test_dry_run_prints_the_plan_and_leaves_nothing(tmp_path):
    small = ["model.name=mlp", "model.channels=null"]
    done = run("train", str(JOBS / "digits.yaml"), *small, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tasks_per_step"] == 16
    assert list(tmp_path.iterdir()) == []


def test_divergence_names_the_task_and_its_replay_command_and_exits_with_3(tmp_path):
    broken = ["learner.inner_lr=1e30", "learner.inner_steps=3", "tracking.mlflow=false", "run_dir=run"]
    done = run("train", "data.family=digits", "task.ways=3", "task.queries=3", *SMALL, *broken, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "metadist replay" in done.stderr
    task = done.stderr.split("--task ")[1].split("`")[0]
    traced = run("replay", "run", "--task", task, cwd=tmp_path)
    assert traced.returncode == 0, traced.stderr
    assert "NaN" in traced.stdout or "Infinity" in traced.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_exits(tmp_path, number, code):
    job = ["data.family=digits", "task.ways=3", "task.queries=3", *SMALL, "meta_steps=100000", "evaluation.every=0"]
    command = [sys.executable, "-m", "metadist", "train", *job, "tracking.mlflow=false", "run_dir=run"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(read_journal(tmp_path / "run" / "journal.jsonl")) < 10 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "--resume auto" in said
    check_saved(tmp_path / "run")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_exits_at_once_while_the_first_is_cleaned_up_after(number, code):
    script = (
        "import os, signal, sys\nfrom metadist.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a background job of a shell ignores
        "def command(arguments):\n"
        "    try:\n        os.kill(os.getpid(), int(sys.argv[1]))\n        sum(range(10**7))\n"
        "    finally:\n        print('cleaned up', flush=True)\n"
        "        if len(sys.argv) > 2:\n            os.kill(os.getpid(), int(sys.argv[1]))\n"
        "            sum(range(10**7))\n"
        "        print('to the end', flush=True)\n"
        "main._run_command = command\nsys.exit(main.main([]))"
    )
    for signals, said in ((1, ["cleaned up", "to the end"]), (2, ["cleaned up"])):
        command = [sys.executable, "-c", script, *[str(int(number))] * signals]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout.splitlines()) == (code, said), done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_exits_at_once_while_a_run_ends_by_the_first(number, code):
    script = (
        "import os, signal, sys\nfrom metadist.cli import main\nfrom metadist.core.errors import Interrupted\n"
        "from metadist.run.signals import Signals\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def send():\n    os.kill(os.getpid(), int(sys.argv[1]))\n    sum(range(10**7))\n"
        "def command(arguments):\n"
        "    try:\n        with Signals() as signals, signals.deferred():\n            send()\n"
        "        print('noted', flush=True)\n        raise Interrupted(signals.received)\n"
        "    finally:\n        try:\n            send()\n"
        "        finally:\n            print('not at once', flush=True)\n"
        "main._run_command = command\nsys.exit(main.main([]))"
    )
    command = [sys.executable, "-c", script, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "noted\n"), done.stderr


def check_saved(run_dir: Path) -> None:
    """The step that was applied last is saved."""
    records = read_journal(run_dir / "journal.jsonl")
    applied = max(record.get("applied", 0) for record in records)
    assert records[-1]["done"] == applied + 1
    assert (run_dir / "checkpoints" / f"step_{applied + 1:08}").exists()


def test_a_signal_saves_though_the_terminal_is_gone(tmp_path):
    job = ["data.family=digits", "task.ways=3", "task.queries=3", *SMALL, "meta_steps=100000", "evaluation.every=0"]
    command = [sys.executable, "-m", "metadist", "train", *job, "tracking.mlflow=false", f"run_dir={tmp_path / 'run'}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith(b"step"))
        process.stderr.close()
        process.send_signal(signal.SIGINT)
        process.wait(60)
    check_saved(tmp_path / "run")


def test_config_commands(tmp_path):
    assert run("config", "new", "my_job", cwd=tmp_path).returncode == 0
    assert run("config", "validate", "my_job.yaml", cwd=tmp_path).stdout == "valid\n"
    shown = run("config", "show", "my_job.yaml", "meta_lr=1e-2", cwd=tmp_path).stdout
    assert "meta_lr: 0.01" in shown
    assert json.loads(run("config", "schema", cwd=tmp_path).stdout)["additionalProperties"] is False
    assert run("config", "new", "my_job", cwd=tmp_path).returncode == 2


def test_learners_are_listed_with_paper_engines_and_options(tmp_path):
    out = run("learners", cwd=tmp_path).stdout
    for name, (_, _, line) in LEARNERS.items():
        assert f"{name:15} {line}" in out
    assert "engines: loop, vmap; inner_lr=0.1, inner_steps=1, first_order=False, adapted=*, inner_optimizer=sgd" in out
    assert "initial_lambda=50.0" in out
    lines = out.splitlines()
    own = {line.split()[0]: after for line, after in zip(lines[::2], lines[1::2], strict=True)}
    assert "inner_lr=" not in own["meta_sgd"] and "adapted" not in own["reptile"]
    assert own["protonet"].endswith("no options")


def test_help_needs_no_torch_and_no_ray():
    code = "import sys; from metadist.cli.main import main; main(['--help'])\n" \
           "assert not {'torch', 'ray', 'mlflow'} & set(sys.modules)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "metadist train jobs/digits.yaml" in done.stdout, done.stderr


def every_command(group: click.Group, name: str = "metadist") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for word in group.list_commands(context):
        command = group.get_command(context, word)
        assert command is not None
        yield f"{name} {word}", command
        if isinstance(command, click.Group):
            yield from every_command(command, f"{name} {word}")


def test_the_help_of_every_command_has_an_example(tmp_path):
    found = dict(every_command(commands))
    assert {"metadist train", "metadist config new", "metadist data table"} <= found.keys()
    for name in found:
        done = run(*name.split()[1:], "--help", cwd=tmp_path)
        examples = [line for line in done.stdout.splitlines() if line.startswith("  metadist ")]
        assert done.returncode == 0 and examples, name


def test_the_installed_command_trains_and_prints_results_alone(tmp_path):
    """In a process of its own, as the console script of pyproject.toml begins it."""
    scripts = tomllib.loads((JOBS.parent / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["metadist"].partition(":")
    job = ["data.family=digits", "task.ways=3", "task.queries=3", *SMALL, "tracking.mlflow=false", "run_dir=run"]
    code = f"from {module} import {function}; {function}()"
    done = subprocess.run([sys.executable, "-c", code, "train", *job, "--json"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "run" / "results.json").read_text())


def test_signal_handlers_are_those_from_before_afterwards(tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    for arguments in (["learners"], ["nonsense"], ["train", "data.family=digits", "task.ways=3", *SMALL, "--dry-run"]):
        run(*arguments, cwd=tmp_path)
        assert [signal.getsignal(number) for number in numbers] == before


def test_every_way_of_writing_an_override():
    files, overrides = split_arguments(["a.yaml", "x=1", "--y.z=2", "--learner.inner-lr", "0.1", "b.yaml"])
    assert files == ["a.yaml", "b.yaml"]
    assert overrides == ["x=1", "--y.z=2", "--learner.inner-lr=0.1"]


def test_report_shows_a_regression_without_per_cents():
    point = {"mean": 0.5, "ci95": 0.1}
    told = {"evaluated_theta_sha256": "ab", "evaluated_step": 3, "protocol": {}, "begun": "before adaptation",
            "loss": {"by_inner_step": [point]}, "baselines": {}, "verdict": "no baseline"}  # fmt: skip
    assert "0.5000 ± 0.1000" in report(told)
    told |= {"advice": ["more steps", "more data"], "few_tasks": "6 tasks are of one class"}
    *_, note, _, verdict, first, second = report(told).splitlines()
    assert [line.split(maxsplit=1)[0] for line in (note, verdict, first, second)] == ["note", "verdict", "try", "try"]
    assert second.endswith(" more data")
    told["online"] = {"losses": [2.0, 1.5, 1.0], "regret": 0.25}
    assert "3 rounds, loss 2.0000 in the first, 1.0000 in the last, regret 0.2500" in report(told)


def test_printed_commands_can_be_typed(tmp_path, monkeypatch):
    """A run directory with a space and a quote in its name: the command after "evaluate" does what it says."""
    job = ["data.family=digits", "task.ways=3", "task.queries=3", *SMALL, "run_dir=it's my run"]
    done = run("train", *job, "tracking.mlflow=false", "-q", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = {line.split()[0]: line.partition(" ")[2].strip() for line in done.stdout.splitlines() if line}
    assert shlex.split(printed["results"]) == ["it's my run/results.json"]
    assert shlex.split(printed["evaluate"])[:3] == ["metadist", "evaluate", "it's my run"]
    again = run(*shlex.split(printed["evaluate"])[1:], cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    *_, watch = next_commands(load_config([], job), {"protocol": {"inner_steps": 1}}).splitlines()
    assert "watch" not in printed and watch.split()[1:] == ["mlflow", "ui", "--backend-store-uri",
                                                            f"sqlite:///{tmp_path / 'mlflow.db'}"]  # fmt: skip
    assert quoted("/a b") == "'/a b'"


@pytest.mark.parametrize(
    ("steps", "tasks", "change"),
    [
        (5, 600, "evaluation.inner_steps=10"), (10, 600, "evaluation.inner_steps=20"),
        (0, 600, "evaluation.test_tasks=1000"), (0, 1000, "evaluation.test_tasks=2000"),
    ],
)  # fmt: skip
def test_the_printed_evaluation_is_not_the_one_that_was_just_done(steps, tasks, change):
    job = load_config([], ["data.family=digits", "run_dir=it", "tracking.mlflow=false"])
    told = next_commands(job, {"protocol": {"inner_steps": steps, "tasks": tasks}})
    assert f"metadist evaluate it {change}" in told


def test_bench_takes_what_train_takes(tmp_path):
    done = run("bench", "none.yaml", "--learner.inner-steps", "x", "--seconds", "1", cwd=tmp_path)
    assert done.returncode == 2 and "there is no job file none.yaml" in done.stderr
    done = run("bench", "--data.family", "digits", "--learner.inner-lr", "fast", cwd=tmp_path)
    assert done.returncode == 2 and "inner_lr='fast'" in done.stderr


def test_a_signal_while_the_process_ends_prints_no_traceback(tmp_path):
    """Sent from the last thing the interpreter runs before it is gone."""
    code = "import atexit, os, sys\nfrom metadist.__main__ import run\n" \
           "atexit.register(lambda: [os.kill(os.getpid(), {0}), sum(range(10**6))])\n" \
           "sys.argv = ['metadist', '--help']\nrun()"  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGINT):
        command = [sys.executable, "-c", code.format(int(number))]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == -number and done.stderr == "" and "Usage" in done.stdout
