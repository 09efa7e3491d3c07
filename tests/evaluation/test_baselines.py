import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import NearestCentroid
from sklearn.utils._openmp_helpers import _openmp_effective_n_threads
from threadpoolctl import threadpool_limits

from metadist.core.errors import InputError
from metadist.core.task import Examples, Task
from metadist.evaluation.baselines import (
    FITTING_NUMBERS,
    FITTING_TASKS,
    choose_baselines,
    features,
    fitted,
    from_scratch,
    logistic_regression,
    nearest_class_mean,
    pooled,
    ridge,
    support_mean,
    tfidf_logistic_regression,
)
from metadist.learners import MAML
from metadist.models import MLP, Model
from metadist.models.losses import accuracy, cross_entropy, mean_squared_error
from tests.learners.small import classification_task, regression_task, smooth_model


@pytest.mark.parametrize("shape", [(4,), (1, 3, 3)])
def test_nearest_class_mean_is_scikit_learns(shape):
    task = classification_task(1, ways=4, shape=shape, shots=3)
    x, query = task.support.inputs[0].reshape(12, -1), task.query.inputs[0].reshape(16, -1)
    expected = NearestCentroid().fit(x, task.support.targets[0]).predict(query)
    assert np.array_equal(nearest_class_mean(task).argmax(axis=1), expected)


def test_nearest_class_mean_is_minus_the_squared_distance():
    task = Task.of(np.array([[0.0, 0], [2, 0], [0, 3]]), np.array([0, 0, 1]), np.array([[1.0, 1]]), np.array([0]))
    assert nearest_class_mean(task).tolist() == [[-1, -5]]


@pytest.mark.parametrize("n", [3, 30])
def test_ridge_is_scikit_learns(n):
    draws = np.random.default_rng(0)
    x, y, query = draws.normal(size=(n, 5)) + 3, draws.normal(size=(n, 2)) + 1, draws.normal(size=(4, 5))
    expected = Ridge(alpha=1.0).fit(x, y).predict(query)
    assert np.allclose(ridge(Task.of(x, y, query, np.zeros((4, 2)))), expected, rtol=1e-9)


def test_support_mean_is_the_mean_target_of_every_field():
    task = Task(
        Examples((np.zeros((2, 3)),), (np.array([1.0, 3.0]), np.array([[0.0, 2.0], [2.0, 6.0]]))),
        Examples((np.zeros((4, 3)),), (np.zeros(4), np.zeros((4, 2)))),
    )
    assert support_mean(task).tolist() == [[2, 1, 4]] * 4


def test_tokens_with_a_mask_become_bags_of_words_of_unit_length():
    tokens = np.array([[7, 7, 2, 9], [2, 5, 5, 5], [9, 9, 9, 9]])
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    words = [2, 5, 7, 9]
    expected = np.array([[1, 0, 2, 0], [1, 0, 0, 0], [0, 0, 0, 0]]) / np.array([[5**0.5], [1], [1]])
    assert words == np.unique(tokens).tolist()
    assert np.allclose(features((tokens, mask)), expected)


def test_other_inputs_are_flattened_and_joined():
    image, number = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2), np.array([10, 20])
    joined = features((image, number))
    assert joined.dtype == np.float64 and joined.tolist() == [[0, 1, 2, 3, 10], [4, 5, 6, 7, 20]]


def test_bags_of_words_tell_intents_apart():
    tokens, mask = np.array([[1, 2, 3], [4, 5, 6]]), np.ones((2, 3), bool)
    support = Examples((tokens, mask), (np.array([0, 1]),))
    query = Examples((np.array([[4, 2, 6], [1, 9, 3]]), mask), (np.array([1, 0]),))
    assert nearest_class_mean(Task(support, query)).argmax(axis=1).tolist() == [1, 0]


def tensors(task: Task) -> Task:
    return task.map(lambda x: torch.as_tensor(x, dtype=torch.float32 if x.dtype == np.float64 else torch.int64))


def test_from_scratch_fits_a_separable_task():
    task = tensors(classification_task(1, ways=2, shape=(8,), shots=10))
    torch.manual_seed(0)
    learner = MAML(model=Model(MLP([[8]], 2, hidden=(16,))), loss=cross_entropy)
    outputs = [learner.model(from_scratch(learner, task, 100, lr), *task.query.inputs) for lr in (0.01, 0.01, 0.001)]
    assert float(accuracy(outputs[0], task.query.targets[0])) > 0.9
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_from_scratch_starts_from_the_models_own_initial_weights():
    """A network whose initialisation is part of its design (SIREN, LoRA) keeps it: one step of Adam moves each weight
    by the rate at most."""
    task, model = tensors(regression_task()), smooth_model()
    learner = MAML(model=model, loss=mean_squared_error)
    trained = from_scratch(learner, task, steps=1, lr=1e-3)
    moved = {name: (trained[name] - model.parameters[name]).abs().max() for name in trained}
    assert all(0 < moved[name] <= 1.001e-3 for name in moved)


