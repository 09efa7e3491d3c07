"""Scaling: the cost model, simulated workers through the real fleet, the command."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from metadist.cli.bench import bench, present
from metadist.core.messages import Chunk, Weights
from metadist.fleet.simulated import SimulatedWorker, instructions
from metadist.run.cost_model import CostModel, Load, fit

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


@pytest.mark.ray
def test_four_simulated_workers_are_measured(ray_cluster):
    from metadist.run.scaling import Setting, measure, start_simulated

    fleet, _, resident_mib = start_simulated(4, print)
    try:
        found = measure(fleet, Setting(4, chunk_s=0.05, parameters=70_000, chunks_per_worker=4, servers=2, steps=2))
    finally:
        fleet.close()
    assert resident_mib < 200  # no torch in there
    assert 0.2 < found.efficiency <= 1 and 0 < found.update_s < found.step_s
    assert found.chunks_per_s == pytest.approx(16 / found.step_s)


@pytest.mark.ray
def test_the_command_runs_and_prints_json(ray_cluster):
    done = CliRunner().invoke(bench, ["scaling", "--quick", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert {row["workers"] for row in told["measured"]} == {1, 4}
    assert {(row["sent"], row["servers"]) for row in told["saturation"]} == {("rows", 1), ("sums", 1)}
    assert {row["workers"] for row in told["predicted"]} == {256, 512, 1000}
    assert told["real"]["strong"][0]["efficiency"] == 1
    assert "cost model: step =" in present(told)
