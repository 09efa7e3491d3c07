"""Delimited text (CSV, TSV) as people have it: other delimiters, byte order marks, UTF-16, gzip, long fields, decimal
commas, and many ways to say that a value is missing."""

import csv
import gzip
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute

from metadist.core.errors import InputError
from metadist.data.files import open_regular
from metadist.data.importers.names import MISSING, clean
from metadist.data.notes import Notes, shown

pc: Any = pyarrow.compute  # its functions are made at run time, which type checkers do not see
LINE_BYTES = 1 << 24
_DELIMITERS = (",", ";", "\t", "|")
_INTEGER = r"^[+-]?[0-9]{1,18}$"
_LONG = r"^[+-]?[0-9]{19,}$"
_FLOAT = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$|^[+-]?[iI]nf(inity)?$"
_COMMA = r"^[+-]?[0-9]+,[0-9]+([eE][+-]?[0-9]+)?$"


@dataclass(frozen=True)
class Dialect:
    """How a file is written: its encoding, what stands between the fields, and the names in its header."""

    encoding: str
    delimiter: str
    header: list[str]


def packed(file: Path) -> bool:
    """Whether a file is packed by gzip, by its name."""
    return file.suffix.lower() == ".gz"


def suffix(file: Path) -> str:
    """The file's suffix in lower case, without .gz."""
    return (file.with_suffix("") if packed(file) else file).suffix.lower()


@contextmanager
def open_text(source: Path) -> Iterator[io.TextIOWrapper]:
    """A text file, unpacked where it ends in .gz, in the encoding of its byte order mark, else UTF-8."""
    with open_regular(source) as raw:
        file: Any = gzip.GzipFile(fileobj=raw) if packed(source) else raw
        start = file.read(4)
        file.seek(0)
        encoding = "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        with io.TextIOWrapper(file, encoding=encoding, newline="") as text:
            yield text


def limited_lines(file: io.TextIOWrapper, source: Path) -> Iterator[str]:
    """The lines of a file; raises InputError at one that is too long to be one."""
    while line := file.readline(LINE_BYTES):
        if len(line) == LINE_BYTES:
            raise InputError(f"{shown(source)} has a line longer than {LINE_BYTES >> 20} MiB; is it a text file?")
        yield line


def sniff(source: Path, wanted: Sequence[str], notes: Notes) -> Dialect:
    """The dialect of a file: the delimiter by which its header has the most `wanted` names, then the most names.

    Raises InputError when the header cannot be read.
    """
    default = "\t" if suffix(source) == ".tsv" else ","
    csv.field_size_limit(LINE_BYTES)
    with open_text(source) as file:
        lines = list(_first_record(limited_lines(file, source)))
        encoding = file.encoding
    if any("\0" in line for line in lines):
        raise InputError(f"{shown(source)} has zero bytes and is no UTF-8 text; convert it to UTF-8")
    if lines and re.match(r"sep=.\r?\n", lines[0]):
        raise InputError(f"{shown(source)} begins with {lines[0].strip()!r}, which only Excel reads; remove that line")
    headers = {}
    for delimiter in (default, *_DELIMITERS):
        try:
            headers[delimiter] = next(filter(None, csv.reader(lines, delimiter=delimiter, strict=True)), [])
        except csv.Error:
            continue
    if not headers:
        raise InputError(f"{shown(source)} has a header that is no {suffix(source)[1:]}; mend or export it again")
    names = {clean(name) for name in wanted}
    scores = {d: (len(names & {clean(name) for name in header}), len(header)) for d, header in headers.items()}
    chosen = max(scores, key=lambda delimiter: scores[delimiter])
    if chosen != default and scores[chosen] > scores.get(default, (0, 0)):
        why = f"fields are separated by {chosen!r}"
        notes.add("files read in another form", why, shown(source), f"write {default!r} between the fields if not")
        return Dialect(encoding, chosen, headers[chosen])
    return Dialect(encoding, default, headers.get(default, []))


def _first_record(lines: Iterator[str]) -> Iterator[str]:
    """The lines of the header: quoted names may hold line breaks."""
    quotes = 0
    for line in lines:
        yield line
        quotes += line.count('"')
        if line.strip() and quotes % 2 == 0:
            return


