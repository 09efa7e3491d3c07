"""The bandits' sources, baselines, figure and jobs, as a user has them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.kernel_ridge import KernelRidge

import metadist
from metadist import Draws, Examples, Task, TaskId
from metadist.data import importers, open_dataset
from metadist.learners import Fast
from metadist.models.bandit import greedy_doubly_robust
from tests.examples import bandits

JOBS = Path(__file__).resolve().parents[2] / "jobs" / "domains"
SHORT = [
    "meta_steps=2", "meta_batch_size=4", "evaluation.every=1", "evaluation.tasks=4", "evaluation.test_tasks=6",
    "fleet.backend=local", "tracking.mlflow=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def users():
    source = bandits.Users(0)
    return [source(TaskId("validation", 0, number)) for number in range(150)]


def rewards(task: Task, scores: np.ndarray) -> float:
    """The true expected reward of the arms with the largest scores."""
    return float(bandits.truth(task)[np.arange(len(scores)), scores.argmax(axis=1)].mean())


def test_actions_are_taken_as_often_as_their_propensities_say():
    """Of every arm the mean of [it was taken] / propensity is 1, and every arm is taken now and then."""
    draws, logits = Draws(0, TaskId("train", 0, 0)), np.tile([[2.0, 0.0, -3.0]], (20_000, 1))
    action, propensity = bandits.logged(draws, logits)
    for arm in range(3):
        assert (action == arm).mean() == pytest.approx(propensity[action == arm].mean(), abs=0.012)
        assert np.where(action == arm, 1 / propensity, 0).mean() == pytest.approx(1, abs=0.1)
        assert np.ptp(propensity[action == arm]) < 1e-12 and propensity.min() >= bandits.LEAST


def test_a_users_rewards_are_its_expected_ones_with_noise(users):
    left = np.concatenate([
        part.targets[2] - part.targets[3][np.arange(len(part.targets[0])), part.targets[0]]
        for task in users for part in task
    ])  # fmt: skip
    assert left.mean() == pytest.approx(0, abs=0.05) and left.std() == pytest.approx(bandits.NOISE, rel=0.03)
    assert [y.dtype for y in users[0].support.targets] == [np.int64, *[np.float32] * 3]


def test_bayes_is_the_posterior_mean_also_as_a_gaussian_process(users):
    """The same in function space: the kernel of two rounds is what the traits make of both."""
    mean, traits, _ = bandits.family()
    for task in users[:5]:
        x, action, reward = bandits.rounds(task.support)
        asked = bandits.rounds(task.query)[0]
        mine = np.stack([(traits[k][action] * x).sum(axis=1) for k in range(len(traits))], axis=1)
        gram = mine @ mine.T + bandits.NOISE**2 * np.eye(len(x))
        left = np.linalg.solve(gram, reward - (mean[action] * x).sum(axis=1))
        for arm in range(bandits.ARMS):
            theirs = np.stack([asked @ traits[k][arm] for k in range(len(traits))], axis=1)
            np.testing.assert_allclose(
                bandits.bayes(task)[:, arm], asked @ mean[arm] + theirs @ mine.T @ left, rtol=1e-5, atol=1e-5
            )


@pytest.mark.wide
def test_no_baseline_is_ahead_of_bayes_nor_bayes_of_the_truth(users):
    def worth(baseline):
        return np.array([rewards(task, baseline(task)) for task in users])

    best = worth(bandits.bayes)
    assert (worth(bandits.truth) >= best - 1e-6).all()
    for baseline in (
        bandits.ridge_per_user, bandits.ridge_towards_pooled, bandits.pooled_ridge, bandits.pooled_with_intercept,
        bandits.thompson,
    ):  # fmt: skip
        lead = best - worth(baseline)
        assert lead.mean() > 3 * lead.std() / np.sqrt(len(users)), baseline.__name__


def test_ridge_is_that_of_the_normal_equations(users):
    x, action, reward = bandits.rounds(users[0].support)
    found = bandits.fitted(x, action, reward, bandits.ARMS, 0.7)
    for arm in range(bandits.ARMS):
        mine = x[action == arm]
        expected = np.linalg.solve(mine.T @ mine + 0.7 * np.eye(x.shape[1]), mine.T @ reward[action == arm])
        np.testing.assert_allclose(found[arm], expected, atol=1e-10)


def test_kernel_ridge_is_scikit_learns():
    task = bandits.Classes(0)(TaskId("validation", 0, 0))
    x, action, reward = bandits.rounds(task.support)
    found = bandits.kernel_ridge(task)
    for arm in np.unique(action):
        model = KernelRidge(kernel="rbf", gamma=bandits.GAMMA).set_params(alpha=bandits.PENALTY)
        model.fit(x[action == arm], reward[action == arm] - 1 / 3)
        np.testing.assert_allclose(found[:, arm], 1 / 3 + model.predict(bandits.rounds(task.query)[0]), atol=1e-9)


def test_an_arm_without_rounds_has_the_reward_of_chance():
    task = bandits.Classes(0)(TaskId("validation", 0, 0))
    rows = task.support.targets[0] != 1
    rest = Examples(*(tuple(each[rows] for each in group) for group in task.support))
    np.testing.assert_array_equal(bandits.kernel_ridge(Task(rest, task.query))[:, 1], 1 / 3)


def test_under_the_familys_own_prior_the_posterior_is_bayes(users):
    mean, traits, _ = bandits.family()
    flat = traits.reshape(len(traits), -1)
    prior = bandits.Prior(mean.reshape(-1), flat.T @ flat, bandits.NOISE**2)
    for task in users[:5]:
        x, action, reward = bandits.rounds(task.support)
        weights, _ = bandits.posterior(prior, bandits.one_hot(x, action), reward)
        found = bandits.rounds(task.query)[0] @ weights.reshape(bandits.ARMS, -1).T
        np.testing.assert_allclose(found, bandits.bayes(task), atol=1e-8)


def test_the_fitted_prior_is_near_the_familys(users):
    """The mean within 3 standard errors of 400 users' mean; traits leave 3 directions in which users differ."""
    (mean, traits, _), prior = bandits.family(), bandits.fitted_prior()
    flat = traits.reshape(len(traits), -1)
    deviations = np.sqrt((flat**2).sum(axis=0).max() / bandits.TRAINING)
    assert np.abs(prior.mean - mean.reshape(-1)).max() < 3 * deviations
    found = np.linalg.eigvalsh(prior.covariance)[::-1]
    np.testing.assert_allclose(found[:3], np.linalg.eigvalsh(flat.T @ flat)[::-1][:3], rtol=0.2)
    assert found[3] < 0.1 and prior.noise == pytest.approx(bandits.NOISE**2, rel=0.06)


