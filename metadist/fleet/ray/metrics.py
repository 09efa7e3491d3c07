"""A run's figures among Ray's own metrics, which each node offers to Prometheus."""

from ray.util.metrics import Counter, Gauge, Histogram

from metadist.fleet.server import Stats

SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]
"""Upper ends of the histogram's buckets."""


class RunMetrics:
    """Counts and measures of one run, all with the tag `run`. Ray puts `ray_` before their names.

    Setting all of them takes some tens of microseconds, once a meta-step; Ray sends them on every ten seconds.
    """

    def __init__(self, run: str):
        own = {"run": run}

        def gauge(name: str, description: str) -> Gauge:
            return Gauge(name, description, tag_keys=("run",)).set_default_tags(own)

        def counter(name: str, description: str) -> Counter:
            return Counter(name, description, tag_keys=("run",)).set_default_tags(own)

        self._tasks = counter("metadist_tasks_total", "tasks whose meta-gradients were applied")
        self._stragglers = counter("metadist_stragglers_total", "bundles of tasks copied, as a worker took too long")
        self._lost = counter("metadist_workers_lost_total", "workers that died, hung or did not answer")
        self._seconds = Histogram("metadist_step_seconds", "seconds of a meta-step", SECONDS, ("run",))
        self._seconds.set_default_tags(own)
        self._gauges = {
            "alive": gauge("metadist_workers_alive", "workers that have joined and can be reached"),
            "target": gauge("metadist_workers_target", "workers that the run should have"),
            "loss": gauge("metadist_meta_loss", "mean query loss of the last meta-step"),
            "tasks": gauge("metadist_meta_batch_size", "tasks of the last meta-step"),
        }
        self._copies_before = self._lost_before = 0

    def step(self, stats: Stats, seconds: float, alive: int, target: int, copies: int, lost: int) -> None:
        """One meta-step is done. `copies`, `lost`: stragglers' bundles copied and workers lost since the run began."""
        self._tasks.inc(stats.num_tasks)
        self._seconds.observe(seconds)
        for name, value in {"alive": alive, "target": target, "loss": stats.loss, "tasks": stats.num_tasks}.items():
            self._gauges[name].set(float(value))
        if copies > self._copies_before:
            self._stragglers.inc(copies - self._copies_before)
        if lost > self._lost_before:
            self._lost.inc(lost - self._lost_before)
        self._copies_before, self._lost_before = copies, lost