class TextColumn:
    """What the texts of one column turn out to be, over all files: `look` at all of them, then `read` them."""

    def __init__(self, name: str, source: Path, notes: Notes) -> None:
        self.name, self.source, self.notes = name, source, notes
        self._seen: dict[str, str] = {}  # kinds of values, each with an example
        self._markers: Counter[str] = Counter()  # what stands where a value is missing
        self._comma_fields = False

    def look(self, values: pa.Array, delimiter: str) -> None:
        """Take note of some values (strings) of a file with this delimiter."""
        texts = pc.utf8_trim_whitespace(values)
        missing = _is_missing(texts)
        for found in pc.filter(texts, missing).value_counts().to_pylist():
            if found["values"]:
                self._markers[found["values"]] += found["counts"]
        texts = pc.filter(texts, pc.invert(missing)).unique()
        for kind, pattern in (("integer", _INTEGER), ("long", _LONG), ("float", _FLOAT), ("comma", _COMMA)):
            found = pc.match_substring_regex(texts, pattern)
            self._note_kind(pc.filter(texts, found), kind)
            texts = pc.filter(texts, pc.invert(found))
        self._comma_fields |= delimiter == "," and "comma" in self._seen
        bools = pc.is_in(pc.utf8_lower(texts), pa.array(["true", "false"]))
        self._note_kind(pc.filter(texts, bools), "bool")
        self._note_kind(pc.filter(texts, pc.invert(bools)), "text")

    def _note_kind(self, texts: pa.Array, kind: str) -> None:
        if kind == "long" and len(texts):
            kind = next((k for k, t in (("integer", pa.int64()), ("unsigned", pa.uint64())) if _fits(texts, t)), "text")
        if kind == "integer" and len(texts) and pc.any(pc.starts_with(texts, "-")).as_py():
            self._seen.setdefault("negative", texts[0].as_py())
        if len(texts):
            self._seen.setdefault(kind, texts[0].as_py())

    def settle(self) -> pa.DataType:
        """The narrowest type that holds all values. Raises InputError where commas in numbers are ambiguous."""
        seen = self._seen.keys() - {"negative"}
        if not seen:
            return pa.null()
        if "text" in seen or ("bool" in seen and len(seen) > 1) or {"unsigned", "negative"} <= self._seen.keys():
            return pa.string()
        if "comma" in seen:
            column, example = f"column {shown(self.name)!r} of {shown(self.source)}", self._seen["comma"]
            if self._comma_fields or "float" in seen:
                raise InputError(
                    f"{column} has {example!r}, of which the comma may be a decimal point or may group digits; write "
                    "all its numbers with a decimal point and without grouping"
                )
            why = f"column {shown(self.name)!r} is read with the comma as decimal point"
            remedy = "write numbers with a decimal point if it groups digits"
            self.notes.add("columns with decimal commas", why, example, remedy)
        for marker, count in self._markers.items():
            why, column = f"they say {shown(marker)!r}", f"column {shown(self.name)!r}"
            self.notes.add("values read as missing", why, column, "write a number there if it is one", count)
        if seen & {"comma", "float"}:
            return pa.float64()
        return pa.bool_() if "bool" in seen else pa.uint64() if "unsigned" in seen else pa.int64()

    @property
    def example(self) -> str:
        """A value that is no number."""
        return self._seen.get("text", self._seen.get("bool", ""))

    def read(self, values: pa.Array, kind: pa.DataType) -> pa.Array:
        """The values as `kind`, null where they say that they are missing; strings stay as they are."""
        if pa.types.is_string(kind):
            return values
        texts = pc.utf8_trim_whitespace(values)
        texts = pc.if_else(_is_missing(texts), pa.scalar(None, pa.string()), texts)
        if pa.types.is_null(kind):
            return pa.nulls(len(texts))
        texts = pc.replace_substring(pc.replace_substring_regex(texts, r"^\+", ""), ",", ".")
        return pc.utf8_lower(texts).cast(kind)


def _is_missing(trimmed: pa.Array) -> pa.Array:
    return pc.is_in(pc.utf8_lower(trimmed), pa.array(sorted(MISSING)))


def _fits(texts: pa.Array, kind: pa.DataType) -> bool:
    try:
        pc.replace_substring_regex(texts, r"^\+", "").cast(kind)
    except pa.ArrowInvalid:
        return False
    return True
