"""A run directory: its paths, what is read from it, and the run that writes it."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from metadist.checkpoint.format import Checkpoint, load_checkpoint, local_folder
from metadist.checkpoint.journal import Journal, planned_batches, read_journal
from metadist.checkpoint.saver import Saver
from metadist.checkpoint.store import CheckpointStore
from metadist.config import Config, dump_config, load_config
from metadist.config.load import parse_config
from metadist.core.errors import InputError
from metadist.core.files import DriverLock, finite, here, private_files, read_file, reason, replace_text
from metadist.core.redaction import redacted
from metadist.run.identity import bound_settings
from metadist.run.tracker import RunTracker
from metadist.run.trust import check_trusted, check_usable, outside_place, trust_flag

_PACKAGES = "working_dir_files"
TARGET_FILE = "target_workers"
MOST_WORKERS = 100_000


class RunLock:
    """The right to write to a run's folders, its directory and a local `checkpoint.location`, as a context.

    The run's directory is locked at entry if it is there; all else at `take`, once nothing can be wrong with the job.
    Files written meanwhile are for this user alone.
    """

    def __init__(self, config: Config):
        assert config.run_dir
        self._folder = Path(config.run_dir)
        self._elsewhere = local_folder(config.checkpoint.location) if config.checkpoint.location else None
        self._locks: list[DriverLock] = []
        self._stack = ExitStack()

    def __enter__(self) -> "RunLock":
        with self._stack:  # undone at once where another driver has the directory
            self._stack.enter_context(private_files())
            self._lock(self._folder)
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

    config, path: the job and the directory. checkpoint: where it goes on from, None at its start. identity: what its
    bits depend on; drifted: whether they may differ from those of an uninterrupted run of that identity. A context:
    entering writes config.yaml and opens the trackers, leaving closes them with a truthful status.
    """

    def __init__(
        self, config: Config, checkpoint: Checkpoint | None, identity: dict[str, Any], drifted: bool, lock: RunLock,
        quiet: bool = False,
    ):  # fmt: skip
        assert config.run_dir
        self.config = config
        self.path = Path(config.run_dir)
        self.checkpoint = checkpoint
        self.identity = identity
        self.drifted = drifted
        self._lock = lock
        self._quiet = quiet

    def __enter__(self) -> "Run":
        begin_directory(self.config, self.path, self.checkpoint)
        self._tracker = RunTracker(self.config, self.path, self.checkpoint, self._quiet)
        self.tracker, self.say = self._tracker.tracker, self._tracker.say
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tracker.finish(kind)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Journal, checkpoint store and saver, open meanwhile; `planned` has the meta-batches journalled before."""
        with Journal(self.path / "journal.jsonl") as self.journal:
            keep, place = self.config.checkpoint.keep_last, location(self.config, self.path)
            self.store = CheckpointStore(place, keep, self.say, self.check)
            if "://" in self.store.location:
                self.store.claim(f"{self.path}, {here()},")
            self.planned = planned_batches(read_journal(self.path / "journal.jsonl"))
            if self.planned and not self.checkpoint:
                self.say(
                    f"{self.path} has no checkpoint: its {len(self.planned)} meta-steps are computed again, each with "
                    "the tasks that journal.jsonl has for it"
                )
            self.saver = Saver(self.store, self.journal, self.say)
            try:
                yield
            finally:
                self.saver.close()

    @property
    def checkpoint_is_own(self) -> bool:
        """Whether the checkpoint is this directory's own, rather than that of a run that this one branches from."""
        return is_own(self.checkpoint, self.path)

    def check(self) -> None:
        """Raises PlaceLost where a folder that the run writes to is no longer the one it locked."""
        self._lock.check()

    def describe(self, dataset: Any, resolved: dict[str, Any], about: str) -> None:
        """Send parameters (with those that were `auto` as `resolved`), tags, the data (a Dataset, or None), the
        configuration and what the run is `about` to the trackers."""
        name = self.config.data.family or (dataset.path.name if dataset else "")
        data = (name, dataset.digest, str(dataset.path)) if dataset else None
        self._tracker.describe(self.identity, data, resolved, about, trust_flag(self.config))

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


def located(config: Config) -> Config:
    """The configuration with its paths made absolute, so that it means the same from anywhere."""
    data, model, place = config.data, config.model, config.checkpoint.location
    changes: dict[str, Any] = {"run_dir": _absolute("run_dir", config.run_dir or "runs/run")}
    if data.path:
        changes["data"] = data.model_copy(update={"path": _absolute("data.path", data.path)})
    if model.weights:
        changes["model"] = model.model_copy(update={"weights": _absolute("model.weights", model.weights)})
    if place and "://" not in place:
        place = _absolute("checkpoint.location", place)
        changes["checkpoint"] = config.checkpoint.model_copy(update={"location": place})
    return config.model_copy(update=changes)