def test_nearest_class_mean_never_predicts_a_class_without_examples():
    """Labels 1 and 3: classes 0 and 2 have no mean, the two others theirs."""
    support = np.array([[0.0, 0.0], [0.0, 2.0], [4.0, 0.0]])
    task = Task.of(
        support, np.array([1, 1, 3], np.uint8), np.array([[0.0, 0.0], [4.0, 1.0]]), np.array([1, 3], np.uint8)
    )
    logits = nearest_class_mean(task)
    assert logits.shape == (2, 4) and np.isfinite(logits).all()
    assert logits[:, [1, 3]].tolist() == [[-1.0, -16.0], [-16.0, -1.0]]
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    assert (shares[:, [0, 2]] == 0).all() and logits.argmax(axis=1).tolist() == [1, 3]


@pytest.mark.parametrize(("shape", "ways"), [((3,), 3), ((40,), 3), ((40,), 2), ((1, 6, 6), 4)])
def test_logistic_regression_is_scikit_learns_on_scaled_features(shape, ways):
    """More features than examples, too, where it is computed in the space of the examples."""
    training, task = (
        [classification_task(seed, ways, shape, shots=3) for seed in (1, 2)],
        classification_task(9, ways, shape),
    )
    seen = np.concatenate([part.inputs[0].reshape(len(part.inputs[0]), -1) for each in training for part in each])
    scale = seen.std(axis=0) if len(shape) == 1 else np.sqrt(seen.var(axis=0).mean())
    (support, query), labels = (
        (part.inputs[0].reshape(-1, seen.shape[1]) / scale for part in task),
        task.support.targets[0],
    )
    expected = LogisticRegression(tol=1e-8, max_iter=10_000).fit(support, labels)
    logits = logistic_regression(training)(task)
    assert np.array_equal(logits.argmax(axis=1), expected.predict(query))
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    assert np.allclose(shares / shares.sum(axis=1, keepdims=True), expected.predict_proba(query), atol=2e-3)


def test_the_unit_of_a_column_changes_no_logistic_regression():
    """Salaries beside ages: divided by their deviations in training."""
    unit = np.array([1.0, 1e-3, 1e5, 1.0])
    training, task = [classification_task(1), classification_task(2)], classification_task(3)
    other = [each.map(lambda x: x * unit if x.ndim == 2 else x) for each in (*training, task)]
    assert np.allclose(logistic_regression(training)(task), logistic_regression(other[:2])(other[2]), rtol=1e-6)


