from collections import Counter
from pathlib import Path

import pytest

from metadist.data import Tokenizer
from metadist.data.tokenizer import words
from metadist.errors import InputError

COUNTS = Counter(words("play playing played walk walking walked walk play the song, the song! by me " * 3))


def pieces(tokenizer: Tokenizer, text: str, length: int = 16) -> list[str]:
    return [tokenizer.pieces[number] for number in tokenizer.encode(text, length)]


def test_words_are_lower_case_and_punctuation_stands_alone() -> None:
    assert words("What's UP, Doc?") == ["what", "'", "s", "up", ",", "doc", "?"]


def test_known_words_are_whole_and_new_ones_fall_apart() -> None:
    tokenizer = Tokenizer.build(COUNTS, 200)
    assert pieces(tokenizer, "Play the song", 4) == ["play", "the", "song", "[pad]"]
    unseen = pieces(tokenizer, "talking", 16)
    assert "[unknown]" not in unseen
    assert "".join(piece.removeprefix("##") for piece in unseen if piece != "[pad]") == "talking"
    assert 1 < sum(piece != "[pad]" for piece in unseen) < 7


def test_an_unseen_character_is_unknown_and_the_rest_of_its_word_is_not() -> None:
    tokenizer = Tokenizer.build(COUNTS, 200)
    found = pieces(tokenizer, "plañed", 8)
    assert found.count("[unknown]") == 1 and found[0].startswith("pl") and "##ed" in found
    assert tokenizer.encode("ñ", 2).tolist() == [1, 0]


def test_size_length_and_order_are_kept() -> None:
    for size in (3, 10, 40, 100):
        assert len(Tokenizer.build(COUNTS, size).pieces) <= size
    tokenizer = Tokenizer.build(COUNTS, 80)
    assert len(tokenizer.pieces) == 80
    assert tokenizer.encode("the song " * 50, 7).shape == (7,)
    assert Tokenizer.build(dict(reversed(COUNTS.items())), 80).pieces == tokenizer.pieces


def test_it_is_saved_and_a_damaged_file_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.build(COUNTS, 100)
    tokenizer.save(tmp_path / "vocabulary.json")
    assert Tokenizer.load(tmp_path / "vocabulary.json").pieces == tokenizer.pieces
    for content in ("{", "[]", '{"pieces": ["a", "b"]}', '{"pieces": 3}'):
        (tmp_path / "vocabulary.json").write_text(content)
        with pytest.raises(InputError, match="import the text again"):
            Tokenizer.load(tmp_path / "vocabulary.json")