def test_empirical_bayes_is_close_to_bayes(users):
    lead = [rewards(task, bandits.bayes(task)) - rewards(task, bandits.empirical_bayes(task)) for task in users]
    assert abs(np.mean(lead)) < 0.02


def test_the_linear_model_is_linear():
    model = bandits.Linear(features=2, arms=3)
    model.weights.data = torch.tensor([0.1, 0.2, 0.3, 1.0, 2.0, 3.0, -1.0, 0.0, 1.0])
    found = model(torch.tensor([[2.0, 0.5]]))
    torch.testing.assert_close(found, torch.tensor([[0.1 + 2 - 0.5, 0.2 + 4, 0.3 + 6 + 0.5]]))


def test_classes_are_arms_of_which_the_right_one_pays():
    source = bandits.Classes(0, ways=3, shots=4, queries=6)
    taken, right = [], []
    for number in range(50):
        for part in source(TaskId("train", 0, number)):
            action, propensity, reward, truth = part.targets
            np.testing.assert_array_equal(truth.sum(axis=1), 1)
            np.testing.assert_array_equal(reward, truth[np.arange(len(action)), action])
            taken.append(np.eye(3)[action] / propensity[:, None])
            right.append(reward)
    np.testing.assert_allclose(np.concatenate(taken).mean(axis=0), 1, atol=0.15)
    assert 0.4 < np.concatenate(right).mean() < 0.7  # above chance: the logging policy leans to it


def test_the_figure_has_the_regret_of_each_policy(users):
    task = users[0].map(torch.from_numpy)
    learner = metadist.MAML(model=metadist.Model(bandits.Linear()), loss=torch.nn.functional.mse_loss)
    theta = learner.layout()
    best = Fast({"weights": torch.from_numpy(_least_squares(users[0])).float()}, {})
    drawn = bandits.regret(learner, theta, [Fast(theta, {}), best], task)
    assert isinstance(drawn, Figure)
    lines = {line.get_label(): np.asarray(line.get_ydata()) for line in drawn.axes[0].lines}
    assert list(lines) == ["logging policy", "ridge per user", "before adaptation", "after adaptation", "exact Bayes"]
    truth, action = users[0].query.targets[3], users[0].query.targets[0]
    lost = truth.max(axis=1) - truth[np.arange(len(action)), action]
    np.testing.assert_allclose(lines["logging policy"], np.cumsum(lost), rtol=1e-5)
    np.testing.assert_allclose(lines["before adaptation"], np.cumsum(truth.max(axis=1) - truth[:, 0]), rtol=1e-5)
    np.testing.assert_allclose(lines["after adaptation"], 0, atol=1e-5)


