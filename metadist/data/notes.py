"""What an import left out, merged, filled in, cut or scaled: said at its end and kept with the dataset."""

from typing import Any


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

    def told(self) -> list[dict[str, Any]]:
        """The notes as plain values: what, count, why, example, remedy."""
        return list(self._notes.values())


def sentence(note: dict[str, Any]) -> str:
    """A note in one line."""
    return f"{note['what']}: {note['count']}, {note['why']} (for example {note['example']}); {note['remedy']}"


def shown(text: object) -> str:
    """A name or value fit for a line of text: unprintable and undecodable characters as escapes, long ones cut."""
    text = str(text)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    return text if len(text) <= 120 else f"{text[:100]}..."
