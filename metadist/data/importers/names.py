"""Names of classes and other labels: which spellings are one name, and which only look alike."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from metadist.core.errors import did_you_mean
from metadist.data.notes import Notes, shown

_INVISIBLE = "\u200b\u2060\ufeff\u00ad"
_WHOLE = re.compile(r"[+-]?\d+\.0*")
MISSING = {"", "?", "-", "--", ".", "na", "n/a", "#n/a", "nan", "null", "none", "nil", "missing", "<na>"}


def clean(name: str) -> str:
    """The name without spaces and invisible characters around it, in Unicode's composed form (NFC)."""
    outer = name.strip()
    while outer and (outer[0] in _INVISIBLE or outer[-1] in _INVISIBLE):
        outer = outer.strip(_INVISIBLE).strip()
    return unicodedata.normalize("NFC", outer)


def natural(name: str) -> tuple[list[Any], str]:
    """A sort key by which "image2" comes before "image10"."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def lacking(column: str, names: Sequence[str]) -> str:
    """ "has no column ..." and which there are."""
    listed = ", ".join(map(shown, names[:50])) + (", ..." if len(names) > 50 else "")
    return f"has no column {column!r}; it has {listed}{did_you_mean(column, names)}"


def means_missing(text: str) -> bool:
    """Whether people write this where a value is missing."""
    return text.strip().lower() in MISSING


def note_cleaned(what: str, raw: str, notes: Notes, count: int = 1) -> None:
    """Say that a name was cleaned, and so perhaps became another one."""
    why = "without the spaces and invisible characters around them, in composed Unicode"
    remedy = "write each name one way if they are not the same"
    notes.add(f"{what} merged", why, f"{raw!r} as {clean(raw)!r}", remedy, count)


def note_lookalikes(what: str, names: Iterable[str], notes: Notes) -> None:
    """Say which names differ only by case, spaces, width or a trailing ".0", and which look like a missing value."""
    known: dict[str, str] = {}
    for name in names:
        if means_missing(name):
            remedy = "leave the cell empty or remove its rows if it means that there is no value"
            notes.add(f"{what} taken as names", "they look like a missing value", repr(shown(name)), remedy)
        text = unicodedata.normalize("NFKC", name).casefold()
        text = text.split(".")[0] if _WHOLE.fullmatch(text) else text
        other = known.setdefault(re.sub(r"[\s_-]+", " ", text), name)
        if other != name:
            why = "they differ only by case, spaces, width or a trailing .0"
            remedy = "write them one way if they are the same"
            notes.add(f"{what} kept apart", why, f"{shown(other)!r} and {shown(name)!r}", remedy)
