import json
import sys

import numpy as np
import pytest

import metadist
from metadist.config import Config, load_config
from metadist.core.errors import EvaluationFailed, InputError, Interrupted
from metadist.run import api as run
from metadist.run import preflight as checks
from metadist.run.api import dry_run, train
from metadist.run.build import Job
from metadist.run.evaluate import evaluate
from metadist.run.preflight import with_evaluation_tried, with_gradient_checked
from metadist.run.prepare import Prepared, prepare

JOB = [
    "data.family=digits", "task.ways=3", "task.shots=2", "task.queries=3", "meta_steps=2", "meta_batch_size=2",
    "num_workers=1", "fleet.backend=local", "tracking.mlflow=false", "evaluation.every=0", "evaluation.test_tasks=3",
    "evaluation.baseline_tasks=1",
]  # fmt: skip
MODULE = '''
import os

import torch
import torch.nn.functional as F
from dataclasses import dataclass
from torch import nn

from metadist import MAML
from metadist.models.losses import cross_entropy


class Net(nn.Module):
    def __init__(self, outputs: int = 3):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 6)), nn.Linear(6, outputs)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


class Hidden(Net):
    """Its body is hidden from autograd half of the time."""

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.head((h + h.detach()) / 2)


class Clipped(Net):
    """Clips its weights by hand, which does nothing while they are small."""

    def forward(self, x):
        self.head.weight.data.clamp_(-1, 1)
        return super().forward(x)


class Lazy(nn.Module):
    def __init__(self, outputs: int = 3):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(outputs))

    def forward(self, x):
        return self.layers(x)


class Pair(Net):
    def forward(self, x):
        return super().forward(x), x


class Named(Net):
    def forward(self, x):
        return {"logits": super().forward(x)}


class Double(Net):
    """Is never computed in float64."""

    def forward(self, x):
        assert x.dtype == torch.float32
        return super().forward(x)


def of_pair(outputs, target):
    return F.cross_entropy(outputs[0], target)


def only_in_training(outputs, target):
    """As a loss that was written for the numbers of examples in training."""
    return cross_entropy(outputs, target) * {6: 1.0, 9: 1.0}[len(target)]


def breaks_later(outputs, target):
    """A loss that fails from a moment on: as a licence server, a file or a package may."""
    if os.path.exists("gone"):
        raise OSError("the label server is gone")
    return cross_entropy(outputs, target)


@dataclass(frozen=True, kw_only=True)
class Surrogate(MAML):
    """An outer loss whose value and derivative are not of the same thing, on purpose."""

    def outer_loss(self, theta, fast, query, context):
        loss = super().outer_loss(theta, fast, query, context)
        return loss - loss.detach() + 5 * (loss.detach() - 1) ** 2
'''


