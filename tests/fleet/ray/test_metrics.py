"""What a run gives to Ray's metrics, as it hands it over."""

from collections import Counter, defaultdict

import pytest
from ray.util.metrics import Metric

from metadist.fleet.ray.metrics import RunMetrics
from metadist.fleet.server import Stats


@pytest.fixture
def recorded(monkeypatch) -> dict[str, list[float]]:
    """The values that Ray is given, by name; each belongs to the run `digits`."""
    values = defaultdict(list)

    def record(self, value, tags=None):
        assert self._get_final_tags(tags) == {"run": "digits"}
        values[self.info["name"]].append(value)

    monkeypatch.setattr(Metric, "_record", record)
    return values


def test_what_is_counted_since_the_run_began_is_added_once(recorded):
    metrics, stats = RunMetrics("digits"), Stats(0.5, 1.0, 1.0, 0.5, 2.0, 0.01, 8)
    for copies, lost in ((0, 0), (2, 0), (2, 1), (5, 1)):
        metrics.step(stats, 0.25, 3, 4, copies, lost)
    sums = Counter({name: sum(values) for name, values in recorded.items()})
    assert sums["metadist_stragglers_total"] == 5 and sums["metadist_workers_lost_total"] == 1
    assert sums["metadist_tasks_total"] == 32 and sums["metadist_step_seconds"] == 1.0
    assert recorded["metadist_meta_loss"] == [0.5] * 4 and recorded["metadist_meta_batch_size"] == [8.0] * 4
    assert recorded["metadist_workers_alive"] == [3.0] * 4 and recorded["metadist_workers_target"] == [4.0] * 4
