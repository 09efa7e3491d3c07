"""A folder per class, or split folders (train/, validation/, test/) with a folder per class each."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from metadist.core.errors import InputError
from metadist.core.task import Split
from metadist.data.files import entries, files_below, made_by_tool, note_left_out, note_link, within
from metadist.data.importers.names import clean, natural, note_cleaned, note_lookalikes
from metadist.data.notes import Notes, shown
from metadist.data.splits import merged_or_refused, split_named

Classes = dict[str, list[Path]]


@dataclass(frozen=True)
class ClassFolders:
    """How class folders are read.

    `suffixes` of the files that are taken, and `what` these are ("pictures"), `make` what to convert others to;
    `classes_only`: folders called train, validation or test are classes like others; `merge`: what split folders hold
    is put together, class by class, and the split folders do not count.
    """

    what: str
    make: str
    suffixes: Collection[str]
    classes_only: bool = False
    merge: bool = False

    def read(self, source: Path, notes: Notes) -> tuple[Classes, dict[str, Split]]:
        """The files of each class in natural order, and each class's split where there are split folders. What is left
        out or merged is noted. Raises InputError where there are no classes, or classes in two splits."""
        folders = _folders(source, source, notes)
        if not folders:
            raise InputError(f"{source} holds no class folders; make one folder of {self.what} per class")
        named: dict[Path, Split | None] = {folder: self._split(folder) for folder in folders}
        stray = [folder.name for folder, split in named.items() if not split]
        if stray and len(stray) < len(folders):
            raise InputError(
                f"{source} has split folders and beside them {stray[0]!r}; move that into one of them or away, or take "
                "all as classes with --classes-only"
            )
        classes: Classes = {}
        found: dict[str, set[Split]] = {}
        for folder, split in named.items():
            for inner in _folders(folder, source, notes) if split else [folder]:
                name = _class_name(inner, source, notes)
                if split:
                    found.setdefault(name, set()).add(split)
                classes.setdefault(name, []).extend(self._files(inner, source, notes))
        if not classes:
            raise InputError(
                f"the split folders in {source} hold no class folders; make one folder of {self.what} per class"
            )
        note_lookalikes("classes", classes, notes)
        splits = merged_or_refused(found, "classes", str(source), self.merge, notes)
        return {name: sorted(files, key=lambda file: natural(str(file))) for name, files in classes.items()}, splits

    def _split(self, folder: Path) -> Split | None:
        return None if self.classes_only else split_named(folder.name)

    def _files(self, folder: Path, source: Path, notes: Notes) -> list[Path]:
        files = []
        for file in files_below(folder, source, notes):
            if file.suffix.lower() not in self.suffixes:
                remedy = f"convert them to {self.make} to have them imported"
                notes.add("files left out", f"no {self.what} by their suffix", within(file, source), remedy)
                continue
            files.append(file)
            if file.parent != folder:
                example = f"{within(file, source)} into {shown(folder.name)!r}"
                remedy = "make them class folders of their own if they are classes"
                notes.add(f"{self.what} merged", "of folders inside a class folder into the class", example, remedy)
        if not files:
            raise InputError(
                f"class folder {shown(folder)} holds no {self.what.removesuffix('s')} files "
                f"({', '.join(sorted(self.suffixes)[:3])}, ...); add some or remove it"
            )
        return files


def _class_name(folder: Path, source: Path, notes: Notes) -> str:
    try:
        folder.name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the name of folder {within(folder, source)} is not UTF-8; rename the folder") from error
    if clean(folder.name) != folder.name:
        note_cleaned("names of class folders", folder.name, notes)
    return clean(folder.name)


def _folders(folder: Path, source: Path, notes: Notes) -> list[Path]:
    """The folders in a folder of folders; what else lies there is noted."""
    if not folder.is_dir():
        raise InputError(f"{shown(folder)} is not a folder; give the folder that holds the class folders")
    found: list[Path] = []
    for entry in entries(folder):
        if made_by_tool(entry.name):
            note_left_out(entry, source, notes)
        elif not entry.is_dir():
            why = "they lie beside the class folders"
            notes.add("files left out", why, within(entry, source), "move them into the folder of their class")
        elif entry.is_symlink() and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(entry)):
            why = "they lead back to the source"
            notes.add("linked folders left out", why, within(entry, source), "remove the link")
        else:
            note_link(entry, source, notes)
            found.append(entry)
    return found
