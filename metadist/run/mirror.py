"""A run directory at a URI, without a file system that machines share: the folder on this machine that the run works
in, and what keeps the two equal.

The place at the URI is what counts. Its files are fetched at the start; those of a checkpoint are there before the
checkpoint is, so that a run that goes on elsewhere has its whole journal and metrics, and no step of them twice.
"""

import functools
import hashlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pyarrow import ArrowException, fs

from metadist.core.errors import PlaceLost, StorageFailed, doing_it_again
from metadist.core.files import (
    LOCK_FILE,
    bare,
    cache_root,
    is_uri,
    join,
    parse_json_line,
    private_files,
    read_file,
    reason,
    replace_text,
    writing,
)
from metadist.core.redaction import redact, to_stderr
from metadist.core.storage import listed, open_location, put, reaching, read
from metadist.run.tracker import MODELS_FOLDER, RUN_ID_FILE

TARGET_FILE, METRICS_FILE = "target_workers", "metrics.jsonl"
MOST_WORKERS = 100_000
LOOK_EVERY_S = 5.0
_ATTEMPTS, _PAUSE_S = 3, 1.0

Say = Callable[[str], None]
_Cut = dict[str, tuple[int, int]]  # file -> when it last changed, and its bytes then


def working_folder(run_dir: str) -> Path:
    """The folder on this machine that a run works in: its directory, or one in the cache where that is at a URI."""
    if not is_uri(run_dir):
        return Path(run_dir)
    place = bare(run_dir)
    return cache_root() / "runs" / hashlib.sha256(place.encode()).hexdigest()[:16] / place.rpartition("/")[2]


def name_of(run_dir: str) -> str:
    """A run directory as people read and type it: without the secrets in a URI."""
    return redact(run_dir)


class Mirror:
    """Keeps a run directory at a URI equal to the folder on this machine that its run works in."""

    def __init__(self, run_dir: str) -> None:
        self._what, self._folder = f"run_dir={run_dir}", working_folder(run_dir)
        self._place, self._uri = name_of(run_dir), run_dir
        self._fetched: set[str] = set()
        self._sent: _Cut = {}
        self._lock = threading.Lock()
        self._guard: Callable[[], None] = lambda: None
        self._watcher: threading.Thread | None = None
        self._closed = threading.Event()

    def fetch(self, say: Say = to_stderr) -> None:
        """Has the folder hold what the place does, and nothing else. Raises InputError where it cannot be reached."""
        there = [i for i in listed(self._what, self._uri) if i.type == fs.FileType.File and _counts(i.base_name)]
        self._files, self._root = open_location(self._uri)
        self._fetched = {info.base_name for info in there}
        gone = [path for path in self._own() if str(path.relative_to(self._folder)) not in self._fetched]
        if gone:
            say(
                f"{len(gone)} files in {self._folder} that {self._place} does not have are removed ({gone[0].name} ...)"
            )
        for path in gone:
            path.unlink()
        for info in there:
            with reaching(self._what):
                _fetch(self._files, info.path, self._folder / info.base_name)

    def rewind(self, step: int) -> None:
        """Forget the metrics of later steps, which a process that died had sent ahead of its next checkpoint: they will
        be computed again."""
        path = self._folder / METRICS_FILE
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        while lines and (parse_json_line(lines[-1]) or {}).get("step", step + 1) > step:
            del lines[-1]
        if path.exists():
            replace_text(path, b"".join(lines).decode())

    def begin(self, guard: Callable[[], None], say: Say) -> None:
        """The run may write from now on: `guard` raises PlaceLost once it may no longer. Has the place hold what the
        folder does, and follows what is asked for there."""
        self._guard, self._say = guard, say
        with reaching(self._what):
            for name in sorted(self._fetched):
                if not (self._folder / name).exists():
                    self._files.delete_file(f"{self._root}/{name}")
            self._send(self._cut(but=TARGET_FILE))
        self._watcher = threading.Thread(target=self._watch, name="metadist-mirror", daemon=True)
        self._watcher.start()

    def cut(self) -> Callable[[], None]:
        """The files as they are now; what is returned sends them, as they were. It raises OSError or PlaceLost."""
        return partial(self._send, self._cut(but=TARGET_FILE))

    def finish(self, failed: bool) -> None:
        """Send all there is. Raises StorageFailed where that fails thrice, unless the run has `failed` before."""
        if self._watcher is None:
            return
        self._closed.set()
        self._watcher.join()
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._send(self._cut(but=TARGET_FILE))
                return
            except PlaceLost:
                if failed:
                    return
                raise
            except (OSError, ArrowException) as error:
                self._say(f"{self._place} does not take the run's files ({reason(error)}), {attempt} of {_ATTEMPTS}")
                time.sleep(_PAUSE_S)
        failure = StorageFailed(
            f"{self._place} does not have the last of the run's files, which are in {self._folder}: once it takes "
            f"them, {doing_it_again()} goes on from the newest checkpoint there"
        )
        if failed:
            self._say(str(failure))
            return
        raise failure

    def _own(self) -> list[Path]:
        """The files of the folder that belong to the run."""
        models = self._folder / MODELS_FOLDER
        found = [path for path in sorted(self._folder.rglob("*")) if path.is_file() and _counts(path.name)]
        return [path for path in found if not path.is_relative_to(models)]

    def _cut(self, but: str = "") -> _Cut:
        found = {}
        for path in self._own():
            name, seen = str(path.relative_to(self._folder)), path.stat()
            if name != but:
                found[name] = seen.st_mtime_ns, seen.st_size
        return found

    def _send(self, cut: _Cut) -> None:
        """What is newer than what was sent before; config.yaml last, by which others know a run."""
        with self._lock:
            self._guard()
            for name in sorted(cut, key=lambda name: name == "config.yaml"):
                if cut[name] > self._sent.get(name, (0, 0)) and (self._folder / name).exists():
                    put(self._files, f"{self._root}/{name}", self._folder / name, cut[name][1])
                    self._sent[name] = cut[name]

    def _watch(self) -> None:
        """Follow the number of workers asked for; have the MLflow run be known as soon as there is one."""
        silent, asked = False, _read(self._folder / TARGET_FILE)
        while not self._closed.wait(LOOK_EVERY_S):
            try:
                target = _asked(self._files, f"{self._root}/{TARGET_FILE}")
                if target is not None and target != asked:
                    asked = target
                    replace_text(self._folder / TARGET_FILE, target)
                self._send({name: seen for name, seen in self._cut().items() if name == RUN_ID_FILE})
                silent = False
            except PlaceLost:  # which the saver raises in the driver's thread
                return
            except (OSError, ArrowException) as error:
                if not silent:
                    self._say(
                        f"{self._place} cannot be asked for {TARGET_FILE} ({reason(error)}): the run goes on, and "
                        "`metadist scale` has no effect until it answers (said once)"
                    )
                silent = True


