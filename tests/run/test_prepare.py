import numpy as np
import pytest
from safetensors.numpy import save_file

from metadist.config import load_config
from metadist.core.errors import InputError
from metadist.core.task import Split
from metadist.run.build import Job
from metadist.run.prepare import prepare
from metadist.run.resume import open_job

JOB = [
    "data.family=digits", "task.ways=3", "task.shots=2", "task.queries=3", "model.name=mlp", "model.hidden=[8]",
    "meta_batch_size=2", "fleet.backend=local",
]  # fmt: skip
EVALUATED: list[Split] = ["test"]


def refusal(*overrides: str) -> str:
    with pytest.raises(InputError) as raised:
        prepare(Job(load_config([], [*JOB, *overrides])), EVALUATED)
    return str(raised.value)


@pytest.fixture
def own_model(tmp_path, monkeypatch):
    """A module of one's own that gives as many outputs as it is told."""
    (tmp_path / "tests_own_net.py").write_text(
        "from torch import nn\n\nclass Net(nn.Module):\n    def __init__(self, outputs: int):\n"
        "        super().__init__()\n        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))\n"
        "        self.head = nn.Linear(4, outputs)\n\n"
        "    def features(self, x):\n        return self.body(x)\n\n"
        "    def forward(self, x):\n        return self.head(self.features(x))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return ["model.hidden=null", "model.name=tests_own_net:Net"]


def test_a_model_with_too_few_outputs_is_told_in_numbers(own_model):
    sentence = "the model gives 2 outputs, 3 ways need 3"
    assert refusal(*own_model, "model.outputs=2").startswith(sentence)
    proto = [*own_model, "model.outputs=2", "learner.name=protonet"]
    assert refusal(*proto).startswith(sentence)  # trained from scratch, it needs them
    prepare(Job(load_config([], [*JOB, *proto, "evaluation.baselines=[]"])), EVALUATED)


def test_more_ways_than_outputs_name_what_can_take_them():
    said = refusal("task.ways=2", "evaluation.ways=3")
    assert "evaluation.ways=3 is more than the 2 outputs" in said and "(protonet, r2d2, protomaml)" in said
    prepare(Job(load_config([], [*JOB, "task.ways=2", "evaluation.ways=3", "learner.name=protonet"])), EVALUATED)


def test_initial_weights_that_are_not_finite_are_named(tmp_path):
    path = tmp_path / "w.safetensors"
    weights = {"body.0.weight": np.zeros((8, 64), np.float32), "body.0.bias": np.full(8, np.nan, np.float32)}
    save_file(weights | {"head.weight": np.zeros((3, 8), np.float32), "head.bias": np.zeros(3, np.float32)}, path)
    assert refusal(f"model.weights={path}").startswith("body.0.bias")


def test_a_misspelt_learner_is_told_before_an_unsuitable_baseline():
    assert "did you mean maml?" in refusal("learner.name=mamml", "evaluation.baselines=[ridge]")
    assert "ridge" in refusal("evaluation.baselines=[ridge]")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.name=conv", "model.name=conv is neither built in nor of the form module:attribute; did you"),
        ("learner.name=mmal", "learner.name=mmal is neither built in"),
        ("loss=nothing", "loss=nothing is neither built in"),
        ("model.widht=3", "model mlp has no option 'widht'"),
        ("learner.inner_rate=1", "learner maml has no option 'inner_rate'"),
        ("evaluation.metrics={f1: 'nowhere:f1'}", "nowhere:f1: No module named 'nowhere'"),
        ("evaluation.figures={own: 'nowhere:draw'}", "nowhere:draw: No module named 'nowhere'"),
        ("evaluation.baselines=['nowhere:own']", "nowhere:own: No module named 'nowhere'"),
    ],
)
def test_what_a_job_names_wrongly_is_told_when_it_is_opened_before_ray_is_started(setting, said):
    config = load_config([], [*JOB, setting, *(["evaluation.better=higher"] if "metrics" in setting else [])])
    with pytest.raises(InputError) as raised:
        open_job(config)
    assert said in str(raised.value)


OWN_PARTS = """
import torch
from torch import nn
from metadist.learners import MAML


class Net(nn.Module):
    def __init__(self, outputs: int = 3, change: str = ""):
        super().__init__()
        self.change, self.layer = change, nn.Linear(64, outputs)

    def forward(self, x):
        x = x.flatten(1)
        if self.change == "add":
            x += 1
        if self.change == "clamp":
            x.clamp_(-1, 1e-3)
        if self.change == "copy":
            x = x + 1
            x += 1
        return self.layer(x)


def loss(outputs, labels):
    labels.clamp_(max=1)
    return torch.nn.functional.cross_entropy(outputs, labels)


class Learner(MAML):
    def inner_loss(self, theta, fast, support, k):
        support.inputs[0].mul_(0.5)
        return super().inner_loss(theta, fast, support, k)
"""


@pytest.mark.parametrize("kind", ["loop", "vmap"])
@pytest.mark.parametrize(
    "own", [["model.change=add"], ["model.change=clamp"], ["loss=tests_own:loss"], ["learner.name=tests_own:Learner"]]
)
def test_what_changes_a_tasks_examples_in_place_is_refused(tmp_path, monkeypatch, kind, own):
    (tmp_path / "tests_own.py").write_text(OWN_PARTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    shared = ["model.hidden=null", "model.name=tests_own:Net", f"engine.kind={kind}"]
    said = refusal(*shared, *own)
    by_torch = "changes a weight, a buffer or its input in forward"  # which torch.func sees first
    assert "changes a task's examples in place (such as x += 1)" in said or (kind == "vmap" and by_torch in said)
    prepare(Job(load_config([], [*JOB, *shared, "model.change=copy"])), EVALUATED)
