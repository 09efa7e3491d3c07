"""What a chemist fits to the measured molecules of one target: baselines of a job, `Task -> values [n, 1]`.

A task's inputs are fingerprints and descriptors, as for the learner. The constants were chosen on validation tasks of
`jobs/domains/chembl_16.yaml` and `chembl_32.yaml`.
"""

from typing import NamedTuple

import numpy as np

from metadist import Task

NEIGHBOURS = 4
PENALTY, WEIGHT = 5.0, 0.5  # of ridge regression; of a descriptor beside a bit
NOISE, LEVEL = 0.02, 3.0  # variances, the Tanimoto kernel's is 1
TREES = 100


class Molecules(NamedTuple):
    """Fingerprints [n, bits] and descriptors [n, d], float64."""

    bits: np.ndarray
    descriptors: np.ndarray


def parts(task: Task) -> tuple[Molecules, Molecules, np.ndarray]:
    """Support and query molecules, and the values of the support set [n]."""
    support, query = (Molecules(*(x.astype(np.float64) for x in part.inputs)) for part in task)
    return support, query, task.support.targets[0].astype(np.float64).reshape(-1)


def tanimoto(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Fingerprints [n, d], [m, d] of 0 and 1 -> the share of the bits of either that both have [n, m]."""
    both = a @ b.T
    return both / np.maximum(a.sum(1)[:, None] + b.sum(1) - both, 1)


def fingerprint_ridge(task: Task) -> np.ndarray:
    """Ridge regression on fingerprints and descriptors, no penalty on the intercept."""
    support, query, values = parts(task)
    x, asked = (np.concatenate([each.bits, WEIGHT * each.descriptors], axis=1) for each in (support, query))
    center, level = x.mean(0), values.mean()
    kernel = (x - center) @ (x - center).T + PENALTY * np.eye(len(x))
    return (level + (asked - center) @ (x - center).T @ np.linalg.solve(kernel, values - level))[:, None]


def tanimoto_process(task: Task) -> np.ndarray:
    """Mean of a Gaussian process around the mean of the support set, whose kernel is Tanimoto's and a constant for the
    level of the target."""
    support, query, values = parts(task)
    kernel = tanimoto(support.bits, support.bits) + LEVEL + NOISE * np.eye(len(values))
    shares = np.linalg.solve(kernel, values - values.mean())
    return (values.mean() + (tanimoto(query.bits, support.bits) + LEVEL) @ shares)[:, None]


def random_forest(task: Task) -> np.ndarray:
    """100 trees (scikit-learn's) on fingerprints and descriptors."""
    from sklearn.ensemble import RandomForestRegressor

    support, query, values = parts(task)
    forest = RandomForestRegressor(TREES, max_features="sqrt", random_state=0, n_jobs=1)
    return forest.fit(np.hstack(support), values).predict(np.hstack(query))[:, None]


def nearest_neighbours(task: Task) -> np.ndarray:
    """Mean of the 4 molecules that are nearest by Tanimoto's similarity, weighted by it."""
    support, query, values = parts(task)
    similar = tanimoto(query.bits, support.bits)
    nearest = np.argsort(-similar, axis=1, kind="stable")[:, :NEIGHBOURS]
    weights = np.take_along_axis(similar, nearest, 1) + 1e-6
    return ((weights * values[nearest]).sum(1) / weights.sum(1))[:, None]
