"""A small word-piece tokenizer: words it never saw fall apart into pieces, down to single characters."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from metadist.errors import InputError

PAD, UNKNOWN = 0, 1
INSIDE = "##"  # marks a piece that continues a word
_SPECIAL = ("[pad]", "[unknown]")
_WORDS = re.compile(r"\w+|[^\w\s]")
_PIECE_LENGTHS = range(2, 7)


def words(text: str) -> list[str]:
    """Lower-case words and single punctuation marks."""
    return _WORDS.findall(text.lower())


class Tokenizer:
    """Greedy longest match over `pieces`; a piece's id is its place in the list, 0 pads and 1 is the unknown."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = list(pieces)
        self._ids = {piece: number for number, piece in enumerate(self.pieces)}
        self._longest = max(len(piece) for piece in self.pieces)

    @classmethod
    def build(cls, counts: Mapping[str, int], size: int) -> "Tokenizer":
        """A vocabulary of at most `size` pieces from word counts: every character that fits, most frequent first, as a
        word's start and inside it; then words seen twice or more and their frequent starts and insides, half each."""
        characters: Counter[str] = Counter()
        pieces: Counter[str] = Counter()
        for word, count in counts.items():
            for place, character in enumerate(word):
                characters[INSIDE + character if place else character] += count
            for length in _PIECE_LENGTHS:
                for place in range(len(word) - length + 1):
                    pieces[INSIDE * (place > 0) + word[place : place + length]] += count * (length - 1)
        frequent = {word: count for word, count in counts.items() if count > 1 and len(word) > 1}
        chosen = dict.fromkeys([*_SPECIAL, *_ranked(characters)][:size])
        for ranked, limit in ((_ranked(frequent), (size + len(chosen)) // 2), (_ranked(pieces), size)):
            new = [piece for piece in ranked if piece not in chosen]
            chosen |= dict.fromkeys(new[: max(0, limit - len(chosen))])
        return cls(list(chosen))

    def encode(self, text: str, length: int) -> np.ndarray:
        """Ids, int32 [length]: cut at `length`, padded with 0."""
        ids = list(islice((number for word in words(text) for number in self._word(word)), length))
        return np.array(ids + [PAD] * (length - len(ids)), dtype=np.int32)

    def _word(self, word: str) -> list[int]:
        ids, place = [], 0
        while place < len(word):
            for end in range(min(len(word), place + self._longest), place, -1):
                number = self._ids.get(INSIDE * (place > 0) + word[place:end])
                if number is not None:
                    break
            else:
                end, number = place + 1, UNKNOWN
            ids.append(number)
            place = end
        return ids

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"version": 1, "pieces": self.pieces}, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a dataset's `vocabulary.json`. Raises InputError when it is missing or damaged."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if tuple(content["pieces"][:2]) == _SPECIAL:
                return cls(content["pieces"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is missing or damaged; import the text again") from error
        raise InputError(f"{path} is not a vocabulary of metadist; import the text again")


def _ranked(counts: Mapping[str, int]) -> list[str]:
    return sorted(counts, key=lambda piece: (-counts[piece], piece))
