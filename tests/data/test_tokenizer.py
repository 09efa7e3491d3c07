import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from metadist.core.errors import InputError
from metadist.data import Tokenizer
from metadist.data.tokenizer import words

TEXTS = ["play playing played walk walking walked", "walk play the song, the song!", "by me"] * 3


def build(size: int, texts: list[str] = TEXTS) -> Tokenizer:
    return Tokenizer.build(lambda: texts, size)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.pieces[number] for number in tokenizer.encode(text)]


def test_words_are_lower_case_and_punctuation_stands_alone() -> None:
    assert words("What's UP, Doc?") == ["what", "'", "s", "up", ",", "doc", "?"]


@pytest.mark.parametrize(
    "text",
    [
        "हिन्दी में किताब",  # Devanagari: vowel signs and the virama
        "தமிழ் மொழி",  # Tamil
        "สวัสดี ครับ",  # Thai: vowels above, tone marks
        "שָׁלוֹם עֲלֵיכֶם",  # vocalised Hebrew
        "مُحَمَّد كِتَاب",  # vocalised Arabic
        "cafe\u0301 nin\u0303o a\u0328\u0301",  # decomposed Latin, with marks that have no composed form
        "می\u200cخواهم کتاب",  # Persian with a joiner inside the word
    ],
)
def test_marks_stay_with_their_letters(text: str) -> None:
    assert words(text) == unicodedata.normalize("NFC", text).split(" ")


@pytest.mark.parametrize("text", ["Café à Łódź", "Việt Nam", "한국어 단어", "ἄνθρωπος", "İstanbul Ärger"])
def test_both_unicode_forms_are_the_same_tokens(text: str) -> None:
    composed, decomposed = unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)
    assert composed != decomposed
    tokenizer = build(60, [composed] * 3)
    np.testing.assert_array_equal(tokenizer.encode(composed), tokenizer.encode(decomposed))
    assert 1 not in tokenizer.encode(decomposed)


def test_known_words_are_whole_and_new_ones_fall_apart() -> None:
    tokenizer = build(200)
    assert pieces(tokenizer, "Play the song") == ["play", "the", "song"]
    unseen = pieces(tokenizer, "talking")
    assert "[unknown]" not in unseen and "".join(unseen) == "talking" and 1 < len(unseen) < 7


def test_an_unseen_character_is_unknown_and_the_rest_of_its_word_is_not() -> None:
    found = pieces(build(200), "plañed")
    assert found.count("[unknown]") == 1 and "".join(found) == "pla[unknown]ed"
    assert build(200).encode("ñ").tolist() == [1]


def test_a_long_word_is_no_unknown() -> None:
    assert "".join(pieces(build(200), "walk" * 2000)) == "walk" * 2000


def test_size_and_alphabet_are_kept() -> None:
    for size in (3, 10, 40):
        assert len(build(size).pieces) <= size
    counts = {letter: "".join(TEXTS).count(letter) for letter in set("".join(TEXTS)) - {" "}}
    frequent = sorted(counts, key=lambda letter: (-counts[letter], letter))[:3]
    assert sorted(build(5).pieces[2:]) == sorted(frequent)


def test_every_process_builds_the_same_and_forks_without_a_warning(tmp_path: Path) -> None:
    code = (
        "import hashlib, multiprocessing\n"
        "from metadist.data import Tokenizer\n"
        "texts = [f'w{n % 97}x{n * n % 89} ab{n % 7}' for n in range(3000)]\n"
        "tokenizer = Tokenizer.build(lambda: texts, 400)\n"
        "process = multiprocessing.get_context('fork').Process(target=tokenizer.encode, args=('w1',))\n"
        "process.start(); process.join(); assert process.exitcode == 0\n"
        "print(hashlib.sha256(repr((tokenizer.pieces, tokenizer.merges)).encode()).hexdigest())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = [
        subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment)
        for _ in range(3)
    ]
    assert [run.stderr for run in done] == [""] * 3
    assert len({run.stdout for run in done}) == 1


def test_it_is_saved_and_what_is_no_vocabulary_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "vocabulary.json"
    tokenizer = build(100)
    tokenizer.save(file)
    loaded = Tokenizer.load(file)
    assert loaded.pieces == tokenizer.pieces
    np.testing.assert_array_equal(loaded.encode("the talking song"), tokenizer.encode("the talking song"))
    good = json.loads(file.read_text())
    for content in (
        "{", "[]", '{"pieces": ["a", "b"]}', '{"pieces": 3}', "[" * 100_000,
        json.dumps(good | {"merges": [["zz", "y"]]}),
        json.dumps(good | {"merges": 3}), json.dumps(good | {"pieces": good["pieces"][2:]}),
    ):  # fmt: skip
        file.write_text(content)
        with pytest.raises(InputError, match="import the text again"):
            Tokenizer.load(file)


def test_a_vocabulary_of_before_is_refused_by_its_version(tmp_path: Path) -> None:
    file = tmp_path / "vocabulary.json"
    file.write_text('{"version": 1, "pieces": ["[pad]", "[unknown]", "a", "##b"]}')
    with pytest.raises(InputError, match="is a vocabulary of version 1 and this metadist reads version 2.*import"):
        Tokenizer.load(file)
