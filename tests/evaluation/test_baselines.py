import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid

from metadist.core.task import Examples, Task
from metadist.evaluation.baselines import features, from_scratch, nearest_class_mean, ridge, support_mean
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
