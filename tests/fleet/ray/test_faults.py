"""Faults on real Ray with several nodes, in a process of its own: the cluster needs settings of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "faults.py"


@pytest.mark.ray
@pytest.mark.wide
@pytest.mark.timeout(1800)
def test_after_every_fault_a_run_ends_with_the_undisturbed_theta():
    """A worker, a server and a driver that die on one node are in test_fleet.py and test_invariants.py."""
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("equal") >= 10
