"""What is read from run directories, folders or URIs: configuration and checkpoints, and which of them a run goes on
from."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from metadist.checkpoint.format import META, Checkpoint, load_checkpoint
from metadist.checkpoint.journal import planned_batches, read_journal
from metadist.checkpoint.store import CheckpointStore
from metadist.config import Config, load_config
from metadist.config.load import parse_config
from metadist.core.errors import InputError, doing_it_again
from metadist.core.files import bare, finite, is_uri, join, read_file, replace_text
from metadist.core.redaction import redacted
from metadist.core.storage import listed, local_folder, reaching
from metadist.run.mirror import MOST_WORKERS, TARGET_FILE, run_file, working_folder, write_run_file
from metadist.run.trust import check_trusted, check_usable, outside_place


def location(config: Config) -> str:
    """Where a run's checkpoints are."""
    return config.checkpoint.location or join(config.run_dir or "", "checkpoints")


def is_own(checkpoint: Checkpoint | None, run_dir: str) -> bool:
    """Whether a checkpoint was written by the run of this directory, rather than by one that it goes on from."""
    return checkpoint is not None and checkpoint.run.get("run_dir") == bare(run_dir)


def config_before(run_dir: Path, checkpoint: Checkpoint | None = None) -> Config | None:
    """The configuration of the checkpoint that a run goes on from, or of the run that is in the directory, if any."""
    if checkpoint is not None:
        return parse_config(checkpoint.config, "the checkpoint's configuration")
    path = run_dir / "config.yaml"
    try:
        return parse_config(read_file(path).decode(), str(path))
    except (FileNotFoundError, UnicodeDecodeError, InputError):
        return None


def config_file(run: str | Path) -> Path:
    """The config.yaml of a run directory; of one at a URI a copy. Raises InputError where that is none."""
    path = run_file(run, "config.yaml")
    if not path.exists():
        below = Path("runs") / run
        meant = f"; did you mean {below}?" if not is_uri(run) and (below / "config.yaml").is_file() else ""
        raise InputError(f"{run} is not a run directory: it has no config.yaml{meant}")
    return path


def saved_place(run: str | Path, known: str | None = None, trust_code: bool = False) -> str | None:
    """Where the configuration of a run says that its checkpoints are. Raises InputError where that is neither in its
    directory, nor `known` to the user, nor trusted."""
    if is_checkpoint(run):
        return None
    saved = load_config([config_file(run)])
    if saved.checkpoint.location != known:
        check_trusted(run, outside_place(saved, Path(run)), trust_code)
    check_usable(saved.checkpoint.location)
    return saved.checkpoint.location


def read_checkpoint(run: str | Path, checkpoint: str = "best", place: str | None = None) -> Checkpoint:
    """The checkpoint that `load` takes, from `place` or else from the run's own directory."""
    if is_checkpoint(run):
        return load_checkpoint(run)
    config_file(run)
    with reaching(place or str(run)):
        store = CheckpointStore(place or join(str(run), "checkpoints"))
        return store.load("latest" if checkpoint == "best" and not store.has_best() else checkpoint)


def is_checkpoint(run: str | Path) -> bool:
    """Whether it is the directory of one checkpoint, rather than of a run."""
    return run_file(run, META).exists()


def find_checkpoint(config: Config, resume: str | Path | None, trust_code: bool = False) -> Checkpoint | None:
    """Where a run goes on from, or None at its start. Raises InputError when the directory is in use unasked."""
    place, name, run_dir = location(config), bare(config.run_dir or ""), working_folder(config.run_dir or "")
    if resume is not None and resume != "auto":
        checkpoint = read_checkpoint(resume, "latest", saved_place(resume, config.checkpoint.location, trust_code))
        if (run_dir / "config.yaml").exists() and not is_own(checkpoint, name):
            raise InputError(
                f"{name} already holds another run: --resume auto continues that one; set run_dir=... to go on "
                f"from {resume} in a place of its own"
            )
        store = CheckpointStore(place)
        if config.checkpoint.location and store.steps():
            _check_owner(place, name, run_dir, store.load("latest"))
        return checkpoint
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"run_dir={run_dir} is a file: choose another")
    if (run_dir / "config.yaml").exists() and resume is None and _has_begun(run_dir):
        raise InputError(
            f"{name} already holds a run: add --resume auto to continue it, or run_dir=... to start another"
        )
    setting = "checkpoint.location" if config.checkpoint.location else "run_dir"
    if is_uri(place):
        listed(f"{setting}={place}", place)
    with reaching(f"{setting}={place}"):
        store = CheckpointStore(place)
        found = store.steps()
    if not found:
        lost = store.report_incomplete()
        if lost and local_folder(store.location):  # where a checkpoint appears whole or not at all
            raise InputError(
                f"no checkpoint in {store.location} is complete: restore the meta.json of {lost[-1]}, or remove these "
                f"directories, then {doing_it_again()} computes the run again from its start"
            )
        return None
    if resume is None:
        raise InputError(f"{place} holds another run's checkpoints: set checkpoint.location anew")
    checkpoint = store.load("latest")
    if config.checkpoint.location:
        _check_owner(place, name, run_dir, checkpoint)
        return checkpoint
    return replace(checkpoint, run={**checkpoint.run, "run_dir": name})  # even if it was moved


def _has_begun(run_dir: Path) -> bool:
    """Whether the run of a directory came to its first step; one that was refused before has left nothing to keep."""
    written = (run_dir / name for name in ("metrics.jsonl", "results.json"))
    begun = any(file.exists() and file.stat().st_size for file in written)
    return begun or bool(planned_batches(read_journal(run_dir / "journal.jsonl")))


def _check_owner(place: str, name: str, run_dir: Path, latest: Checkpoint) -> None:
    """Raises InputError where the place that a job gives for its checkpoints holds those of a run in another directory,
    which this one neither is nor was before it was moved."""
    owner = latest.run.get("run_dir")
    before = config_before(run_dir)
    if owner != name and (before is None or bare(before.run_dir or "") != owner):
        raise InputError(
            f"{place} holds the checkpoints of the run in {owner}: set checkpoint.location to a place of this "
            f"run's own, or run_dir={shlex.quote(str(owner))} to go on with that one"
        )


def scale(run: str | Path, target: int) -> bool:
    """Ask a running job for `target` workers; it follows from its next meta-step, at a URI within seconds. True where
    the run has ended."""
    config_file(run)
    if not 1 <= target <= MOST_WORKERS:
        raise InputError(f"a run has between 1 and {MOST_WORKERS} workers, not {target}")
    write_run_file(run, TARGET_FILE, str(target))
    return run_file(run, "results.json").exists()


def write_json(results: Any, path: Path) -> None:
    """Results as strict JSON; a number that is not finite is null."""
    replace_text(path, json.dumps(finite(redacted(results)), indent=2, allow_nan=False) + "\n")
