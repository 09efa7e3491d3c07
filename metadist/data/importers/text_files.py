"""Records of texts, out of delimited files, JSON lines, Parquet and Arrow files, and folders of .txt files per class.

Files called train, validation or test (as in train.csv, or train-00000-of-00001.parquet of a Hugging Face data set) are
these splits, where there are several files.
"""

import csv
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from metadist.core.errors import InputError
from metadist.core.task import Split
from metadist.data.files import files_below, read_regular, require_regular, within
from metadist.data.importers.class_folders import ClassFolders
from metadist.data.importers.delimited import limited_lines, open_text, sniff, suffix
from metadist.data.importers.names import clean, lacking
from metadist.data.importers.table_files import schema_of, typed_batches
from metadist.data.notes import Notes, shown
from metadist.data.splits import split_of_file

DIGITS = 4300  # of a whole number, as Python reads them
TXT_BYTES = 1 << 24
TABLES = (".parquet", ".arrow")
FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", *TABLES)
_SIDE_FILES = ("dataset_info.json", "dataset_infos.json", "state.json")  # what Hugging Face's library lays beside data


class Unusable(Exception):
    """What is wrong with a record."""


Record = dict[str, Any] | Unusable


@dataclass(frozen=True)
class _File:
    path: Path
    split: Split | None = None  # that its name says
    label: str | None = None  # of a .txt file


class TextFiles:
    """The records of all files of some sources, re-readable; `notes` says which files are left out.

    A source is a file, or a folder of files, or a folder with a folder of .txt files per class (see `ClassFolders`,
    which `classes_only` and `merge` are for). Raises InputError where there is nothing to read.
    """

    def __init__(self, sources: Sequence[Path], notes: Notes, classes_only: bool = False, merge: bool = False) -> None:
        self.sources = sources
        self.name = ", ".join(map(str, sources))
        self.files: list[_File] = []
        folders = ClassFolders("texts", ".txt files", (".txt",), classes_only, merge)
        for source in sources:
            self.files += (
                _files_in(source, folders, notes) if source.is_dir() else [_File(source, split_of_file(source))]
            )
        self._check_splits()
        self._names_in_schema: dict[Path, dict[str, list[str]]] = {}

    def has(self, column: str) -> bool:
        """Whether all files have a column of that name (of JSON lines: the first record), or labels by folder."""
        return all(file.label is not None or column in _columns(file.path, column) for file in self.files)

    def place(self, number: int, line: int) -> str:
        """Where a record is, in words: "line 3", "line 3 of test.csv", "neg/1.txt"."""
        file = self.files[number]
        root = next((source for source in self.sources if file.path.is_relative_to(source)), file.path)
        name = within(file.path, root)
        if file.label is not None:
            return name
        return f"line {line}" if len(self.files) == 1 else f"line {line} of {name}"

    def records(self, wanted: Sequence[str], text: str, label: str, notes: Notes) -> Iterator[tuple[int, int, Record]]:
        """The number of the file, the (last) line (of a Parquet or Arrow file, the row), and the record or what is
        wrong with it. `wanted` are its columns, among them that of the `text` and of the `label`."""
        for number, file in enumerate(self.files):
            if file.label is not None:
                yield number, 1, {text: read_txt(file.path), label: file.label}
                continue
            for line, record in records_in(file.path, wanted, notes):
                if isinstance(record, dict) and type(record.get(label)) is int:
                    record = self._named(record, label, file.path, notes)
                yield number, line, record

    def _named(self, record: dict[str, Any], label: str, path: Path, notes: Notes) -> Record:
        """A record whose label is a number with its name in its place, where the data set says what it stands for."""
        if path not in self._names_in_schema:
            self._names_in_schema[path] = _described_in(path)
        number, names = record[label], self._names_in_schema[path].get(label) or self._names_beside.get(label)
        if not names:
            return record
        if not 0 <= number < len(names):
            return Unusable(f"has label {number}, which the data set has no name for")
        why, remedy = "as the data set's description says", "rename the column for the bare numbers"
        notes.add("labels named", why, f"{number} as {shown(names[number])!r}", remedy)
        return record | {label: names[number]}

    @cached_property
    def _names_beside(self) -> dict[str, list[str]]:
        """The names of numbered labels by column, of the description that lies in a folder of the sources."""
        for source in self.sources:
            found = _described(source) if source.is_dir() else {}
            if found:
                return found
        return {}

    def _check_splits(self) -> None:
        """A file alone is no split, whatever it is called; of several, all are or none."""
        if len(self.files) == 1 and self.files[0].label is None:
            self.files = [_File(self.files[0].path)]
        named = [file for file in self.files if file.split]
        if named and len(named) < len(self.files):
            other = next(file for file in self.files if not file.split)
            raise InputError(
                f"{shown(named[0].path)} is named for a split and {shown(other.path)} beside it is not; name each "
                "train, validation or test, or none"
            )


def _files_in(source: Path, folders: ClassFolders, notes: Notes) -> list[_File]:
    listed = list(files_below(source, source, Notes()))
    if not any(_is_table(file) for file in listed) and any(suffix(file) == ".txt" for file in listed):
        classes, splits = folders.read(source, notes)
        return [_File(file, splits.get(label), label) for label, files in classes.items() for file in files]
    found = []
    for file in files_below(source, source, notes):
        if _is_table(file):
            found.append(_File(file, split_of_file(file, source)))
        else:
            remedy = "convert or rename them to have them imported"
            notes.add("files left out", f"no {', '.join(FORMATS)} files", within(file, source), remedy)
    if not found:
        raise InputError(
            f"{shown(source)} holds no {', '.join(FORMATS)} file and no class folders of .txt files; convert the data"
        )
    return sorted(found, key=lambda file: file.path)


