"""The benchmark of peers: what its report says, and that the hand-written contenders compute the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.peer_environments import last_line
from tests.benchmarks.peer_report import comparisons, outliers

SCRIPTS = Path(__file__).parents[1] / "benchmarks" / "peer_scripts"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
INPUTS = """
import json, sys
from dataclasses import replace
from pathlib import Path
from workloads import WORKLOADS, write_inputs
workload = replace(next(each for each in WORKLOADS if each.name == sys.argv[1]), meta_batch=3)
write_inputs(workload, Path(sys.argv[2]))
print(json.dumps(workload.asdict()))
"""


def runs(name: str, rates: list[float], processes: int = 1, metadist: bool = False) -> list[dict]:
    """One a round, in the order of the rounds."""
    common = {"name": name, "processes": processes, "metadist": metadist}
    return [{**common, "round": turn, "tasks_per_s": rate} for turn, rate in enumerate(rates)]


def test_the_report_compares_speeds_of_the_same_round():
    chosen = {
        "loop": runs("loop", [10, 10, 10]),
        "JAX": runs("JAX", [100, 50, 200]),
        "metadist": runs("metadist", [30, 30, 30], processes=2, metadist=True),
        "metadist in one process": runs("metadist in one process", [50, 50, 50], metadist=True),
    }
    assert comparisons(chosen) == [
        "metadist in one process: 0.50 (0.25-1) times the speed of the fastest peer, JAX.",
        "metadist in one process: 2.00 (1-4) times the time that JAX takes.",
    ]
    del chosen["JAX"]
    assert comparisons(chosen) == ["metadist in one process: 5.00 (5-5) times the speed of the fastest peer, loop."]
    assert comparisons({"loop": chosen["loop"]}) == []


def test_who_computes_something_else_is_told_from_the_others():
    checks = {"a": (1.0, 2.0), "b": (1.0005, 2.0), "c": (1.0, 2.1)}
    found = [{"name": name, "check_loss": loss, "check_norm": norm} for name, (loss, norm) in checks.items()]
    assert list(outliers(found)) == ["c"]


def test_the_line_that_says_what_was_wrong_is_no_rule():
    assert last_line("Traceback\n  ValueError: no\n \n==========\n") == "ValueError: no"


@pytest.mark.wide
@pytest.mark.parametrize("workload", ["sinusoid", "conv4"])
def test_the_loop_under_torchrun_computes_what_the_loop_does(tmp_path, workload):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS)}

    def said_by(*command: str) -> dict:
        command = (sys.executable, *command)
        done = subprocess.run(command, env=environment, cwd=SCRIPTS, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    tasks = str(tmp_path / "tasks.npz")
    asked = ("--workload", json.dumps(said_by("-c", INPUTS, workload, tasks)), "--tasks", tasks, "--seconds", "0")
    alone, together = said_by("loop_maml.py", *asked), said_by(*TORCHRUN, "torchrun_loop.py", *asked)
    assert together["processes"] == 2
    assert together["check_loss"] == pytest.approx(alone["check_loss"], rel=1e-5)
    assert together["check_norm"] == pytest.approx(alone["check_norm"], rel=1e-5)
