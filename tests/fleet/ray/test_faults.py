"""Faults on real Ray with several nodes, in a process of its own: the cluster needs settings of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "faults.py"


@pytest.mark.ray
@pytest.mark.timeout(400)
@pytest.mark.parametrize("fault", ["node killed, with results of a step", "worker stopped for a while"])
def test_a_run_ends_with_the_undisturbed_theta(fault):
    """The others take as long each: `python tests/benchmarks/faults.py` runs them all."""
    done = subprocess.run([sys.executable, str(SCRIPT), fault], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"| {fault} |" in done.stdout and "equal" in done.stdout