def _is_table(file: Path) -> bool:
    return suffix(file) in FORMATS and file.name not in _SIDE_FILES


def read_txt(path: Path) -> str:
    """A whole .txt file. Raises InputError where it is not UTF-8."""
    try:
        return read_regular(path, TXT_BYTES).decode("utf-8-sig")
    except UnicodeError as error:
        raise InputError(f"{shown(path)} is not UTF-8 text; convert it to UTF-8") from error


def _described(source: Path) -> dict[str, list[str]]:
    """The names of numbered labels in dataset_infos.json, dataset_info.json, or at the head of README.md."""
    for name in (*_SIDE_FILES[:2], "README.md"):
        if not (source / name).is_file():
            continue
        content = read_regular(source / name, TXT_BYTES).decode(errors="replace")
        if found := _class_labels(_head(content) if name == "README.md" else _json(content)):
            return found
    return {}


def _head(readme: str) -> Any:
    """What the YAML at the head of a README says; nothing where it cannot be read, or has aliases, by which a few lines
    may stand for any number of values."""
    import yaml

    text = readme.split("---")[1] if readme.startswith("---") else ""
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            return None
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def _json(text: str | bytes) -> Any:
    """What a description in JSON says; nothing where it cannot be read."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _class_labels(told: Any) -> dict[str, list[str]]:
    """The lists of names anywhere in a description, by column: {"label": {"names": [...], "_type": "ClassLabel"}} or
    {"name": "label", "dtype": {"class_label": {"names": {"0": ...}}}}."""
    found: dict[str, list[str]] = {}
    if isinstance(told, dict):
        kind = told.get("dtype")
        names = kind.get("class_label", {}).get("names") if isinstance(kind, dict) else None
        if names and isinstance(told.get("name"), str):
            found[told["name"]] = [str(name) for name in (names.values() if isinstance(names, dict) else names)]
        for column, inner in told.items():
            if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" and isinstance(inner.get("names"), list):
                found[str(column)] = [str(name) for name in inner["names"]]
            found = _class_labels(inner) | found
    elif isinstance(told, list):
        for inner in told:
            found = _class_labels(inner) | found
    return found


def _described_in(path: Path) -> dict[str, list[str]]:
    """The names of numbered labels that a Parquet or Arrow file of Hugging Face's library carries, by column."""
    text = (schema_of(path).metadata or {}).get(b"huggingface", b"{}") if suffix(path) in TABLES else b"{}"
    return _class_labels(_json(text))


def _columns(path: Path, wanted: str) -> list[str]:
    if suffix(path) in (".csv", ".tsv"):
        return [clean(name) for name in sniff(path, [wanted], Notes()).header]
    if suffix(path) in TABLES:
        return schema_of(path).names
    first = next((record for _, record in records_in(path, [wanted], Notes())), None)
    return [*first] if isinstance(first, dict) else []


def records_in(source: Path, wanted: Sequence[str], notes: Notes) -> Iterator[tuple[int, Record]]:
    """Each record of a file, or what is wrong with it, with the number of its (last) line."""
    if suffix(source) not in FORMATS:
        raise InputError(f"{source} is no {', '.join(FORMATS)} file; convert it to one of them")
    try:
        if suffix(source) in TABLES:
            yield from _stored(source, wanted)
        elif suffix(source) in (".csv", ".tsv"):
            yield from _csv(source, wanted, notes)
        else:
            with open_text(source) as file:
                for number, line in enumerate(limited_lines(file, source), start=1):
                    if line.strip():
                        yield number, _json_object(line)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        why = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(f"{source} cannot be read ({why}); check the path and the file") from error
    except UnicodeError as error:
        place = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        raise InputError(f"{source} is not UTF-8 text{place}; convert it to UTF-8") from error


def _stored(source: Path, wanted: Sequence[str]) -> Iterator[tuple[int, Record]]:
    require_regular(source)
    names, row = schema_of(source).names, 0
    for column in wanted:
        if column not in names:
            raise InputError(f"{source} {lacking(column, names)}")
    for batch in typed_batches(source, [*wanted]):
        for record in batch.to_pylist():
            row += 1
            yield row, record


def _csv(source: Path, wanted: Sequence[str], notes: Notes) -> Iterator[tuple[int, Record]]:
    dialect = sniff(source, wanted, notes)
    header = [clean(name) for name in dialect.header]
    if not header:
        raise InputError(f"{source} is empty; give a file with one text per row")
    for column in wanted:
        if header.count(clean(column)) > 1:
            raise InputError(f"{source} has two columns named {column!r}; rename one of them")
        if clean(column) not in header:
            raise InputError(f"{source} {lacking(column, header)}")
    places = {column: header.index(clean(column)) for column in wanted}
    with open_text(source) as file:
        reader = csv.reader(limited_lines(file, source), delimiter=dialect.delimiter, strict=True)
        try:
            while not next(reader):  # the header, and empty lines before it
                pass
            for record in reader:
                if len(record) == len(header):
                    yield reader.line_num, {column: record[place] for column, place in places.items()}
                elif record:
                    yield reader.line_num, Unusable("has more or fewer fields than the header")
        except csv.Error as error:
            raise InputError(f"line {reader.line_num} of {source} is no CSV ({error}); mend it") from error


def _json_object(line: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return Unusable("is not JSON: write one object per line")
    except ValueError:
        return Unusable(f"has a number of more than {DIGITS} digits")
    except RecursionError:
        return Unusable("is nested too deep")
    return record if isinstance(record, dict) else Unusable("is not a JSON object: write one object per line")
