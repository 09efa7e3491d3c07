"""No password, key or token in anything that is written, sent or said."""

import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from metadist.config import dump_config, load_config
from metadist.config.load import parse_config
from metadist.core.errors import InputError, StorageFailed
from metadist.core.redaction import command_line, redact, redacted
from metadist.run.plugins import call

SECRET = "hunter2"
JOB = [
    "data.family=digits", "task.ways=3", "task.shots=1", "task.queries=2", "model.name=mlp", "model.hidden=[4]",
    "meta_steps=2", "meta_batch_size=2", "evaluation.every=0", "evaluation.baselines=[]", "evaluation.test_tasks=2",
    "fleet.backend=local", "run_dir=runs/one",
]  # fmt: skip


@pytest.mark.parametrize(("text", "shown"), [
    ("postgresql+psycopg2://user:hunter2@host:5432/db", "postgresql+psycopg2://***@host:5432/db"),
    ("postgresql://user:hun/ter2@host/db", "postgresql://***@host/db"),
    ("postgresql://user:hun@ter2@host/db", "postgresql://***@host/db"),
    ("ray://hunter2@host:10001", "ray://***@host:10001"),
    ("s3://AKIA:hun/ter2+x@bucket/runs?region=us-east-1&scheme=http", "s3://***@bucket/runs?region=us-east-1&scheme=http"),
    ("s3://b/p?access_key=AKIA&secret_key=x&region=y", "s3://b/p?access_key=***&secret_key=***&region=y"),
    ("https://a.blob/x?sv=20&sig=a%3D&se=1", "https://a.blob/x?sv=20&sig=***&se=1"),
    ("http://h/x?X-Amz-Signature=abc&X-Amz-Credential=d", "http://h/x?X-Amz-Signature=***&X-Amz-Credential=***"),
    ("tracking.uri=http://h/x?token=ab?c", "tracking.uri=http://h/x?token=***"),
    ("cannot parse 'mysql://u:hunter2@h/db': sorry", "cannot parse 'mysql://***@h/db': sorry"),
    ("host=h password=hunter2 dbname=x", "host=h password=*** dbname=x"),
    ("http://host:5000/x@y", "http://host:5000/x@y"), ("s3://bucket/runs/one@5", "s3://bucket/runs/one@5"),
    ("sqlite:////runs/mlflow.db", "sqlite:////runs/mlflow.db"),
    ("model.key_dim=64 tokens=3", "model.key_dim=64 tokens=3"),
    ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x"),
])  # fmt: skip
def test_what_is_secret_in_an_address_is_taken_out_and_nothing_else(text, shown):
    assert redact(text) == shown
    assert redact(shown) == shown


def test_errors_settings_and_commands_carry_no_secret():
    for kind in (InputError, StorageFailed):
        assert str(kind("no answer at http://u:hunter2@h")) == "no answer at http://***@h"
    options = {"password": "hunter2", "s3": [{"secret_key": "hunter2", "tokens": 3, "token": 4}], "tokenizer": "words"}
    assert redacted(options) == {
        "password": "***", "s3": [{"secret_key": "***", "tokens": 3, "token": 4}], "tokenizer": "words"
    }  # fmt: skip
    typed = ["metadist", "train", "my job.yaml", "data.options.password=hunter2 x"]
    typed += ["data.options={user: u, password: h}", "--data.options.api-key", "hunter2"]
    assert command_line([*typed, "tracking.uri=http://u:hunter2@h"]) == (
        "metadist train 'my job.yaml' 'data.options.password=***' 'data.options={user: u, password: ***}' "
        "--data.options.api-key '***' 'tracking.uri=http://***@h'"
    )


def everything(folder: Path) -> bytes:
    """All that lies in a folder, file contents and names."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return b"".join(path.read_bytes() + str(path).encode() for path in files)


def test_a_run_leaves_no_secret_and_goes_on_with_it(tmp_path):
    """The password of a tracking URI and one of the model's own options; in MLflow's tables neither."""
    (tmp_path / "net.py").write_text(
        "import torch\nclass Net(torch.nn.Linear):\n    def __init__(self, password: str):\n"
        "        assert password == 'hunter2'\n        super().__init__(64, 3)\n"
        "    def forward(self, x):\n        return super().forward(x.flatten(1))\n"
    )
    own = [*(o for o in JOB if not o.startswith("model")), "model.name=net:Net", "model.password=hunter2",
           "checkpoint.every=1"]  # fmt: skip

    def train(*more: str, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "metadist", "train", *own, *more]
        env = os.environ | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"} | environment
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=env)

    nonsense = "tracking.uri=nonsense://u:hunter2@h/x?token=hunter2"
    done = [train(), train("meta_steps=3", "--resume", "auto"),
            train("meta_steps=4", "--resume", "auto", MLFLOW_TRACKING_URI="http://u:hunter2@127.0.0.1:9"),
            train("meta_steps=5", "--resume", "auto", "-v", nonsense)]  # fmt: skip
    for each in done:
        assert each.returncode == 0, each.stderr
        assert SECRET not in each.stdout + each.stderr
    assert "continues at step 2" in done[1].stderr and "continues at step 4" in done[3].stderr
    assert "http://***@127.0.0.1:9" in done[2].stderr and "nonsense://***@h/x?token=***" in done[3].stderr
    (tmp_path / "net.py").unlink()
    assert SECRET.encode() not in everything(tmp_path)
    with sqlite3.connect(tmp_path / "runs" / "mlflow.db") as database:
        (source,) = database.execute("select value from tags where key = 'metadist.command'").fetchone()
        assert "'model.password=***'" in source
        params = dict(database.execute("select key, value from params").fetchall())
        assert params["model.password"] == "***"


@pytest.mark.parametrize(
    "setting", ["tracking.uri=http://u:hunter2@h", "checkpoint.location=s3://k:hunter2@b/x?region=r"]
)
def test_an_address_saved_without_its_secret_is_not_used(tmp_path, setting):
    from metadist.run.api import train

    (tmp_path / "job.yaml").write_text(dump_config(load_config([], [*JOB, setting])))
    assert SECRET not in (tmp_path / "job.yaml").read_text()
    with pytest.raises(InputError, match="was saved without its secret: give that setting again"):
        train(load_config([tmp_path / "job.yaml"], [f"run_dir={tmp_path / 'run'}"]))


def test_what_a_run_makes_is_its_users_alone_to_read(tmp_path):
    os.chmod(tmp_path, 0o755)
    before = os.umask(0o022)
    try:
        command = [sys.executable, "-m", "metadist", "train", *JOB, "-q"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
        evaluate = [sys.executable, "-m", "metadist", "evaluate", "runs/one"]
        subprocess.run(evaluate, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    finally:
        os.umask(before)
    made = list((tmp_path / "runs").rglob("*"))
    assert {"config.yaml", "mlflow.db", "trainer.pt", "results.json", "evaluations"} <= {path.name for path in made}
    for path in made:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_options_of_models_and_learners_are_no_secrets():
    """What the mathematics depends on stays as it is, in the saved configuration too."""
    own = ["data.source=my:Source", "data.options={db_password: hidden}", "model.name=my:Net", "model.pool_token=cls"]
    config = load_config([], own)
    again = parse_config(dump_config(config), "a checkpoint")
    assert again.model.options == {"pool_token": "cls"} and again.data.options == {"db_password": "***"}
    with pytest.raises(InputError, match="db_password was saved without its secret: give that setting again"):
        call("my:Source", lambda db_password: None, again.data.options)
