"""The checkpoints of a run: the last few and the best, each written whole or not at all.

On a local path a directory appears by one rename; at a URI that pyarrow.fs understands (`file://`, `s3://`, ...) files
appear one by one, and what lacks `meta.json` is ignored.
"""

import hashlib
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

from pyarrow import fs as arrow_fs

from metadist.checkpoint.format import (
    FILES,
    META,
    Checkpoint,
    DamagedCheckpoint,
    encode,
    join,
    load_checkpoint,
    open_location,
    read,
    step_name,
    sync_directory,
    write,
    write_synced,
)  # fmt: skip
from metadist.core.errors import InputError, PlaceLost
from metadist.core.files import Held

_FOLDER = re.compile(r"(?:\.old_)?(step_(\d{8,}))")
MOST_POINTER_BYTES = 4096
_ASIDE, _UNFINISHED, _OWNER = ".old_", ".tmp_", "owner"


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


class CheckpointStore:
    """The checkpoints of one run under `location`, a local path or a URI. One process writes; any number may read.

    Keeps the last `keep_last` and the best. `say` is told, in a sentence, of a damaged one that was passed over.
    `guard` is called before and after each one is written: it raises where this run may no longer write.
    """

    def __init__(
        self,
        location: str | Path,
        keep_last: int = 3,
        say: Callable[[str], None] = _to_stderr,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        if keep_last < 1:
            raise InputError(f"keep_last is {keep_last}: at least 1 checkpoint must be kept.")
        self.location = str(location)
        self._fs, self._root = open_location(self.location)
        self._local = "://" not in self.location
        self._keep_last, self._say, self._guard = keep_last, say, guard
        self._held: Held | None = None
        self._claim: bytes | None = None

    def claim(self, holder: str) -> None:
        """Take over a place at a URI, where no lock file holds: others that write there find out at their next save."""
        self._claim = f"{holder} {uuid.uuid4().hex}\n".encode()
        self._fs.create_dir(self._root, recursive=True)
        write(self._fs, f"{self._root}/{_OWNER}", self._claim)

    def save(self, checkpoint: Checkpoint, *, best: bool = False) -> str:
        """Writes it, replacing one of the same step, then deletes those no longer kept; returns its path or URI.

        When this returns, the checkpoint is complete (on a local disk: through power loss). Raises TypeError when
        `trainer` holds anything but plain values and tensors, OSError when the place cannot be written, PlaceLost when
        it is another one than at the first save.
        """
        name = step_name(checkpoint.step)
        files = encode(checkpoint)
        self._check_place()
        try:
            self._settle_leftovers()
            if self._local:
                self._write_renamed(name, files)
            else:
                self._write_marked(name, files)
            if best:
                self.point_best_to(checkpoint.step)
            self._prune(checkpoint.step)
        except OSError:
            self._check_place()  # which tells why, where the place was taken away meanwhile
            raise
        self._check_place()
        return join(self.location, name)

    def _check_place(self) -> None:
        """It is made at the first save, and never again."""
        self._guard()
        if self._held is not None:
            self._held.check()
        else:
            self._fs.create_dir(self._root, recursive=True)
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

    def load(self, which: str = "latest") -> Checkpoint:
        """ "latest", "best", or a name such as "step_00001200". A damaged latest falls back to the one before it, a
        damaged best to the latest.

        Raises InputError when there is none, or none that is whole.
        """
        folders = self._folders()
        if which == "latest":
            return self._load_latest(folders)
        if which == "best":
            return self._load_best(folders)
        step = next((step for step in folders if step_name(step) == which), None)
        if step is None:
            has = ", ".join(map(step_name, folders)) or "none"
            raise InputError(f"There is no checkpoint {which} in {self.location}; it has: {has}.")
        return self._load_step(step, folders)

    def has_best(self) -> bool:
        """Whether a checkpoint was saved as the best."""
        return self._best() is not None

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        return sorted(self._folders())

    def tell_passed_over(self) -> list[str]:
        """The steps later than every complete checkpoint that lack their commit mark; `say` is told of them."""
        newest = max(self._folders(), default=-1)
        names = [info.base_name for info in self._list() if _FOLDER.fullmatch(info.base_name)]
        names = sorted(name for name in names if not name.startswith(_ASIDE) and _step(name) > newest)
        if names:
            cause = "lost" if self._local else "lost, or the process that wrote it died before its end"
            self._say(
                f"{', '.join(names)} in {self.location} {'is' if len(names) == 1 else 'are'} passed over: no {META} in "
                f"it ({cause}); restore that file if you have it elsewhere, before the next save removes the rest"
            )
        return names

    def _load_latest(self, folders: dict[int, list[str]]) -> Checkpoint:
        self.tell_passed_over()
        for step in sorted(folders, reverse=True):
            try:
                return self._load_step(step, folders)
            except DamagedCheckpoint as error:
                self._say(f"{error} Trying the checkpoint before it.")
        if folders:
            raise InputError(
                f"Every checkpoint is damaged in {self.location}: give the path of another checkpoint, or remove "
                "these, then --resume auto computes the run again from its start."
            )
        raise InputError(
            f"There is no checkpoint in {self.location}: start a new run, or give the path of another checkpoint."
        )

    def _load_best(self, folders: dict[int, list[str]]) -> Checkpoint:
        name = self._best()
        if name is None:
            raise InputError(f"There is no best checkpoint in {self.location} yet: use the latest one.")
        try:
            return self._load_step(int(name.removeprefix("step_")), folders)
        except DamagedCheckpoint as error:
            self._say(f"{error} It was the best; trying the latest.")
            return self._load_latest(folders)

    def _load_step(self, step: int, folders: dict[int, list[str]]) -> Checkpoint:
        newest, *aside = folders.get(step, [step_name(step)])
        try:
            return load_checkpoint(join(self.location, newest))
        except DamagedCheckpoint:
            if not aside:
                raise
            return load_checkpoint(join(self.location, aside[0]))

    def _folders(self) -> dict[int, list[str]]:
        """Step -> names of its complete directories, ascending: the one of its name, then the one that was moved aside
        for it, if the process died meanwhile."""
        names = [info.base_name for info in self._list() if info.type == arrow_fs.FileType.Directory]
        names = sorted(name for name in names if _FOLDER.fullmatch(name))
        marks = self._fs.get_file_info([f"{self._root}/{name}/{META}" for name in names])
        whole = [name for name, mark in zip(names, marks, strict=True) if mark.type == arrow_fs.FileType.File]
        found: dict[int, list[str]] = {}
        for name in sorted(whole, key=lambda name: (_step(name), name.startswith(_ASIDE))):
            found.setdefault(_step(name), []).append(name)
        return found

    def _list(self) -> list[arrow_fs.FileInfo]:
        return self._fs.get_file_info(arrow_fs.FileSelector(self._root, allow_not_found=True))

    def _best(self) -> str | None:
        """The name that the pointer holds; where that is damaged, the last that was saved as the best."""
        path = f"{self._root}/best"
        found = self._fs.get_file_info(path)
        if found.type != arrow_fs.FileType.File:
            return None
        if found.size > MOST_POINTER_BYTES:
            raise InputError(f"{join(self.location, 'best')} has {found.size} bytes and is no pointer: remove it")
        name, _, proof = read(self._fs, path).decode(errors="replace").strip().partition(" ")
        if _FOLDER.fullmatch(name) and not name.startswith(_ASIDE) and proof in ("", _proof(name)):  # "": by 0.1.0
            return name
        folders = self._folders()
        return next((step_name(step) for step in sorted(folders, reverse=True) if self._was_best(step, folders)), None)

    def _is_whole(self, name: str) -> bool:
        try:
            load_checkpoint(join(self.location, name))
        except InputError:
            return False
        return True

    def _was_best(self, step: int, folders: dict[int, list[str]]) -> bool:
        try:
            return bool(self._load_step(step, folders).run.get("best"))
        except InputError:
            return False

    def point_best_to(self, step: int) -> None:
        """Make the checkpoint of `step` the best one."""
        name, target = step_name(step), f"{self._root}/best"
        content = f"{name} {_proof(name)}\n".encode()
        if not self._local:
            write(self._fs, target, content)
            return
        temporary = Path(self._root, f"{_UNFINISHED}best")
        write_synced(temporary, content)
        os.replace(temporary, target)
        sync_directory(self._root)

    def _write_renamed(self, name: str, files: dict[str, bytes]) -> None:
        root = Path(self._root)
        temporary = root / f"{_UNFINISHED}{name}_{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        try:
            for file, content in files.items():
                write_synced(temporary / file, content)
            sync_directory(temporary)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room
            raise
        self._check_place()  # writing may have taken long
        if (root / name).exists():
            self._move(name, _ASIDE + name)
        os.rename(temporary, root / name)
        sync_directory(root)
        if (root / (_ASIDE + name)).exists():
            self._delete(_ASIDE + name)

    def _write_marked(self, name: str, files: dict[str, bytes]) -> None:
        folder = f"{self._root}/{name}"
        if self._fs.get_file_info(folder).type == arrow_fs.FileType.Directory:
            self._move(name, _ASIDE + name)
        self._fs.create_dir(folder, recursive=True)
        for file, content in files.items():
            write(self._fs, f"{folder}/{file}", content)

    def _move(self, name: str, target: str) -> None:
        """One rename, or where there is none, copies with the commit mark last."""
        if self._local:
            os.rename(f"{self._root}/{name}", f"{self._root}/{target}")
            return
        self._fs.create_dir(f"{self._root}/{target}", recursive=True)
        for file in FILES:
            self._fs.copy_file(f"{self._root}/{name}/{file}", f"{self._root}/{target}/{file}")
        self._delete(name)

    def _settle_leftovers(self) -> None:
        """Undoes what a process that died while writing or deleting left behind."""
        whole = {name for names in self._folders().values() for name in names}
        for info in self._list():
            ours = info.base_name.startswith(_UNFINISHED) or _FOLDER.fullmatch(info.base_name)
            if ours and info.type == arrow_fs.FileType.Directory and info.base_name not in whole:
                self._delete(info.base_name)
        for aside in sorted(name for name in whole if name.startswith(_ASIDE)):
            name = aside.removeprefix(_ASIDE)
            if name in whole and self._is_whole(name):
                self._delete(aside)
                continue
            if name in whole:
                self._delete(name)
            self._move(aside, name)

    def _prune(self, step: int) -> None:
        """Of this step and those before it the last few are kept; later ones, of a try that went further, until this
        one gets there: they may be damaged, and must not count."""
        folders = self._folders()
        earlier = sorted(other for other in folders if other <= step)[-self._keep_last :]
        kept = {step_name(other) for other in [*earlier, *(other for other in folders if other > step)]} | {
            self._best()
        }
        for info in self._list():
            if _FOLDER.fullmatch(info.base_name) and info.base_name not in kept:
                self._delete(info.base_name)

    def _delete(self, name: str) -> None:
        """The commit mark first, so that a half-deleted directory is no checkpoint."""
        mark = f"{self._root}/{name}/{META}"
        if self._fs.get_file_info(mark).type == arrow_fs.FileType.File:
            self._fs.delete_file(mark)
        self._fs.delete_dir(f"{self._root}/{name}")


def _step(folder: str) -> int:
    match = _FOLDER.fullmatch(folder)
    assert match
    return int(match[2])


def _proof(name: str) -> str:
    """Tells a pointer to another step from one whose bits flipped."""
    return hashlib.sha256(name.encode()).hexdigest()[:8]