def texts(rows, labels):
    width = max(map(len, rows))
    tokens = np.array([[*row, *[0] * (width - len(row))] for row in rows])
    mask = np.array([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return Examples((tokens, mask), (np.array(labels),))


def test_tfidf_is_scikit_learns_with_document_frequencies_of_training():
    training = [Task(texts([[2, 3, 3], [2, 4]], [0, 1]), texts([[2, 5], [4, 4, 6]], [0, 1]))]
    task = Task(texts([[2, 2, 3], [4, 6, 2], [5, 5, 2]], [0, 1, 2]), texts([[3, 2], [6], [5, 2, 2]], [0, 1, 2]))
    vectors = TfidfVectorizer(analyzer=lambda row: row).fit([[2, 3, 3], [2, 4], [2, 5], [4, 4, 6]])
    fit = LogisticRegression(tol=1e-8).fit(vectors.transform([[2, 2, 3], [4, 6, 2], [5, 5, 2]]).toarray(), [0, 1, 2])
    expected = fit.predict_proba(vectors.transform([[3, 2], [6], [5, 2, 2]]).toarray())
    found = np.exp(tfidf_logistic_regression(training)(task))
    assert np.allclose(found / found.sum(axis=1, keepdims=True), expected, atol=1e-3)


def test_a_word_that_training_never_had_is_the_rarest():
    """Word 9 tells the classes apart, word 2 is in every text of training."""
    training = [Task(texts([[2, 3], [2, 4]], [0, 1]), texts([[2, 5], [2]], [0, 1]))]
    task = Task(texts([[2, 9], [2, 3]], [0, 1]), texts([[9, 2], [3, 2]], [0, 1]))
    assert tfidf_logistic_regression(training)(task).argmax(axis=1).tolist() == [0, 1]


def test_a_class_without_examples_never_wins_and_a_row_of_no_class_is_not_learned_from():
    support = np.array([[0.0, 0.0], [0.0, 2.0], [4.0, 0.0], [9.0, 9.0]])
    task = Task.of(support, np.array([1, 1, 3, -1]), np.array([[0.0, 0.0], [9.0, 0.0]]), np.array([1, 3]))
    logits = logistic_regression([task])(task)
    assert np.isfinite(logits).all() and logits.argmax(axis=1).tolist() == [1, 3]
    assert (logits[:, [0, 2]] < -1e300).all()
    lone = Task.of(support[:2], np.array([2, 2]), support, np.array([2, 0, 1, 2]))
    assert logistic_regression([lone])(lone).argmax(axis=1).tolist() == [2] * 4


def group(level: float, seed: int, n: int = 20) -> Task:
    """Targets of a group: a step in x, the same everywhere, above the group's own level."""
    x = np.random.default_rng(seed).uniform(-1, 1, size=(2 * n, 1))
    y = level + 3.0 * (x[:, 0] > 0)
    return Task.of(x[:n], y[:n], x[n:], y[n:])


def test_pooled_learns_what_groups_share_and_takes_their_level_from_the_support_set():
    task = group(level=50.0, seed=99, n=5)
    found = pooled([group(10.0 * seed, seed) for seed in range(30)])(task)
    assert found.shape == (5, 1) and np.abs(found[:, 0] - task.query.targets[0]).max() < 0.3
    assert np.abs(support_mean(task)[:, 0] - task.query.targets[0]).max() > 1


def test_pooled_has_trees_for_every_value_of_a_target():
    def both(task: Task) -> Task:
        return Task(*(part._replace(targets=(np.stack([part.targets[0], -part.targets[0]], axis=1),)) for part in task))

    task = both(group(level=-4.0, seed=99))
    found = pooled([both(group(0.0, seed)) for seed in range(30)])(task)
    assert np.abs(found - task.query.targets[0]).max() < 0.3


def user(seed: int, flipped: bool = False) -> Task:
    """Three labels of five support and five query rows each, told apart by a first column, the same for every user."""
    rng = np.random.default_rng(seed)
    labels = np.arange(3).repeat(5)
    support, query = (np.stack([labels + 0.1 * rng.normal(size=15), rng.normal(size=15)], axis=1) for _ in range(2))
    return Task.of(support, labels[::-1].copy() if flipped else labels, query, labels)


def test_pooled_of_labels_is_one_classifier_of_all_training_rows_whatever_the_support_set():
    training = [user(seed) for seed in range(20)]
    found = pooled(training)
    rows = np.concatenate([part.inputs[0] for task in training for part in task])
    labels = np.concatenate([part.targets[0] for task in training for part in task])
    expected = HistGradientBoostingClassifier(random_state=0).fit(rows, labels)
    logits = found(user(99))
    assert np.allclose(np.exp(logits), expected.predict_proba(user(99).query.inputs[0]), rtol=1e-9)
    assert np.array_equal(logits, found(user(99, flipped=True)))
    assert (logits.argmax(axis=1) == user(99).query.targets[0]).mean() > 0.9


def test_pooled_uses_one_thread_whatever_the_process_has(monkeypatch):
    threads = []

    def noted(kind, name):
        real = getattr(kind, name)

        def method(self, *arguments):
            threads.append(_openmp_effective_n_threads())
            return real(self, *arguments)

        monkeypatch.setattr(kind, name, method)

    for kind, names in ((HistGradientBoostingClassifier, ("fit", "predict_proba")),
                        (HistGradientBoostingRegressor, ("fit", "predict"))):  # fmt: skip
        for name in names:
            noted(kind, name)
    with threadpool_limits(2, user_api="openmp"):
        if _openmp_effective_n_threads() < 2:
            pytest.skip("one core")
        for make in (user, lambda seed: group(1.0, seed)):
            pooled([make(seed) for seed in range(3)])(make(9))
        assert threads == [1, 1, 1, 1, 1]  # of the regression support and query apart
        assert _openmp_effective_n_threads() == 2


def test_what_is_seen_of_training_is_limited_by_tasks_and_by_numbers():
    def seen(size: int) -> list[int]:
        asked: list[int] = []

        def training(index: int) -> Task:
            asked.append(index)
            return classification_task(index, ways=2, shape=(size,), shots=2)  # 10 examples

        fitted("logistic_regression", training)
        return asked

    assert seen(2) == list(range(FITTING_TASKS))
    assert seen(10_000) == list(range(FITTING_NUMBERS // 100_000))
    assert seen(FITTING_NUMBERS) == [0]


def test_baselines_are_chosen_by_the_kind_of_task():
    assert choose_baselines(None, True, True) == ["nearest_class_mean", "logistic_regression", "from_scratch"]
    assert choose_baselines(None, True, True, text=True)[1] == "tfidf_logistic_regression"
    assert choose_baselines(None, False, True) == ["support_mean", "ridge", "pooled", "joint", "from_scratch"]
    assert "pooled" not in choose_baselines(None, False, True, text=True)
    assert "pooled" not in choose_baselines(None, False, True, values=784)
    assert choose_baselines(["pooled"], False, True, values=784) == ["pooled"]
    with pytest.raises(InputError, match="tfidf_logistic_regression"):
        choose_baselines(["tfidf_logistic_regression"], True, True)


def test_pooled_is_chosen_for_labels_that_mean_the_same_in_every_task():
    shared = choose_baselines(None, True, True, values=4, shared_labels=True)
    assert shared == ["nearest_class_mean", "logistic_regression", "pooled", "from_scratch"]
    assert "pooled" not in choose_baselines(None, True, True, values=20, shared_labels=True)
    assert "pooled" not in choose_baselines(None, True, True, text=True, shared_labels=True)
    with pytest.raises(InputError, match="pooled does not suit classification without labels that mean the same"):
        choose_baselines(["pooled"], True, True)
    with pytest.raises(InputError, match="pooled does not suit texts"):
        choose_baselines(["pooled"], True, True, text=True, shared_labels=True)
