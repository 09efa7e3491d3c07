"""Delimited text (CSV, TSV) as people have it: other delimiters, byte order marks, UTF-16, gzip, long fields, decimal
commas, and many ways to say that a value is missing."""

import csv
import gzip
import io
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
_KINDS = {  # of values; the first that matches counts
    "integer": r"^[+-]?[0-9]{1,18}$",
    "long": r"^[+-]?[0-9]{19,}$",
    "float": r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$|^[+-]?[iI]nf(inity)?$",
    "comma": r"^[+-]?[0-9]+,[0-9]+([eE][+-]?[0-9]+)?$",
    "bool": r"^(?i:true|false)$",
    "text": "",
}


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
        start = file.read(2)
        file.seek(0)
        encoding = "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
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
    if lines and lines[0].startswith("sep=") and len(lines[0].rstrip("\r\n")) == 5:
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
    if scores[chosen] <= scores.get(default, (0, 0)):
        chosen = default
    if chosen != default:
        why = f"fields are separated by {chosen!r}"
        notes.add("files read in another form", why, shown(source), f"write {default!r} between the fields if not")
    return Dialect(encoding, chosen, headers.get(chosen, []))


def _first_record(lines: Iterator[str]) -> Iterator[str]:
    """The lines of the header: quoted names may hold line breaks."""
    quotes = 0
    for line in lines:
        yield line
        quotes += line.count('"')
        if line.strip() and quotes % 2 == 0:
            return


class TextColumn:
    """The type of a column of texts, over all files: `look` at all of its values, then `read` them as the type."""

    def __init__(self, name: str, source: Path, notes: Notes) -> None:
        self.name, self.source, self.notes = name, source, notes
        self._seen: dict[str, str] = {}  # kinds of values, each with an example
        self._markers: Counter[str] = Counter()  # what stands where a value is missing

    def look(self, values: pa.Array, delimiter: str) -> None:
        """Take note of some values (strings) of a file with this delimiter."""
        texts = pc.utf8_trim_whitespace(values)
        missing = _is_missing(texts)
        for marker in pc.filter(texts, missing).value_counts().to_pylist():
            if marker["values"]:
                self._markers[marker["values"]] += marker["counts"]
        texts = pc.filter(texts, pc.invert(missing)).unique()
        for kind, pattern in _KINDS.items():
            found = pc.match_substring_regex(texts, pattern)
            self._saw(kind, pc.filter(texts, found), delimiter)
            texts = pc.filter(texts, pc.invert(found))

    def _saw(self, kind: str, texts: pa.Array, delimiter: str) -> None:
        if not len(texts):
            return
        if kind == "long":
            kind = "integer" if _fits(texts, pa.int64()) else "unsigned" if _fits(texts, pa.uint64()) else "text"
        kinds = [kind]
        if kind == "integer" and pc.any(pc.starts_with(texts, "-")).as_py():
            kinds.append("negative")
        if kind == "comma" and delimiter == ",":
            kinds.append("quoted comma")
        for seen in kinds:
            self._seen.setdefault(seen, texts[0].as_py())

    def settle(self) -> pa.DataType:
        """The narrowest type that holds all values. Raises InputError where commas in numbers are ambiguous."""
        seen = self._seen.keys() - {"negative", "quoted comma"}
        if not seen:
            return pa.null()
        if "text" in seen or ("bool" in seen and len(seen) > 1) or {"unsigned", "negative"} <= self._seen.keys():
            return pa.string()
        if "comma" in seen:
            self._settle_comma()
        for marker, count in self._markers.items():
            why, column = f"they say {shown(marker)!r}", f"column {shown(self.name)!r}"
            self.notes.add("values read as missing", why, column, "write a number there if it is one", count)
        if seen & {"comma", "float"}:
            return pa.float64()
        return pa.bool_() if "bool" in seen else pa.uint64() if "unsigned" in seen else pa.int64()

    def _settle_comma(self) -> None:
        example = self._seen["comma"]
        if self._seen.keys() & {"quoted comma", "float"}:
            raise InputError(
                f"column {shown(self.name)!r} of {shown(self.source)} has {example!r}, of which the comma may be a "
                "decimal point or may group digits; write all its numbers with a decimal point and without grouping"
            )
        why = f"column {shown(self.name)!r} is read with the comma as decimal point"
        remedy = "write numbers with a decimal point if it groups digits"
        self.notes.add("columns with decimal commas", why, example, remedy)

    @property
    def example(self) -> str:
        """A value that is no number."""
        return self._seen.get("text", self._seen.get("bool", ""))

    @property
    def number_example(self) -> str:
        """A value that is a number."""
        return next((self._seen[kind] for kind in ("integer", "float", "comma", "unsigned") if kind in self._seen), "")

    def read(self, values: pa.Array, kind: pa.DataType) -> pa.Array:
        """The values as `kind`, null where they say that they are missing; strings stay as they are."""
        if pa.types.is_string(kind):
            return values
        texts = pc.utf8_trim_whitespace(values)
        texts = pc.if_else(_is_missing(texts), pa.scalar(None, pa.string()), texts)
        if pa.types.is_null(kind):
            return pa.nulls(len(texts))
        return pc.utf8_lower(pc.replace_substring(_without_plus(texts), ",", ".")).cast(kind)


def _is_missing(trimmed: pa.Array) -> pa.Array:
    return pc.is_in(pc.utf8_lower(trimmed), pa.array(sorted(MISSING)))


def _without_plus(texts: pa.Array) -> pa.Array:
    return pc.utf8_ltrim(texts, "+")  # there is at most one


def _fits(texts: pa.Array, kind: pa.DataType) -> bool:
    try:
        _without_plus(texts).cast(kind)
    except pa.ArrowInvalid:
        return False
    return True
