"""The examples in docstrings of what users meet run as they stand."""

import doctest
from importlib import import_module

import pytest

NAMES = [
    *(f"metadist.{name}" for name in ("Engine", "Learner", "MAML", "Model")),
    *(f"metadist.models.losses.{name}" for name in ("cross_entropy", "mean_squared_error", "accuracy", "confidence")),
]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs(name):
    module, _, attribute = name.rpartition(".")
    found = getattr(import_module(module), attribute)
    tests = doctest.DocTestFinder(recurse=False).find(found, name)
    assert tests[0].examples
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(tests[0]).failed == 0
