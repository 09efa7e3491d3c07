"""The checkpoints of a run: the last few and the best, each in a directory that is written once and never again.

A directory is a checkpoint from the moment that its `meta.json`, written last, is there: the commit mark. On a local
path it gets its name only then, by one rename; elsewhere (`file://`, `s3://`, ... through pyarrow.fs) files appear one
by one, and a directory without the mark is ignored. A step that is saved again, as after a resume, gets another
directory (`step_00001200_2`), of which the last counts.
"""

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from pyarrow import fs as arrow_fs

from metadist.checkpoint.format import (
    META,
    Checkpoint,
    DamagedCheckpoint,
    encode,
    load_checkpoint,
    read_meta,
    sync_directory,
    write_synced,
)
from metadist.core.errors import InputError, PlaceLost, doing_it_again
from metadist.core.files import Held, is_uri, join
from metadist.core.redaction import to_stderr
from metadist.core.storage import make_folder, open_location, read, write

_NAME = re.compile(r"(\.old_)?step_(\d{8,})(?:_(\d+))?")  # .old_: an earlier metadist moved it aside, and died
_UNFINISHED, _OWNER = ".tmp_", "owner"
_MOST_POINTER_BYTES = 4096


class CheckpointStore:
    """The checkpoints of one run under `location`, a local path or a URI. One process writes; any number may read.

    Keeps the last `keep_last` and the best. `say` is called with a sentence about a damaged one that was passed over.
    `guard` is called before and after each one is written: it raises where this run may no longer write.
    """

    def __init__(
        self,
        location: str | Path,
        keep_last: int = 3,
        say: Callable[[str], None] = to_stderr,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        if keep_last < 1:
            raise InputError(f"keep_last is {keep_last}: at least 1 checkpoint must be kept.")
        self.location = str(location)
        self._fs, self._root = open_location(self.location)
        self._local = not is_uri(self.location)
        self._keep_last, self._say, self._guard = keep_last, say, guard
        self._held: Held | None = None
        self._claim: bytes | None = None

    def claim(self, holder: str) -> None:
        """Take over a place at a URI, where no lock file holds: others that write there find out at their next save."""
        self._claim = f"{holder} {uuid.uuid4().hex}\n".encode()
        make_folder(self._fs, self._root)
        write(self._fs, f"{self._root}/{_OWNER}", self._claim)

    def save(self, checkpoint: Checkpoint, *, best: bool = False) -> str:
        """Writes it to a new directory, then deletes those no longer kept; returns its path or URI.

        When this returns, the checkpoint is complete (on a local disk: through power loss). Raises TypeError when
        `trainer` holds anything but plain values and tensors, OSError when the place cannot be written, PlaceLost when
        it is another one than at the first save.
        """
        if best:
            checkpoint = replace(checkpoint, run={**checkpoint.run, "best": True})
        files = encode(checkpoint)
        self.check_place()
        try:
            self._delete_unfinished()
            name = self._new_name(checkpoint.step)
            self._write(name, files)
            self._prune(checkpoint.step)
        except OSError:
            self.check_place()  # which tells why, where the place was taken away meanwhile
            raise
        self.check_place()
        return join(self.location, name)

    def load(self, which: str = "latest") -> Checkpoint:
        """ "latest", "best", a step such as "step_00001200" (as it was saved last), or one attempt at it,
        "step_00001200_2". A damaged latest falls back to the one before it, a damaged best to the best before it, then
        to the latest.

        Raises InputError when there is none, or none that is whole.
        """
        names = self._complete()
        if which == "latest":
            self.report_incomplete()
            return self._load_first(reversed(names))
        if which == "best":
            if not self.has_best():
                raise InputError(f"There is no best checkpoint in {self.location} yet: use the latest one.")
            return self._load_first(chain(self._best(names), reversed(names)))
        of_step = [name for name in names if f"step_{_order(name)[0]:08d}" == which]
        if of_step:
            which = of_step[-1]
        if which not in names:
            raise InputError(f"There is no checkpoint {which} in {self.location}; it has: {', '.join(names) or 'none'}")
        return load_checkpoint(join(self.location, which))

    def has_best(self) -> bool:
        """Whether a checkpoint was saved as the best."""
        return any(self._best(self._complete()))

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        return sorted({_order(name)[0] for name in self._complete()})

    def report_incomplete(self) -> list[str]:
        """The directories after the last complete checkpoint that lack their commit mark; `say` is called with them."""
        newest = max(map(_order, self._complete()), default=(-1, 0))
        names = [name for name in self._names() if _order(name) > newest]
        if names:
            cause = "lost" if self._local else "lost, or the process that wrote it died before its end"
            self._say(
                f"{', '.join(names)} in {self.location} {'is' if len(names) == 1 else 'are'} passed over: no {META} in "
                f"it ({cause}); restore that file if you have it elsewhere, before the next save removes the rest"
            )
        return names

    def _load_first(self, names: Iterable[str]) -> Checkpoint:
        """The first that is whole."""
        damaged: dict[str, None] = {}
        for name in names:
            if name in damaged:
                continue
            try:
                return load_checkpoint(join(self.location, name))
            except DamagedCheckpoint as error:
                self._say(f"{error} Trying another one that is kept.")
                damaged[name] = None
        if damaged:
            raise InputError(
                f"Every checkpoint is damaged in {self.location}: give the path of another checkpoint, or remove "
                f"these, then {doing_it_again()} computes the run again from its start."
            )
        raise InputError(
            f"There is no checkpoint in {self.location}: start a new run, or give the path of another checkpoint."
        )

    def _list(self) -> list[arrow_fs.FileInfo]:
        return self._fs.get_file_info(arrow_fs.FileSelector(self._root, allow_not_found=True))

    def _names(self) -> list[str]:
        """Names of the directories of checkpoints, whole or not: by step, and of one step in the order written."""
        return sorted((info.base_name for info in self._list() if _NAME.fullmatch(info.base_name)), key=_order)

    def _complete(self) -> list[str]:
        """Those that have their commit mark."""
        names = self._names()
        marks = self._fs.get_file_info([f"{self._root}/{name}/{META}" for name in names])
        return [name for name, mark in zip(names, marks, strict=True) if mark.type == arrow_fs.FileType.File]

    def _best(self, names: list[str]) -> Iterator[str]:
        """Those of the names that were the best when they were saved, newest first."""
        pointed = self._pointed()
        return (name for name in reversed(names) if name == pointed or self._was_best(name))

    def _was_best(self, name: str) -> bool | None:
        """None where it cannot be read, which may be for the moment only."""
        try:
            return bool(read_meta(self._fs, f"{self._root}/{name}", name)["run"].get("best"))
        except InputError as error:
            return None if isinstance(error.__cause__, OSError) else False

    def _pointed(self) -> str | None:
        """The name in the file `best`, which an earlier metadist kept beside the checkpoints."""
        path = f"{self._root}/best"
        found = self._fs.get_file_info(path)
        if found.type != arrow_fs.FileType.File or (found.size or 0) > _MOST_POINTER_BYTES:
            return None
        name, _, proof = read(self._fs, path).decode(errors="replace").strip().partition(" ")
        return name if proof in ("", hashlib.sha256(name.encode()).hexdigest()[:8]) else None

    def _new_name(self, step: int) -> str:
        earlier = [attempt for other, attempt in map(_order, self._names()) if other == step]
        attempt = max(earlier, default=0) + 1
        return f"step_{step:08d}" if attempt == 1 else f"step_{step:08d}_{attempt}"

    def _write(self, name: str, files: dict[str, bytes]) -> None:
        """Writes the files, of which the last is the commit mark."""
        if self._local:
            self._write_and_rename(name, files)
            return
        make_folder(self._fs, f"{self._root}/{name}")
        for file, content in files.items():
            write(self._fs, f"{self._root}/{name}/{file}", content)

    def _write_and_rename(self, name: str, files: dict[str, bytes]) -> None:
        """Through power loss; a step's name then always stands for a whole checkpoint, unless its mark was lost."""
        unfinished = Path(self._root, _UNFINISHED + name)
        unfinished.mkdir()
        try:
            for file, content in files.items():
                write_synced(unfinished / file, content)
            sync_directory(unfinished)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)  # a full disk needs the room
            raise
        self.check_place()  # writing may have taken long
        os.rename(unfinished, Path(self._root, name))
        sync_directory(self._root)

    def _prune(self, step: int) -> None:
        """Of this step and those before it the last few are kept, and the best; later ones, of a try that went further,
        until this one gets there: they may be damaged, and must not count."""
        names = self._complete()
        reached = [name for name in names if _order(name)[0] <= step]
        last_of_step = {_order(name)[0]: name for name in reached}
        unread = [name for name in reached if self._was_best(name) is None]
        kept = {*list(last_of_step.values())[-self._keep_last :], *unread, next(self._best(reached), None)}
        for name in reached:
            if name not in kept:
                self._delete(name)

    def _delete_unfinished(self) -> None:
        """What a process that died while writing or deleting left behind."""
        complete = self._complete()
        for info in self._list():
            ours = info.base_name.startswith(_UNFINISHED) or _NAME.fullmatch(info.base_name)
            if ours and info.type == arrow_fs.FileType.Directory and info.base_name not in complete:
                self._delete(info.base_name)

    def _delete(self, name: str) -> None:
        """The commit mark first, so that a half-deleted directory is no checkpoint."""
        mark = f"{self._root}/{name}/{META}"
        if self._fs.get_file_info(mark).type == arrow_fs.FileType.File:
            self._fs.delete_file(mark)
        self._fs.delete_dir(f"{self._root}/{name}")

    def check_place(self) -> None:
        """Raises PlaceLost where it is no longer the one that this run writes to. It is made at the first save, and
        never again."""
        self._guard()
        if self._held is not None:
            self._held.check()
        else:
            make_folder(self._fs, self._root)
            if isinstance(self._fs, arrow_fs.LocalFileSystem):
                self._held = Held(self._root)
        if self._claim is None:
            return
        path = f"{self._root}/{_OWNER}"
        there = self._fs.get_file_info(path).type == arrow_fs.FileType.File
        found = read(self._fs, path) if there else b""
        if found != self._claim:
            other = " ".join(found.decode(errors="replace").split()[:-1])
            raise PlaceLost(
                f"{self.location} {f'was taken over by another run ({other})' if other else 'was emptied'} while this "
                "run was writing checkpoints to it, so that this run ends: give each run its own checkpoint.location"
            )


def _order(name: str) -> tuple[int, int]:
    """The step, and which of the attempts to save it."""
    match = _NAME.fullmatch(name)
    assert match
    return int(match[2]), 0 if match[1] else int(match[3] or 1)