def _absolute(setting: str, path: str) -> str:
    absolute = str(Path(path).absolute())
    try:
        absolute.encode()
    except UnicodeEncodeError:
        raise InputError(f"{setting}={absolute!r} is not UTF-8, as every path here must be: rename it") from None
    return absolute


def check_lasting(config: Config) -> None:
    """Raises InputError where a job that was submitted to a cluster would leave its run, or has its initial weights, in
    the copy of its working directory: that is thrown away, and has another name after the smallest change."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return
    places = {
        "run_dir": config.run_dir,
        "checkpoint.location": config.checkpoint.location,
        "model.weights": config.model.weights,
    }
    lost = [f"{setting}={place}" for setting, place in places.items() if place and _PACKAGES in Path(place).parts]
    if lost:
        raise InputError(
            f"{' and '.join(lost)} would vanish with the job, since relative paths of a submitted job lie in a copy of "
            "its working directory: give absolute paths on storage that all nodes share (checkpoint.location may also "
            "be a URI such as s3://...)"
        )


def is_own(checkpoint: Checkpoint | None, run_dir: Path) -> bool:
    """Whether a checkpoint was written by the run of this directory, rather than by one that it goes on from."""
    return checkpoint is not None and checkpoint.run.get("run_dir") == str(run_dir)


def begin_directory(config: Config, run_dir: Path, checkpoint: Checkpoint | None) -> None:
    """The run directory with its config.yaml; a run that starts anew forgets what an earlier try noted, but for the
    tasks of each step where the job is the same and its checkpoints are gone, or were yet to come."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        text, path = dump_config(config), run_dir / "config.yaml"
        forgotten = ["results.json"] if checkpoint else ["results.json", "metrics.jsonl"]
        before = None if checkpoint else config_before(run_dir)
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


def config_before(run_dir: Path) -> Config | None:
    """The configuration of the run that the directory already has, if any."""
    path = run_dir / "config.yaml"
    try:
        return parse_config(read_file(path).decode(), str(path))
    except (FileNotFoundError, UnicodeDecodeError, InputError):
        return None


def location(config: Config, run_dir: Path) -> str:
    """Where a run's checkpoints are."""
    return config.checkpoint.location or str(run_dir / "checkpoints")


def scale(run_dir: str | Path, target: int) -> None:
    """Ask a running job for `target` workers; it follows from its next meta-step."""
    path = config_file(run_dir).parent
    if not 1 <= target <= MOST_WORKERS:
        raise InputError(f"a run has between 1 and {MOST_WORKERS} workers, not {target}")
    replace_text(path / TARGET_FILE, str(target))


def asked_target(run_dir: Path) -> int | None:
    """The number of workers asked for; None where what the file holds is none."""
    try:
        target = int(read_file(run_dir / TARGET_FILE))
    except (OSError, ValueError):
        return None
    return target if 1 <= target <= MOST_WORKERS else None


def write_json(results: Any, path: Path) -> None:
    """Results as strict JSON; a number that is not finite is null."""
    replace_text(path, json.dumps(finite(redacted(results)), indent=2, allow_nan=False) + "\n")


def config_file(run: str | Path) -> Path:
    """The config.yaml of a run directory. Raises InputError where that is none."""
    path = Path(run) / "config.yaml"
    if not path.exists():
        raise InputError(f"{run} is not a run directory: it has no config.yaml")
    return path


def saved_place(run: str | Path, known: str | None = None, trust_code: bool = False) -> str | None:
    """Where the configuration of a run says that its checkpoints are. Raises InputError where that is neither in its
    directory, nor `known` to the user, nor trusted."""
    if (Path(run) / "meta.json").exists():
        return None
    saved = load_config([config_file(run)])
    if saved.checkpoint.location != known:
        check_trusted(run, outside_place(saved, Path(run)), trust_code)
    check_usable(saved.checkpoint.location)
    return saved.checkpoint.location


def read_checkpoint(run: str | Path, checkpoint: str = "best", place: str | None = None) -> Checkpoint:
    """The checkpoint that `load` takes, from `place` or else from the run's own directory."""
    path = Path(run)
    if (path / "meta.json").exists():
        return load_checkpoint(path)
    store = CheckpointStore(place or config_file(path).parent / "checkpoints")
    return store.load("latest" if checkpoint == "best" and not store.has_best() else checkpoint)
