"""A run directory: its paths, and the run that writes it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from metadist.checkpoint.format import Checkpoint
from metadist.checkpoint.journal import Journal, planned_batches, read_journal
from metadist.checkpoint.saver import Saver
from metadist.checkpoint.store import CheckpointStore
from metadist.config import Config, dump_config
from metadist.core.errors import InputError
from metadist.core.files import DriverLock, bare, here, is_uri, private_files, reason, replace_text
from metadist.core.storage import local_folder, reaching
from metadist.run.identity import bound_settings
from metadist.run.mirror import TARGET_FILE, Mirror, name_of, working_folder
from metadist.run.saved import config_before, is_own, location, write_json
from metadist.run.tracker import RunTracker


class RunLock:
    """The right to write to a run's folders, its directory and a local `checkpoint.location`, as a context.

    The run's directory is locked at entry if it is there; all else at `take`, once nothing can be wrong with the job.
    Files written meanwhile are for this user alone. Of a run directory at a URI the folder in the cache is locked, and
    then holds what is at the URI.
    """

    def __init__(self, config: Config):
        assert config.run_dir
        self._folder = working_folder(config.run_dir)
        self.mirror = Mirror(config.run_dir) if is_uri(config.run_dir) else None
        elsewhere = config.checkpoint.location or self.mirror
        self._elsewhere = local_folder(location(config)) if elsewhere else None
        self._locks: list[DriverLock] = []
        self._stack = ExitStack()

    def __enter__(self) -> "RunLock":
        with self._stack:  # undone at once where another driver has the directory
            self._stack.enter_context(private_files())
            if self.mirror:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._lock(self._folder)
            if self.mirror:
                self.mirror.fetch()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _lock(self, folder: Path) -> None:
        self._locks.append(self._stack.enter_context(DriverLock(folder)))

    def take(self) -> None:
        """Lock all of them. Raises InputError where another driver has one."""
        self._locks[0].take()
        if self._elsewhere not in (None, self._folder):
            self._lock(self._elsewhere)
            self._locks[1].take()

    def check(self) -> None:
        """Raises PlaceLost where a folder is no longer the one that was locked."""
        for lock in self._locks:
            lock.check()


class Run:
    """A run while it is trained: the one writer of its directory, journal, checkpoints and trackers.

    config, path: the job and the directory (or the folder that stands for one at a URI); `place` is its name for people
    and their commands, `name` without options. checkpoint: where it goes on from, None at its start. identity: what its
    bits depend on; drifted: whether they may differ from those of an uninterrupted run of that identity. open_tracker:
    takes config, path and checkpoint. A context: entering writes config.yaml and opens the trackers, leaving closes
    them with a truthful status.
    """

    def __init__(
        self, config: Config, checkpoint: Checkpoint | None, identity: dict[str, Any], drifted: bool, lock: RunLock,
        open_tracker: Callable[..., RunTracker] = RunTracker,
    ):  # fmt: skip
        assert config.run_dir
        self.config = config
        self.path, self.place, self.name = working_folder(config.run_dir), name_of(config.run_dir), bare(config.run_dir)
        self.checkpoint = checkpoint
        self.identity = identity
        self.drifted = drifted
        self._lock = lock
        self._open_tracker = open_tracker

    def __enter__(self) -> "Run":
        begin_directory(self.config, self.path, self.checkpoint)
        if self._lock.mirror and self.checkpoint:
            self._lock.mirror.rewind(self.checkpoint.step)
        self._tracker = self._open_tracker(self.config, self.path, self.checkpoint)
        self.tracker, self.say = self._tracker.tracker, self._tracker.say
        self.doing = self._tracker.doing
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._tracker.finish(kind)
        finally:
            if self._lock.mirror:
                self._lock.mirror.finish(failed=kind is not None)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Journal, checkpoint store and saver, open meanwhile; `planned` has the meta-batches journalled before."""
        with Journal(self.path / "journal.jsonl") as self.journal:
            keep, place, mirror = self.config.checkpoint.keep_last, location(self.config), self._lock.mirror
            self.store = CheckpointStore(place, keep, self.say, self.check)
            if is_uri(place):
                with reaching(f"{'checkpoint.location' if self.config.checkpoint.location else 'run_dir'}={place}"):
                    self.store.claim(f"{self.place}, {here()},")
            if mirror:
                mirror.begin(self.store.check_place, self.say)
            self.planned = planned_batches(read_journal(self.path / "journal.jsonl"))
            if self.planned and not self.checkpoint:
                self.say(
                    f"{self.place} has no checkpoint: its {len(self.planned)} meta-steps are computed again, each with "
                    "the tasks that journal.jsonl has for it"
                )
            self.saver = Saver(self.store, self.journal, self.say, *([mirror.cut] if mirror else []))
            try:
                yield
            finally:
                self.saver.close()

    @property
    def checkpoint_is_own(self) -> bool:
        """Whether the checkpoint is this directory's own, rather than that of a run that this one branches from."""
        return is_own(self.checkpoint, self.config.run_dir or "")

    def check(self) -> None:
        """Raises PlaceLost where a folder that the run writes to is no longer the one it locked."""
        self._lock.check()

    def describe(self, dataset: Any, resolved: dict[str, Any], about: str, trust: str) -> None:
        """Send parameters (with those that were `auto` as `resolved`), tags, the data (a Dataset, or None), the
        configuration, what the run is `about` and the flag of `trust` that its commands need to the trackers."""
        place = bare(self.config.data.path or str(dataset.path)) if dataset else ""
        name = self.config.data.family or place.rpartition("/")[2]
        data = (name, dataset.digest, place) if dataset else None
        self._tracker.describe(self.identity, data, resolved, about, trust)

    def mlflow_run_id(self) -> str | None:
        """The MLflow run to continue after a restart, once there is one."""
        return self._tracker.mlflow_run_id()

    def mlflow_page(self) -> str | None:
        """Where a browser finds it in MLflow, once it is there; see `tracking.mlflow.run_page`."""
        return self._tracker.mlflow_page()

    def write_results(self, results: dict[str, Any]) -> None:
        """results.json, also as an artifact."""
        self.check()
        write_json(results, self.path / "results.json")
        self.tracker.artifact(self.path / "results.json")
        self._tracker.conclude(results)


def begin_directory(config: Config, run_dir: Path, checkpoint: Checkpoint | None) -> None:
    """The run directory with its config.yaml; a run that starts anew forgets what an earlier try noted, but for the
    tasks of each step where the job is the same and its checkpoints are gone, or were yet to come."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        text, path = dump_config(config), run_dir / "config.yaml"
        forgotten = ["results.json"] if checkpoint else ["results.json", "metrics.jsonl"]
        before = config_before(run_dir, checkpoint)
        if not checkpoint and (before is None or bound_settings(before) != bound_settings(config)):
            forgotten += ["journal.jsonl", TARGET_FILE]
        if before and before.num_workers != config.num_workers:
            forgotten.append(TARGET_FILE)
        for name in forgotten:
            (run_dir / name).unlink(missing_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise InputError(
            f"run_dir={run_dir} cannot be written to ({reason(error.__cause__ or error)}): choose another"
        ) from None
