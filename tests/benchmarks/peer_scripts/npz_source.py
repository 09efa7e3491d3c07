"""The benchmark's fixed tasks as a metadist source: `data.source=npz_source:Tasks`."""

import numpy as np

from metadist.core.task import Task, TaskId


class Tasks:
    """The tasks of one meta-batch, the same at every meta-step."""

    def __init__(self, seed: int, path: str, outputs: int):
        del seed
        self.outputs = outputs
        with np.load(path) as arrays:
            self._parts = [arrays[name] for name in ("support_x", "support_y", "query_x", "query_y")]

    def __call__(self, task_id: TaskId) -> Task:
        place = task_id.index % len(self._parts[0])
        return Task.of(*(part[place] for part in self._parts))