def test_the_figure_of_logs_has_what_each_policy_is_worth(users):
    """Before adaptation arm 0 is taken always, with estimates of 0; after it the best arm, with true estimates."""
    action, propensity, reward, truth = users[0].query.targets
    logs = Task(*(part._replace(targets=part.targets[:3]) for part in users[0]))
    learner = metadist.MAML(model=metadist.Model(bandits.Linear()), loss=torch.nn.functional.mse_loss)
    theta = learner.layout()
    best = Fast({"weights": torch.from_numpy(_least_squares(users[0])).float()}, {})
    drawn = bandits.values(learner, theta, [Fast(theta, {}), best], logs.map(torch.from_numpy))
    left, right = drawn.axes
    points = {
        label.get_text(): (line.get_children()[0].get_xdata()[0], line.get_children()[-1].get_segments()[0][:, 0])
        for label, line in zip(left.get_yticklabels(), left.containers, strict=True)
    }
    assert list(points) == [
        "logging policy", "ridge per user", "empirical bayes", "before adaptation", "after adaptation"
    ]  # fmt: skip
    zero = np.where(action == 0, reward / propensity, 0)
    arm = truth.argmax(axis=1)
    right_arm = truth.max(axis=1) + np.where(action == arm, (reward - truth.max(axis=1)) / propensity, 0)
    for name, each in (("logging policy", reward), ("before adaptation", zero), ("after adaptation", right_arm)):
        mean, interval = points[name]
        half = 1.96 * np.sqrt(each.var() / (len(each) - 1))
        np.testing.assert_allclose([mean, *interval], each.mean() + half * np.array([0, -1, 1]), rtol=1e-4)
    heights = np.array([bar.get_height() for bar in right.patches]).reshape(2, bandits.ARMS)
    np.testing.assert_array_equal(heights, [np.bincount(each, minlength=bandits.ARMS) for each in (action, arm)])


def test_what_rounds_say_of_a_policy_is_the_metric_of_the_job_on_average(users):
    scores = bandits.ridge_per_user(users[0])
    outputs, *targets = map(torch.from_numpy, (scores, *users[0].query.targets[:3]))
    found = bandits.round_values(scores, users[0].query).mean()
    assert found == pytest.approx(float(greedy_doubly_robust(outputs, *targets)), rel=1e-6)


def _least_squares(task: Task) -> np.ndarray:
    """The weights of `Linear` that give a user's true rewards."""
    x, truth = bandits.with_one(task.query.inputs[0]), task.query.targets[3]
    return np.linalg.lstsq(x, truth, rcond=None)[0].reshape(-1)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("bandit_users", "direct_method"),
        ("bandit_users", "weighted_regression"),
        ("bandit_digits", "inverse_propensity"),
    ],
)
def test_the_jobs_run_with_each_loss_and_draw_their_figure(tmp_path, monkeypatch, name, loss):
    monkeypatch.chdir(JOBS.parents[1])
    settings = [*SHORT, f"run_dir={tmp_path / 'run'}", f"loss=metadist.models.bandit:{loss}"]
    metadist.train(metadist.load_config([JOBS / f"{name}.yaml"], settings), quiet=True)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"reward", "snips", "doubly_robust"} <= results.keys() and "ridge_per_user" in results["baselines"]
    assert (tmp_path / "run" / "regret.png").exists()


def test_a_table_of_logs_is_imported_trained_on_and_asked(tmp_path, monkeypatch):
    """As the job's head says; the adapted policy takes rounds as the table has them."""
    monkeypatch.chdir(JOBS.parents[1])
    bandits.write_logs(tmp_path / "logs.csv", users=40)
    data = importers.table(
        tmp_path / "logs.csv", tmp_path / "data", group="user", inputs=["x=x1..x4"],
        targets=["action", "propensity", "reward"], integers=["action"],
    )  # fmt: skip
    assert [field.dtype for field in open_dataset(data).fields] == ["float64", "int64", "float64", "float64"]
    settings = [*SHORT, f"data.path={data}", f"run_dir={tmp_path / 'run'}"]
    metadist.train(metadist.load_config([JOBS / "bandit_logs.yaml"], settings), quiet=True)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["baselines"]) == ["empirical_bayes", "ridge_per_user", "ridge_towards_pooled"]
    assert "doubly_robust" in results and (tmp_path / "run" / "values.png").exists()
    task = bandits.Users(1)(TaskId("train", 0, 3))
    adapted = metadist.load(tmp_path / "run", trust_code=True).adapt(task.support.inputs[0], task.support.targets[:3])
    assert adapted.outputs(task.query.inputs[0]).shape == (40, bandits.ARMS)
