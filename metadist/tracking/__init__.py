"""Where a run's numbers go: a file (the truth), the terminal, MLflow. Only the driver writes to them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

Status = Literal["FINISHED", "FAILED", "KILLED"]


class SavedModel(NamedTuple):
    """A trained model to keep with a run, for use without the run.

    name: "best" or "final". step: meta-steps done. folder: one checkpoint, which `metadist.load` reads. inputs,
    outputs: the named arrays that it takes and gives, dtype and shape of each (-1: any number). settings: what of its
    adaptation may be changed, `steps` and `lr`, with its values. example: small inputs, as arrays. evaluated:
    its figures are those that the run reports.
    """

    name: str
    step: int
    folder: Path
    inputs: Mapping[str, tuple[str, list[int]]]
    outputs: Mapping[str, tuple[str, list[int]]]
    settings: Mapping[str, float]
    example: Mapping[str, Any]
    evaluated: bool


class Tracker:
    """Takes what a run reports; this one passes over all of it. No call waits for a network.

    Metric names are paths such as `train/loss`, `validation/accuracy` (a fraction, 0 to 1), `workers/tasks_per_s`,
    `workers/alive`; `step` is the number of meta-steps done.
    """

    def params(self, values: dict[str, str]) -> None:
        """The resolved settings of the run, flat, by dotted key."""

    def tags(self, values: dict[str, str]) -> None:
        """Facts about the run: versions, digests, git commit."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one meta-step."""

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Data the run used: its content digest, the path or URI it came from, and what for (`train`, `test`)."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file to keep with the run. It may be read later than this call returns, and must stay until `finish`."""

    def model(self, model: SavedModel) -> None:
        """A model to keep with the run. Its folder may be read later, and must stay until `finish`."""

    def finish(self, status: Status) -> None:
        """The end: FINISHED (done), FAILED (an error), KILLED (stopped by a person or the cluster)."""


class Trackers(Tracker):
    """Several trackers as one, called in the order given. An error of one is raised: none of them may fail quietly."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def params(self, values: dict[str, str]) -> None:
        for tracker in self._trackers:
            tracker.params(values)

    def tags(self, values: dict[str, str]) -> None:
        for tracker in self._trackers:
            tracker.tags(values)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.metrics(values, step)

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        for tracker in self._trackers:
            tracker.dataset(name, digest, source, context)

    def artifact(self, path: Path, folder: str = "") -> None:
        for tracker in self._trackers:
            tracker.artifact(path, folder)

    def model(self, model: SavedModel) -> None:
        for tracker in self._trackers:
            tracker.model(model)

    def finish(self, status: Status) -> None:
        """Finishes each of them, then raises the first error."""
        errors: list[Exception] = []
        for tracker in self._trackers:
            try:
                tracker.finish(status)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
