"""The scaling benchmark: its cost model, its simulated workers, and a small run of all of it."""

import json
import subprocess
import sys

import numpy as np
import pytest

from metadist.core.messages import Chunk, Weights
from tests.benchmarks import scaling
from tests.benchmarks.scaling import CostModel, Load, fit
from tests.benchmarks.simulated_worker import SimulatedWorker, instructions

TRUE = CostModel(step_s=0.01, worker_s=0.002, object_s=0.0005, byte_s=2e-9)
LOADS = [
    *(Load(workers, 16 * workers, 0.25, 9e5) for workers in (1, 8, 32, 64, 128)),
    *(Load(8, 128, 0.0, size, servers) for size in (5e4, 9e5, 1.8e6) for servers in (1, 2)),
]


def test_the_cost_model_recovers_what_made_the_measurements():
    found = fit(LOADS, [TRUE.predict(load) for load in LOADS])
    assert np.allclose(found, TRUE, rtol=1e-6)


def test_noise_of_a_few_percent_moves_its_predictions_by_no_more():
    noise = np.random.default_rng(0).uniform(0.97, 1.03, len(LOADS))
    found = fit(LOADS, [TRUE.predict(load) * factor for load, factor in zip(LOADS, noise, strict=True)])
    load = Load(1000, 16000, 0.25, 9e5)
    assert min(found) >= 0
    assert found.predict(load) == pytest.approx(TRUE.predict(load), rel=0.1)


def test_it_says_what_binds():
    assert TRUE.binds(Load(10, 160, 0.25, 9e5)) == "compute"
    assert TRUE.binds(Load(1000, 16000, 0.25, 9e5)) == "server"
    assert TRUE.binds(Load(1000, 16000, 0.25, 9e5, servers=8)) == "driver"
    assert TRUE.binds(Load(1000, 1000, 0.01, 1e3)) == "ends"
    assert Load(3, 7, 0.5, 0).ideal_s == 1.5


@pytest.mark.parametrize("rows", [True, False])
def test_a_simulated_worker_does_as_theta_says(rows):
    chunk = Chunk("train", 0, 4, 7)
    report, gradient = SimulatedWorker().meta_gradients(Weights(0, instructions(100, 0.0, rows)), chunk)
    assert gradient.shape == ((3, 100) if rows else (100,))
    assert gradient.dtype == (np.float32 if rows else np.float64)
    assert report.chunk == chunk and report.first_not_finite() is None


@pytest.mark.wide
@pytest.mark.ray
def test_the_script_measures_real_and_simulated_workers():
    command = [sys.executable, scaling.__file__, "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(done.stdout)
    assert {row["workers"] for row in measured["measured"]} == {1, 4}
    assert {(row["sent"], row["servers"]) for row in measured["saturation"]} == {("rows", 1), ("sums", 1)}
    assert all(0 < row["efficiency"] <= 1 and 0 < row["update_s"] < row["step_s"] for row in measured["measured"])
    assert {row["workers"] for row in measured["predicted"]} == {256, 512, 1000}
    assert measured["real"]["strong"][0]["efficiency"] == 1
    assert measured["fleet"]["resident_mib"] < 200  # no torch in there
    assert "cost model: step =" in scaling.present(measured)
