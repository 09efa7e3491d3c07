"""What a job brings of its own to be judged by: metrics, a learner's measures, baselines, figures."""

import json
import re

import numpy as np
import pyarrow as pa
import pytest
import yaml

import metadist
from metadist.core.errors import InputError
from metadist.core.measure import Measure
from metadist.run.build import Job
from metadist.run.prepare import prepare
from metadist.run.status import status

MODULE = '''
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from metadist import MAML, Draws, Model, Task


class Lines:
    """y = slope * x, from three points, in float32."""

    outputs = 1

    def __init__(self, seed):
        self.seed = seed

    def __call__(self, task_id):
        draws = Draws(self.seed, task_id)
        slope = draws.uniform(1) + 1
        x = draws.uniform(6).reshape(6, 1) + 0.5
        x, y = x.astype(np.float32), (slope * x).astype(np.float32)
        return Task.of(x[:3], y[:3], x[3:], y[3:])


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x):
        return x * self.slope


def within_tenth(outputs, targets):
    return ((outputs - targets).abs() < 0.1).float().mean()


def known_slope(task):
    x, y = task.support.inputs[0], task.support.targets[0]
    return task.query.inputs[0] * (y / x).mean()


def of_each(outputs, targets):
    return (outputs - targets).abs()


def failing(outputs, targets):
    return {}["price"]


def rounded(outputs, targets):
    return (outputs - targets).abs().mean().item()


def zero_one(outputs, targets):
    return ((outputs - targets).abs() > 0.1).float().mean()


def flat(task):
    return known_slope(task)[:, 0]


def nothing_given(task):
    return None


def two_apart(task):
    return {"closeness": -2.0}


def nothing_of_it(task):
    return {"loss": 1.0}


def drawn(learner, theta, fasts, task):
    from matplotlib.figure import Figure

    figure = Figure()
    slopes = [float(fast.weights["slope"]) for fast in fasts]
    assert len(slopes) == learner.inner_steps + 1 and slopes[0] == float(theta["slope"]) != slopes[-1]
    figure.subplots().plot(slopes)
    return figure


def late(learner, theta, fasts, task):
    return {}["slope"]


def without_symbols(learner, theta, fasts, task):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().set_title("a $\\\\nothing$")
    return figure


def no_figure(learner, theta, fasts, task):
    return "a picture"


@dataclass(frozen=True, kw_only=True)
class Judged(MAML):
    """Judged by minus the distance of its slope to the task's."""

    measures = {"closeness": "higher", "slope": "lower"}

    def measure(self, theta, fast, query):
        slope = (query.targets[0] / query.inputs[0]).mean()
        return {"closeness": -(fast.weights["slope"] - slope).abs().sum(), "slope": fast.weights["slope"].sum()}


@dataclass(frozen=True, kw_only=True)
class Unlabelled(Judged):
    """Takes the slope from the inputs themselves, so that the model cannot be called with these."""

    def inner_loss(self, theta, fast, support, k):
        return (fast.weights["slope"] - support.inputs[0].mean()).square().sum()

    def outer_loss(self, theta, fast, query, context):
        return (fast.weights["slope"] - query.inputs[0].mean()).square().sum()

    def measure(self, theta, fast, query):
        slope = fast.weights["slope"].sum()
        return {"closeness": -(slope - query.inputs[0].mean()).abs(), "slope": slope}

    def check(self, theta, task):
        assert theta["slope"].shape == (1,)


class Slopes:
    """A task is a slope, of which support and query set have four noisy values each, without targets."""

    outputs = 1

    def __init__(self, seed):
        self.seed = seed

    def __call__(self, task_id):
        from metadist import Examples

        draws = Draws(self.seed, task_id)
        x = (1 + draws.uniform(1) + 0.1 * draws.normal(8)).astype(np.float32).reshape(8, 1)
        return Task(Examples((x[:4],), ()), Examples((x[4:],), ()))


class NotCalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([0.5]))

    def forward(self, *inputs):
        raise RuntimeError("this model is not called with a task's inputs")
'''
JOB = {
    "run_dir": "runs/job", "data": {"source": "judged_own:Lines"}, "model": {"name": "judged_own:Slope"},
    "meta_steps": 4, "meta_lr": 0.1, "meta_batch_size": 4, "learner": {"inner_lr": 0.2, "inner_steps": 2},
    "fleet": {"backend": "local"}, "evaluation": {"every": 2, "tasks": 4, "test_tasks": 6},
    "tracking": {"mlflow": False},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "judged_own.py").write_text(MODULE)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def train(*overrides):
    return metadist.train(metadist.load_config(["job.yaml"], list(overrides)), quiet=True)


OWN = ["evaluation.metrics={within: 'judged_own:within_tenth'}", "evaluation.better=higher"]


