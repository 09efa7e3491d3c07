"""The path of a job over separate hosts, disturbed: the short form of tests/benchmarks/cluster.py."""

import pytest

from tests.benchmarks.cluster import whole_path
from tests.benchmarks.hosts import why_not

WHY_NOT = why_not()


@pytest.mark.ray
@pytest.mark.wide
@pytest.mark.timeout(1200)
@pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}")
def test_a_job_disturbed_on_separate_hosts_ends_as_one_that_ran_alone():
    whole_path(short=True)
