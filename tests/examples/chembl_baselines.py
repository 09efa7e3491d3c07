"""What a chemist fits to a target's measured molecules, on fingerprints, each a baseline of a job: `Task -> values`.

Their constants were chosen on validation tasks of `jobs/domains/chembl_16.yaml` and `chembl_32.yaml`, like the
learner's.
"""

import numpy as np

from metadist import Task

RIDGE = 5.0
NEIGHBOURS = 5
NOISE, LEVEL = 0.05, 1.0
TREES = 200


def features(task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fingerprints of the support set [n, d] and the query set [m, d], and the values of the support set [n]."""
    support, query = (part.inputs[0].astype(np.float64) for part in task)
    return support, query, task.support.targets[0].astype(np.float64).reshape(-1)


def tanimoto(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Fingerprints [n, d], [m, d] -> [n, m]: a.b / (a.a + b.b - a.b), which of bits is the share of those of either
    that are in both; 0 of two without any (Ralaivola et al. 2005; of counts likewise a kernel)."""
    products = a @ b.T
    either = (a * a).sum(1)[:, None] + (b * b).sum(1) - products
    return products / np.maximum(either, 1e-12)


def ridge(task: Task) -> np.ndarray:
    """Ridge regression, none on the intercept."""
    support, query, values = features(task)
    center, level = support.mean(0), values.mean()
    kernel = (support - center) @ (support - center).T + RIDGE * np.eye(len(support))
    found = (query - center) @ (support - center).T @ np.linalg.solve(kernel, values - level)
    return (level + found)[:, None]


def tanimoto_gp(task: Task) -> np.ndarray:
    """Mean of a Gaussian process with the Tanimoto kernel, and a constant one for the level of the target, around the
    mean of the support set; all variances as shares of the Tanimoto kernel's."""
    support, query, values = features(task)
    kernel = tanimoto(support, support) + LEVEL + NOISE * np.eye(len(support))
    found = (tanimoto(query, support) + LEVEL) @ np.linalg.solve(kernel, values - values.mean())
    return (values.mean() + found)[:, None]


def random_forest(task: Task) -> np.ndarray:
    """scikit-learn's, of 200 trees."""
    from sklearn.ensemble import RandomForestRegressor

    support, query, values = features(task)
    forest = RandomForestRegressor(TREES, max_features="sqrt", random_state=0, n_jobs=1)
    return forest.fit(support, values).predict(query)[:, None]


def nearest_neighbours(task: Task) -> np.ndarray:
    """Mean of the 5 most similar molecules, weighted by their Tanimoto similarity."""
    support, query, values = features(task)
    similar = tanimoto(query, support)
    nearest = np.argsort(-similar, axis=1, kind="stable")[:, :NEIGHBOURS]
    weights = np.take_along_axis(similar, nearest, 1) + 1e-6
    return ((weights * values[nearest]).sum(1) / weights.sum(1))[:, None]
