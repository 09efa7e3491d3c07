"""What is said of a cluster's resources; asked of Ray on four CPUs."""

import time

import pytest
import ray

from metadist.core.errors import InputError
from metadist.fleet.ray import capacity, fleet
from metadist.fleet.ray.capacity import Resources, announce, misfit, warn, why_missing
from metadist.fleet.ray.fleet import RayExecutor
from tests.fleet.ray import nodes

pytestmark = pytest.mark.ray


class Holder:
    """An actor that takes up CPUs."""

    def there(self) -> bool:
        return True


@pytest.fixture
def num_cpus(ray_cluster) -> int:
    """Of the cluster, none of which is in use any more by the actors of other tests."""
    cpus = int(ray.cluster_resources()["CPU"])
    nodes.wait_for(lambda: ray.available_resources().get("CPU", 0) == cpus, 60)
    return cpus


def test_a_worker_fits_on_one_node_or_it_is_told_what_the_largest_has():
    nodes = [{"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}]
    assert misfit({"CPU": 4}, nodes) == misfit({"CPU": 2, "GPU": 0.5}, nodes) == misfit({}, []) == ""
    assert misfit({"CPU": 8}, nodes).endswith("asks for 8 CPU and the largest node has 4 CPU")
    assert "largest node has 1 GPU" in misfit({"CPU": 2, "GPU": 2}, nodes)
    assert "no node has all of that" in misfit({"CPU": 4, "GPU": 1}, nodes)
    assert "largest node has 0 CPU" in misfit({"CPU": 1}, [])


def test_the_cluster_and_what_the_job_asks_for_are_announced(num_cpus):
    said, cpus = list[str](), num_cpus
    announce(2, Resources(cpus=1), False, said.append)
    announce(cpus + 3, Resources(cpus=1), False, said.append)
    announce(1, Resources(cpus=0), False, said.append)
    assert all(f"1 node with {cpus} CPUs, 0 GPUs" in text for text in said)
    assert "2 workers ask for 1 CPU each: starting" in said[0]
    assert f"room for {cpus} now" in said[1]
    assert "1 worker asks for nothing: starting it" in said[2]


def test_what_no_node_can_hold_is_refused_where_no_autoscaler_runs(ray_cluster):
    """At once by a Ray of this run's own; a cluster is given some time for another node, and that is said first."""
    asked = {
        "fleet.cpus_per_worker": Resources(cpus=64),
        "fleet.gpus_per_worker": Resources(gpus=1),
        "fleet.resources": Resources(custom={"lab": 2}),
    }
    for setting, resources in asked.items():
        for started, patience_s in ((False, 0.6), (True, 60)):
            said, began = list[str](), time.monotonic()
            with pytest.raises(InputError, match=setting) as raised:
                announce(1, resources, started, said.append, began + patience_s)
            assert started == (time.monotonic() - began < 0.5)
            assert said == []
            warn(resources, said.append)
            assert said == [f"{str(raised.value).partition(':')[0]}: waiting up to 30 s for a node that has"]


def test_missing_workers_are_told_by_cause(num_cpus):
    cpus = num_cpus
    assert why_missing(Resources(), 0, 2, 0) == "2 being started"
    assert why_missing(Resources(), 1, 1, 0) == "2 being started"
    assert "1 not answering" in why_missing(Resources(), 0, 0, 1)
    assert f"cluster has {cpus} of {cpus} CPU free" in why_missing(Resources(cpus=cpus), 2, 0, 0)
    assert "waiting for a node that has" in why_missing(Resources(cpus=cpus + 1), 1, 0, 0)


def test_in_a_ray_of_its_own_what_is_taken_is_taken_by_workers_being_started(num_cpus):
    """A worker whose process is being started has its CPUs already, though it has not said yet where it is."""
    holder = ray.remote(num_cpus=num_cpus)(Holder).remote()
    ray.get(holder.there.remote())
    nodes.wait_for(lambda: ray.available_resources().get("CPU", 0) == 0, 60)
    asked = Resources(cpus=num_cpus / 2)
    assert "2 for want of room" in why_missing(asked, 2, 0, 0)
    assert why_missing(asked, 2, 0, 0, joined=0) == "2 being started"
    assert why_missing(asked, 1, 0, 0, joined=1) == "1 being started"
    assert "1 for want of room" in why_missing(asked, 1, 0, 0, joined=2)
    ray.kill(holder)


def test_a_head_that_does_not_answer_in_time_is_told_and_ends_nothing(num_cpus, monkeypatch):
    """It hangs from one question to the next."""
    executor = RayExecutor(lambda: None, Resources(), print)
    try:
        assert executor.shortage(1, 0, 0) == "1 being started"
        monkeypatch.setattr(fleet, "STARTING_S", 0)  # as it is later: what workers wait for is asked
        monkeypatch.setattr(capacity, "ANSWER_S", 1e-9)
        said = {executor.shortage(1, 0, 0) for _ in range(20)}  # now and then it answers even in that time
        assert any("head does not answer" in each for each in said)
    finally:
        executor.close()
