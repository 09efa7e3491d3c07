import numpy as np
import pyarrow as pa
import pytest

from metadist.config import load_config
from metadist.core.errors import InputError
from metadist.core.messages import Weights
from metadist.evaluation.protocol import interval, summary, write_results
from metadist.fleet.local import LocalFleet
from metadist.run.build import Job


def test_interval_of_a_known_sample():
    """Four values of mean 2.5 and variance 5/3: the t quantile of three degrees of freedom is 3.18245."""
    mean, ci95 = interval(np.array([1.0, 2.0, 3.0, 4.0]))
    assert mean == 2.5
    assert ci95 == pytest.approx(3.18245 * (5 / 3) ** 0.5 / 2, rel=1e-5)


def test_one_task_has_no_interval():
    assert np.isnan(interval(np.array([1.0])).ci95)


def test_interval_covers_the_truth_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = [abs((found := interval(rng.normal(size=20))).mean) <= found.ci95 for _ in range(2000)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_summary_tells_curve_and_baselines():
    told = summary({"accuracy": np.array([[0.0, 1.0], [1.0, 1.0]]), "ridge/accuracy": np.array([0.5, 0.5])})
    assert [point["mean"] for point in told["accuracy"]["by_inner_step"]] == [0.5, 1.0]
    assert told["accuracy"]["before"]["mean"] == 0.5
    assert told["accuracy"]["after"]["mean"] == 1.0
    assert told["baselines"]["ridge"]["accuracy"]["mean"] == 0.5


def test_results_file_has_a_row_per_task_and_nulls_where_a_baseline_was_not_run(tmp_path):
    write_results({"loss": np.array([[1.0, 0.5], [2.0, 1.5]]), "joint/loss": np.array([3.0])}, tmp_path / "tasks.arrow")
    table = pa.ipc.open_file(tmp_path / "tasks.arrow").read_all()
    assert table.to_pydict() == {
        "task": [0, 1], "loss_after_0": [1.0, 2.0], "loss_after_1": [0.5, 1.5], "joint_loss": [3.0, None],
    }  # fmt: skip


def sinusoid(*overrides: str):
    job = ["data.family=sinusoid", "data.options={groups: [50, 5, 5], points: 30}", "task.shots=10", "task.queries=10"]
    config = load_config([], [*job, "model.name=mlp", "meta_batch_size=5", "fleet.backend=local", *overrides])
    return config, Job(config).shapes


def test_the_protocol_tells_the_learner_and_its_options_and_no_rate_that_is_not_used():
    config, shapes = sinusoid("learner.name=platipus", "learner.predicts=values", "learner.samples=3")
    told = Job(config, shapes).evaluation(Job(config, shapes).engine(), []).caption
    assert (told["learner"], told["samples"], told["predicts"], told["inner_lr"]) == ("platipus", 3, "values", 0.1)
    config, shapes = sinusoid("learner.name=r2d2")
    assert "inner_lr" not in Job(config, shapes).evaluation(Job(config, shapes).engine(), []).caption


def test_the_joint_baseline_is_measured_by_the_protocol_and_its_rate_told():
    few = ["evaluation.baselines=[joint]", "evaluation.joint_steps=5", "evaluation.test_tasks=4"]
    config, shapes = sinusoid("learner.name=anil", "evaluation.inner_steps=2", *few)
    engine, fleet = Job(config, shapes).engine(), LocalFleet(lambda: Job(config).worker())
    weights = Weights(0, engine.initial_theta().numpy())
    told, results = Job(config, shapes).evaluation(engine, ["joint"]).run(fleet, weights, lambda text: None)
    assert told["protocol"]["joint_inner_lr"] == 0.01
    assert results["joint/loss"].shape == results["loss"].shape == (4, 3)


def test_default_baselines_suit_the_task():
    assert Job(*sinusoid()).baselines() == ["support_mean", "ridge", "pooled", "joint", "from_scratch"]
    assert Job(*sinusoid("evaluation.baselines=[ridge]")).baselines() == ["ridge"]
    with pytest.raises(InputError, match="nearest_class_mean"):
        Job(*sinusoid("evaluation.baselines=[nearest_class_mean]")).baselines()


def test_from_scratch_is_of_its_tasks_alone_and_adapts_nothing_again():
    few = [
        "evaluation.test_tasks=5",
        "engine.chunk_size=2",
        "evaluation.baseline_tasks=3",
        "evaluation.scratch_steps=2",
    ]
    config, shapes = sinusoid(*few)
    engine, worker = Job(config, shapes).engine(), Job(config, shapes).worker()
    fleet, weights = LocalFleet(lambda: worker), Weights(0, engine.initial_theta().numpy())
    adapted, evaluate = [], worker.evaluator.engine.evaluate
    worker.evaluator.engine.evaluate = lambda theta, tasks, *own: (
        adapted.append(len(tasks)) or evaluate(theta, tasks, *own)
    )
    both = Job(config, shapes).evaluation(engine, ["ridge", "from_scratch"])
    _, results = both.run(fleet, weights, lambda text: None)
    assert adapted == [2, 2, 1]
    assert [len(results[name]) for name in ("loss", "ridge/loss", "from_scratch/loss")] == [5, 5, 3]
    _, alone = Job(config, shapes).evaluation(engine, ["from_scratch"]).run(fleet, weights, lambda text: None)
    assert alone.keys() == {"loss", "from_scratch/loss"}
    assert all(alone[name].tobytes() == results[name].tobytes() for name in alone)


def test_what_takes_long_is_told_with_how_much_of_it_is_done():
    few = ["evaluation.joint_steps=3", "evaluation.test_tasks=10", "engine.chunk_size=4", "evaluation.baseline_tasks=5"]
    config, shapes = sinusoid("evaluation.scratch_steps=1", *few)
    engine, fleet = Job(config, shapes).engine(), LocalFleet(lambda: Job(config).worker())
    weights, said, told = Weights(0, engine.initial_theta().numpy()), [], []
    evaluation = Job(config, shapes).evaluation(engine, ["ridge", "joint", "from_scratch"])
    evaluation.run(fleet, weights, said.append, lambda *each: told.append(each))
    assert {each for each in told if each[1]} >= {
        ("evaluated tasks", 8, 10), ("evaluated tasks", 10, 10), ("tasks trained from scratch", 4, 5),
        ("tasks trained from scratch", 5, 5), ("steps of the joint baseline", 1, 3),
        ("steps of the joint baseline", 3, 3),
    }  # fmt: skip
    assert "training from scratch on 5 of them (evaluation.baseline_tasks=0 leaves that out)" in said
    assert "(evaluation.baselines=[ridge,from_scratch] leaves it out)" in said[-1]