def test_metrics_of_the_users_own_decide_what_is_best(folder):
    results = train(*OWN, "evaluation.baselines=[initial,ridge,'judged_own:known_slope']")
    assert Measure.of(results) == Measure("within", "higher") and set(results) > {"within", "loss"}
    assert results["baselines"]["known_slope"]["within"]["mean"] == 1
    assert "its best baseline, known slope" in results["verdict"] and not results["verdict"].startswith("ahead")
    assert len(results["baselines"]["initial"]["within"]) == 3
    assert all(Measure.is_taken(key) for key in results.keys() - {"within", "loss"})
    rows = [json.loads(line) for line in (folder / "runs/job/metrics.jsonl").read_text().splitlines()]
    validated = {row["step"]: row["validation/within"] for row in rows if "validation/within" in row}
    found = status(folder / "runs/job")
    assert (found["metric"], found["best"]) == ("within", max(validated.values()))
    assert [row["test/within"] for row in rows if "test/within" in row] == [results["within"]["after"]["mean"]]


def test_the_side_decides(folder):
    """Of a rising metric the first validation is the best where lower is better."""
    low = train(*OWN[:1], "evaluation.better=lower", "run_dir=runs/low", "evaluation.baselines=[]", "meta_steps=6")
    high = train(*OWN, "run_dir=runs/high", "evaluation.baselines=[]", "meta_steps=6")
    assert low["evaluated_step"] == 2 < high["evaluated_step"] and low["theta_sha256"] == high["theta_sha256"]


def test_initial_is_the_learner_before_training(folder):
    results = train("evaluation.baselines=[initial]", "meta_steps=1", "meta_lr=1e-30")
    initial, own = results["baselines"]["initial"]["loss"], results["loss"]["by_inner_step"]
    assert [each["mean"] for each in initial] == pytest.approx([each["mean"] for each in own])


@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_a_learner_is_judged_by_its_own_measures(folder, kind):
    more = ["learner.name=judged_own:Judged", "evaluation.joint_steps=3", f"engine.kind={kind}"]
    results = train(*more, "evaluation.baselines=[initial,joint,'judged_own:two_apart']")
    assert Measure.of(results) == Measure("closeness", "higher") and "loss" not in results
    table = pa.ipc.open_file(folder / "runs/job/tasks.arrow").read_all().to_pydict()
    run, tasks = metadist.load("runs/job", trust_code=True), [judged_lines(folder, index) for index in range(6)]
    for index, (slope, task) in enumerate(tasks):
        predict = run.adapt(task.support.inputs[0], task.support.targets[0]).predict
        found = predict(np.ones((1, 1), np.float32))[0, 0]
        assert table["slope_after_2"][index] == pytest.approx(found, rel=1e-6)
        assert table["closeness_after_2"][index] == pytest.approx(-abs(found - slope), abs=1e-6)
    assert results["baselines"]["two_apart"]["closeness"]["mean"] == -2
    assert len(results["baselines"]["joint"]["closeness"]) == 3
    leads = {name: own["closeness"] for name, own in results["baselines"].items()}
    best = max(
        leads, key=lambda name: leads[name][-1]["mean"] if isinstance(leads[name], list) else leads[name]["mean"]
    )
    assert f"its best baseline, {best.replace('_', ' ')}" in results["verdict"]


def judged_lines(folder, index):
    import judged_own

    from metadist.core.task import TaskId

    task = judged_own.Lines(0)(TaskId("test", 0, index))
    return float((task.query.targets[0] / task.query.inputs[0]).mean()), task


def test_tasks_without_targets_and_a_model_that_takes_no_inputs_are_trained_on(folder):
    own = ["data.source=judged_own:Slopes", "model.name=judged_own:NotCalled", "learner.name=judged_own:Unlabelled"]
    results = train(*own, "evaluation.joint_steps=2", "meta_steps=30")
    assert list(results["baselines"]) == ["initial", "joint"]
    after, before = (results["closeness"][when]["mean"] for when in ("after", "before"))
    assert before < after < 0


def test_figures_of_the_users_own_are_drawn_beside_the_results(folder):
    results = train("evaluation.figures={slopes: 'judged_own:drawn'}", "evaluation.baselines=[]")
    assert results["figures"] == ["slopes.png"] and (folder / "runs/job/slopes.png").exists()


def test_a_figure_that_matplotlib_cannot_write_is_named_before_the_run(folder, figures):
    with pytest.raises(InputError, match="figures.a=judged_own:without_symbols fails .ValueError: .*Unknown symbol"):
        train("evaluation.figures={a: 'judged_own:without_symbols'}", "evaluation.baselines=[]")
    assert not (folder / "runs" / "job" / "metrics.jsonl").exists()


LOW = "evaluation.better=lower"


