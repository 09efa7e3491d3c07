"""Which columns of a table are meant: names, patterns (`x_*`), ranges (`x1..x20`) and exceptions (`-x_7`)."""

import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from metadist.core.errors import InputError
from metadist.data.importers.names import clean, lacking
from metadist.data.importers.table_files import Rows
from metadist.data.notes import shown

_RANGE = re.compile(r"(.*?)([0-9]+)\.\.(.*?)([0-9]+)")
MOST = 100_000  # columns in a range


def chosen(text: str, rows: Rows, taken: Collection[str] = ()) -> tuple[list[str], set[str]]:
    """The columns that names between commas mean, and those of them that only a pattern with `*` or `?` brought in.

    A name may have commas in it; a column that is called like a pattern is that column. Patterns pass over the columns
    that are `taken` by something else. Raises InputError where there is no such column.

    Example:
        >>> chosen("age,x_*,-x_7", rows)
        (['age', 'x_1', 'x_2'], {'x_1', 'x_2'})
    """
    found: dict[str, None] = {}
    loose: set[str] = set()
    named: set[str] = set()
    dropped: set[str] = set()
    for piece in _pieces(text.split(","), rows):
        if _is_column(piece, rows):
            found[rows.column(piece)] = None
            named.add(rows.column(piece))
        elif piece.startswith("-"):
            dropped |= set(_matches(piece[1:], rows, ()))
        elif is_pattern(piece, rows):
            several = _matches(piece, rows, taken)
            found |= dict.fromkeys(several)
            loose |= set(several) if "*" in piece or "?" in piece else set()
        else:
            found[rows.column(piece)] = None  # raises
    columns = [name for name in found if name not in dropped]
    if not columns:
        raise InputError(f"{text!r} names no column of {shown(rows.source)}, which has {_listed(rows)}; correct it")
    return columns, loose - named


def is_pattern(text: str, rows: Rows) -> bool:
    """Whether a text stands for several columns, and is no column itself."""
    several = any(mark in text for mark in "*?") or _RANGE.fullmatch(text.strip()) is not None
    return several and not _is_column(text, rows)


def _is_column(name: str, rows: Rows) -> bool:
    return name in rows.names or clean(name) in map(clean, rows.names)


def _pieces(pieces: Sequence[str], rows: Rows) -> list[str]:
    """Joined again where a comma belongs to the name of a column; the longest that there is counts."""
    joined = []
    while pieces:
        for end in range(len(pieces), 0, -1):
            name = ",".join(pieces[:end])
            if end == 1 or _is_column(name, rows) or _is_column(name.strip().removeprefix("-"), rows):
                joined.append(name if name in rows.names else name.strip())
                pieces = pieces[end:]
                break
    return joined


def _matches(pattern: str, rows: Rows, taken: Collection[str]) -> list[str]:
    """The columns that a pattern, a range or a name stands for, in the order of the file or of the range."""
    if _is_column(pattern, rows):
        return [rows.column(pattern)]
    if ends := _RANGE.fullmatch(pattern):
        (before, first, again, last), width = ends.groups(), len(ends[2])
        if before != again or not 0 <= int(last) - int(first) < MOST:
            raise InputError(f"{pattern!r} is no range of columns; write it like x1..x20, the smaller number first")
        digits = width if first.startswith("0") else 0
        return [rows.column(f"{before}{number:0{digits}}") for number in range(int(first), int(last) + 1)]
    if not is_pattern(pattern, rows):
        raise InputError(f"{shown(rows.source)} {lacking(pattern, rows.names)}")
    matching = [name for name in rows.names if fnmatchcase(name, pattern) and name not in taken]
    if not matching:
        raise InputError(f"no column of {shown(rows.source)} fits {pattern!r}; it has {_listed(rows)}")
    return matching


def _listed(rows: Rows) -> str:
    return ", ".join(map(shown, rows.names[:20])) + (", ..." if len(rows.names) > 20 else "")