@pytest.fixture(autouse=True)
def own_code(tmp_path, monkeypatch):
    (tmp_path / "tests_tried.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def job(*overrides: str, model: str = "Net") -> Config:
    own = [f"model.name=tests_tried:{model}"] if model else ["model.name=mlp", "model.hidden=[8]"]
    return load_config([], [*JOB, *own, "run_dir=run", *overrides])


def tried(config: Config) -> Prepared:
    return with_evaluation_tried(with_gradient_checked(prepare(Job(config), ["test"])))


def test_a_right_gradient_is_told_with_its_cost():
    assert tried(job()).gradient.startswith("agrees with finite differences to ")
    assert tried(job()).gradient.endswith(" s)") and not [note for note in tried(job()).notes if "gradient" in note]
    assert dry_run(job())["meta_gradient"].startswith("agrees")


def test_a_wrong_gradient_is_refused_by_the_tensors_name_unless_it_is_meant():
    with pytest.raises(InputError, match=r"'(body.1|head).\w+' .*finite differences") as raised:
        tried(job(model="Hidden"))
    assert "engine.gradient_check=false" in str(raised.value)
    assert tried(job("engine.gradient_check=false", model="Hidden")).gradient.startswith("not checked")
    with pytest.raises(InputError, match="finite differences"):  # also where first derivatives are used
        tried(job("learner.first_order=true", model="Hidden"))


def test_a_surrogate_loss_of_the_users_own_is_told_not_refused():
    found = tried(job("learner.name=tests_tried:Surrogate"))
    assert "is not the derivative of its outer loss" in found.gradient and found.gradient in found.notes
    with pytest.raises(InputError, match="meta-gradient"):  # which does not hide what is wrong below it
        tried(job("learner.name=tests_tried:Surrogate", model="Hidden"))


def test_what_cannot_be_computed_in_float64_is_told():
    found = tried(job(model="Double"))
    assert found.gradient.startswith("not checked: the model (Double) cannot be computed in float64") and found.notes


@pytest.mark.parametrize(("model", "loss", "said"), [
    ("Pair", "auto", "tuple"),
    ("Named", "auto", "dict of logits"),
    ("Pair", "tests_tried:of_pair", "tuple"),
])  # fmt: skip
def test_outputs_that_are_no_tensor_are_refused_before_training(model, loss, said):
    for transductive in ("true", "false"):
        with pytest.raises(InputError, match=said):
            tried(job(f"loss={loss}", f"evaluation.transductive={transductive}", model=model))


def test_a_loss_that_fails_in_evaluation_alone_is_found_before_training():
    config = job("loss=tests_tried:only_in_training", "evaluation.queries=4")
    with pytest.raises(InputError, match="KeyError: 12"):
        train(config, quiet=True)


SOURCE = '''
import numpy as np
from torch import nn

from metadist import Draws, Task


class Growing:
    """Support examples are shorter than queries."""

    outputs = 1

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, task_id):
        draws = Draws(self.seed, task_id)
        parts = [draws.uniform(4 * n).reshape(4, n).astype(np.float32) for n in (2, 1, 3, 1)]
        return Task.of(*parts)


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x):
        return self.layer(x.mean(dim=1, keepdim=True))
'''


def test_a_baseline_that_cannot_be_computed_is_left_out_with_a_note_or_refused_where_it_was_asked_for(tmp_path):
    (tmp_path / "tests_growing.py").write_text(SOURCE)
    own = ["data.family=null", "data.source=tests_growing:Growing", "model.name=tests_growing:Mean", "run_dir=run"]
    found = tried(load_config([], [*JOB, *own]))
    assert list(found.baselines) == ["support_mean", "joint", "from_scratch"]
    left_out = [note.partition(",")[0] for note in found.notes]
    assert left_out == ["baseline ridge is left out", "baseline pooled is left out"]
    with pytest.raises(InputError, match="evaluation.baselines.*ridge"):
        tried(load_config([], [*JOB, *own, "evaluation.baselines=[ridge]"]))


def test_a_loss_of_ones_own_for_values_gets_no_baselines_unless_they_are_asked_for():
    own = [
        "data.family=sinusoid",
        "data.options={groups: [5, 2, 2]}",
        "model.name=mlp",
        "loss=torch.nn.functional:l1_loss",
    ]
    assert prepare(Job(load_config([], [*JOB, *own])), ["test"]).baselines == []
    some = prepare(Job(load_config([], [*JOB, *own, "evaluation.baselines=[support_mean]"])), ["test"])
    assert some.baselines == ["support_mean"]


def test_a_run_whose_evaluation_fails_all_the_same_is_saved_and_says_how_to_go_on(tmp_path, monkeypatch):
    config = job("loss=tests_tried:breaks_later")
    own = run.conclude
    monkeypatch.setattr(run, "conclude", lambda *given: ((tmp_path / "gone").touch(), own(*given))[1])
    with pytest.raises(EvaluationFailed, match="the label server is gone"):
        train(config, quiet=True)
    told = json.loads((tmp_path / "run" / "results.json").read_text())
    assert told["meta_steps"] == 2 and "the label server is gone" in told["evaluation_failed"]
    (tmp_path / "gone").unlink()
    saved = load_config([tmp_path / "run" / "config.yaml"])
    finished = evaluate(saved, tmp_path / "run", say=lambda text: None, trust_code=True)
    assert finished["evaluated_theta_sha256"] == told["theta_sha256"]


def test_weights_that_forward_would_clip_later_are_refused_at_the_start():
    with pytest.raises(InputError, match="'head.weight'"):
        prepare(Job(job(model="Clipped")), ["test"])


def test_lazy_layers_get_their_weights_from_the_data_at_hand(tmp_path):
    told = [train(job(f"run_dir=run{n}", model="Lazy"), quiet=True)["theta_sha256"] for n in range(2)]
    assert told[0] == told[1]
    learner = metadist.load(tmp_path / "run0", trust_code=True)
    assert learner.engine.layout.shapes[0] == (5, 64)
    assert learner.adapt(np.zeros((3, 1, 8, 8)), np.arange(3)).predict(np.zeros((2, 1, 8, 8))).shape == (2,)


def test_chance_of_the_models_own_is_found_before_any_worker_is_started(tmp_path):
    (tmp_path / "tests_tried.py").write_text(MODULE.replace("torch.tanh(self.body(x))", "F.dropout(self.body(x), 0.5)"))
    sys.modules.pop("tests_tried", None)
    for kind in ("loop", "vmap"):
        with pytest.raises(InputError, match="nn.Dropout"):
            prepare(Job(job(f"engine.kind={kind}")), ["test"])
    sys.modules.pop("tests_tried", None)


def test_a_signal_during_the_checks_ends_them_and_is_no_failure_of_the_job(tmp_path, monkeypatch):
    (tmp_path / "tests_stopped.py").write_text(
        "from metadist import Interrupted\n\n\ndef loss(outputs, targets):\n    raise Interrupted(15)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Interrupted) as stopped:
        train(job("loss=tests_stopped:loss"), quiet=True)
    assert stopped.value.signal_number == 15


def test_a_check_that_takes_long_is_told_and_how_to_leave_it_out(monkeypatch):
    monkeypatch.setattr(checks, "SLOW_S", 0.0)
    said: list[str] = []
    checks.preflight(Job(load_config([], [*JOB, "model.name=mlp"])), ["test"], gradient=True, say=said.append)
    assert [text.split()[0] for text in said] == ["reading", "comparing", "trying"]
    assert "engine.gradient_check=false" in said[1]
    monkeypatch.setattr(checks, "SLOW_S", 60.0)
    with checks.said_if_slow("nothing slow", said.append):
        pass
    assert len(said) == 3


def test_what_the_first_meta_step_waits_for_is_told():
    assert run.first_steps(load_config([], JOB)) == []
    (line,) = run.first_steps(load_config([], [*JOB, "engine.compile=true"]))
    assert "compiles" in line and "engine.compile=false" in line