@pytest.mark.parametrize(("overrides", "sentence"), [
    (OWN[:1], "need evaluation.better=higher or =lower"),
    (OWN[1:], "better is about metrics of your own, and there are none"),
    (["evaluation.metrics={loss: 'judged_own:within_tenth'}", "evaluation.better=lower"], "loss is metadist's own"),
    (["evaluation.metrics={verdict: 'judged_own:within_tenth'}", LOW], "or another of its results"),
    (["evaluation.metrics={a: 'judged_own:of_each'}", LOW], "a gave a tensor [3, 1]: it must give"),
    (["evaluation.metrics={a: 'judged_own:failing'}", LOW], "metrics.a fails (KeyError: 'price')"),
    (["evaluation.metrics={a: 'judged_own:rounded'}", "evaluation.better=lower", "engine.kind=loop"], "a gave a float"),
    (["learner.adapted='slope, hed.*'"], "'hed.*' matches no parameter"),
    (["evaluation.baselines=['judged_own:ridge']"], "is called like a baseline of metadist's own"),
    (["evaluation.baselines=['judged_own:flat']"], "gave outputs of shape [3], and the model's are [3, 1]"),
    (["evaluation.baselines=['judged_own:nothing_given']"], "baseline nothing_given gave a NoneType: give an array"),
    (["evaluation.metrics={a: within_tenth}", "evaluation.better=lower"], "evaluation.metrics.a='within_tenth'"),
    (["evaluation.metrics={a: 'judged_own:nothing'}", "evaluation.better=lower"], "has no 'nothing'"),
    (["evaluation.figures={task: 'judged_own:drawn'}"], "task.png is a figure of metadist's own"),
    (["evaluation.figures={a: 'judged_own:no_figure'}"],
     "evaluation.figures.a=judged_own:no_figure gave a str: it must give a Figure"),
    (["evaluation.figures={a: 'judged_own:late'}"],
     "evaluation.figures.a=judged_own:late fails (KeyError: 'slope'): it is called with the learner, theta by name, "
     "the 3 fast weights"),
    (["evaluation.baselines=['judged_own:two_apart','other:two_apart']"], "baselines has two_apart twice"),
    (["evaluation.baselines=[nearest_class_mean]"], "does not suit regression"),
    ([*OWN, "learner.name=judged_own:Judged"], "is judged by its own measures"),
    (["learner.name=judged_own:Judged", "evaluation.baselines=[ridge]"], "ridge predicts targets"),
    (["learner.name=judged_own:Judged", "evaluation.baselines=['judged_own:nothing_of_it']"], "'closeness'"),
    (["learner.name=judged_own:Judged", "task.steps_per_round=2"], "task.steps_per_round: learner"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_run(folder, overrides, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        train(*overrides)
    assert not (folder / "runs" / "job" / "metrics.jsonl").exists()


def test_a_run_that_names_such_code_is_followed_by_those_who_trust_it(folder):
    config = metadist.load_config(["job.yaml"], [*OWN, "evaluation.baselines=[]"])
    metadist.train(config, quiet=True)
    saved = metadist.load_config(["runs/job/config.yaml"])
    with pytest.raises(InputError, match="names the code of judged_own .*evaluation.metrics.within"):
        metadist.evaluate(saved, "runs/job", say=lambda text: None)
    results = metadist.evaluate(saved, "runs/job", say=lambda text: None, trust_code=True)
    assert Measure.of(results).name == "within"


def test_a_run_goes_on_by_the_measure_that_its_best_checkpoint_is_of(folder):
    train(*OWN, "meta_steps=2", "evaluation.baselines=[]")
    config = metadist.load_config(["job.yaml"], ["evaluation.baselines=[]"])
    with pytest.raises(InputError, match="judged by within .higher is better. so far"):
        metadist.train(config, resume="auto", quiet=True)
    config = metadist.load_config(["job.yaml"], [*OWN, "evaluation.baselines=[]"])
    assert metadist.train(config, resume="auto", quiet=True)["meta_steps"] == 4


def test_outputs_that_are_not_finite_have_no_figure_whatever_a_metric_makes_of_them(folder):
    """Of NaN a comparison is False, so that none would be off by more than a tenth."""
    misses = ["evaluation.metrics={miss: 'judged_own:zero_one'}", "evaluation.better=lower"]
    results = train(*misses, "evaluation.baselines=[ridge]", "evaluation.inner_lr=1e30", "evaluation.inner_steps=3")
    assert results["diverged_tasks"] == 6 and results["verdict"] == "no verdict, since tasks diverged"
    assert results["miss"]["after"]["diverged_tasks"] == 6


def test_metrics_that_are_given_again_take_the_place_of_those_before(folder):
    (folder / "more.yaml").write_text("evaluation: {metrics: {a: 'x:a', b: 'x:b'}, better: higher}\n")
    again = ["evaluation.metrics.c=x:c", "evaluation.metrics.d=x:d"]
    assert list(metadist.load_config(["job.yaml", "more.yaml"], again).evaluation.metrics) == ["c", "d"]
    assert list(metadist.load_config(["job.yaml", "more.yaml"]).evaluation.metrics) == ["a", "b"]


def test_a_loss_without_derivative_is_noted(folder):
    config = metadist.load_config(["job.yaml"], ["loss=judged_own:zero_one", "evaluation.baselines=[]"])
    assert any("exactly zero" in note for note in prepare(Job(config), ["test"]).notes)
    config = metadist.load_config(["job.yaml"], ["evaluation.baselines=[]"])
    assert not any("exactly zero" in note for note in prepare(Job(config), ["test"]).notes)
