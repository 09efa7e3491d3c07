"""What an import says: how far it is and, kept with the dataset, what it left out, merged, filled in, cut or
scaled."""

from collections import Counter
from pathlib import Path
from typing import Any, Protocol

from metadist.core.errors import InputError


class Progress(Protocol):
    """Called now and then with how much of something is done and how much there is in all."""

    def __call__(self, done: int, total: int, what: str = "rows") -> None: ...


NAMED = 20  # places of faults in one message


class Notes:
    """One note per reason, with a count, the first example, and what to do about it."""

    def __init__(self) -> None:
        self._notes: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, what: str, why: str, example: str, remedy: str, count: int = 1) -> None:
        """Count something under (`what` happened to what, `why`); the example and remedy of the first time are kept."""
        if count < 1:
            return
        note = {"what": what, "count": 0, "why": why, "example": example, "remedy": remedy}
        self._notes.setdefault((what, why), note)["count"] += count

    def as_list(self) -> list[dict[str, Any]]:
        """The notes as plain values: what, count, why, example, remedy."""
        return list(self._notes.values())


class Faults:
    """Pictures or lines that cannot be used: refused in one sentence for all of them, or left out and noted."""

    def __init__(self, what: str, whose: str = "") -> None:
        self.what, self.whose = what, whose  # "rows", " of FILE"
        self._counts: Counter[str] = Counter()  # by what is wrong
        self._places: dict[str, list[str]] = {}  # the first of each

    def add(self, where: str, why: str) -> None:
        """Note that what is at a place ("line 3", "ant/1.png") cannot be used ("is not JSON")."""
        self._counts[why] += 1
        if self._counts[why] <= NAMED:
            self._places.setdefault(why, []).append(where)

    @property
    def count(self) -> int:
        return self._counts.total()

    def refuse(self, source: Path | str, total: int, remedy: str) -> None:
        """Raise one InputError for all of them, where there are any, of `total` pictures or lines."""
        if self.count == 1:
            ((why, (where,)),) = self._places.items()
            raise InputError(f"{where}{self.whose} {why}; {remedy}")
        if self.count:
            rest, named = NAMED, []
            for why, places in self._places.items():
                if rest > 0:
                    named.append(f"{', '.join(places[:rest])} ({why.removeprefix('is ')})")
                    rest -= len(places)
            more = f" and {self.count - NAMED} more" if self.count > NAMED else ""
            raise InputError(
                f"{self.count} of {total} {self.what} in {shown(source)} cannot be used: {', '.join(named)}{more}; "
                f"for each: {remedy}"
            )

    def note(self, notes: Notes, remedy: str) -> None:
        """Note that they are left out."""
        for why, count in self._counts.items():
            notes.add(f"{self.what} left out", f"each {why}", self._places[why][0], remedy, count)


def sentence(note: dict[str, Any]) -> str:
    """A note in one line."""
    return f"{note['what']}: {note['count']}, {note['why']} (for example {note['example']}); {note['remedy']}"


def printable(text: str) -> str:
    """The text with unprintable and undecodable characters as escapes, so that it does nothing to a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def shown(text: object) -> str:
    """A name or value fit for a line of text: unprintable and undecodable characters as escapes, long ones cut."""
    text = printable(str(text))
    return text if len(text) <= 120 else f"{text[:100]}..."