def _counts(name: str) -> bool:
    return name != LOCK_FILE and not name.startswith(".")


def _fetch(files: fs.FileSystem, place: str, target: Path) -> None:
    aside = target.with_name(f".{target.name}.tmp")
    with files.open_input_stream(place) as stream:
        aside.write_bytes(stream.read())
    aside.replace(target)


def _read(path: Path) -> str | None:
    return read_file(path).decode(errors="replace") if path.exists() else None


def _asked(files: fs.FileSystem, place: str) -> str | None:
    if files.get_file_info(place).type != fs.FileType.File:
        return None
    return read(files, place)[:100].decode(errors="replace")


def asked_target(run_dir: Path) -> int | None:
    """The number of workers asked for; None where what the file holds is none."""
    try:
        target = int(read_file(run_dir / TARGET_FILE))
    except (OSError, ValueError):
        return None
    return target if 1 <= target <= MOST_WORKERS else None


def run_file(run: str | Path, name: str) -> Path:
    """A file of a run directory; of one at a URI a copy of it as it is now. It need not exist. Raises InputError where
    the URI cannot be reached."""
    if not is_uri(run):
        return Path(run) / name
    copy = Path(tempfile.mkdtemp(dir=_copies().name), name)
    with reaching(f"the run {run}"):
        files, root = open_location(str(run), quick=True)
        if files.get_file_info(f"{root}/{name}").type == fs.FileType.File:
            _fetch(files, f"{root}/{name}", copy)
    return copy


@functools.cache
def _copies() -> tempfile.TemporaryDirectory[str]:
    """It is removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="metadist-")


def write_run_file(run: str | Path, name: str, text: str) -> None:
    """Writes a small file of a run directory, whole or not at all. Raises StorageFailed or InputError."""
    if not is_uri(run):
        return replace_text(Path(run) / name, text)
    copy = Path(tempfile.mkdtemp(dir=_copies().name), name)
    copy.write_text(text)
    with reaching(f"the run {run}"):
        files, root = open_location(str(run), quick=True)
        return put(files, f"{root}/{name}", copy, len(text.encode()))


@contextmanager
def new_files(run: str | Path, name: str) -> Iterator[tuple[Path, str]]:
    """A folder to write the files of `name` in a run directory into, for this user alone, and where they are at the
    end: of a run at a URI they are sent there then. Raises StorageFailed where they cannot be written."""
    with private_files():
        if not is_uri(run):
            folder = Path(run, name)
            with writing(folder):
                folder.parent.mkdir(exist_ok=True)
                folder.mkdir(exist_ok=True)
            yield folder, str(folder)
            return
        folder, place = Path(tempfile.mkdtemp(dir=_copies().name)), join(str(run), name)
        yield folder, name_of(place)
        with writing(name_of(place)):
            files, root = open_location(place)
            for path in sorted(folder.iterdir()):
                put(files, f"{root}/{path.name}", path, path.stat().st_size)
