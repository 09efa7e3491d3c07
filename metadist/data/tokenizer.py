"""Texts as token ids, by byte-pair encoding (Sennrich 2016) of Hugging Face `tokenizers`.

Texts are composed (Unicode NFC) and put in lower case; a word is a run of letters, digits and the marks that belong to
them, any other character but space stands alone. A word never seen falls apart into pieces, down to single characters.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from metadist.core.errors import InputError
from metadist.data.files import read_regular

VERSION = 2
PAD, UNKNOWN = 0, 1
FILE_BYTES = 1 << 28
_SPECIAL = ("[pad]", "[unknown]")
_WORD = r"[\p{L}\p{M}\p{N}_\x{200C}\x{200D}]+|[^\s]"  # with the joiners that Persian and Indic words have inside


class Tokenizer:
    """`pieces[id]` is what an id stands for: 0 pads, 1 is the unknown, then single characters, then what `merges`
    (pairs of pieces, in order) make of them."""

    def __init__(self, pieces: list[str], merges: list[tuple[str, str]]) -> None:
        from tokenizers import models

        self.pieces, self.merges = pieces, merges
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        self._model = _pipeline(models.BPE(vocab=vocabulary, merges=merges, unk_token=_SPECIAL[UNKNOWN]))

    @classmethod
    def build(cls, texts: Callable[[], Iterable[str]], size: int) -> "Tokenizer":
        """A vocabulary of at most `size` pieces of the texts, which are asked for twice. All their characters are in it
        as far as they fit, most frequent first; then their most frequent pieces. Depends on the texts alone."""
        from tokenizers import models, trainers

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would not survive a fork
        characters: Counter[str] = Counter()
        for text in texts():
            characters.update("".join(_normalizer().normalize_str(text).split()))
        alphabet = sorted(characters, key=lambda c: (-characters[c], c))[: size - len(_SPECIAL)]
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=list(_SPECIAL), show_progress=False,
            initial_alphabet=alphabet, limit_alphabet=len(alphabet),
        )  # fmt: skip
        model = _pipeline(models.BPE(unk_token=_SPECIAL[UNKNOWN]))
        model.train_from_iterator(texts(), trainer)
        vocabulary = model.get_vocab()
        merges = json.loads(model.to_str())["model"]["merges"]
        return cls(sorted(vocabulary, key=vocabulary.__getitem__), [(left, right) for left, right in merges])

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [tokens]."""
        return np.array(self._model.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def dumps(self) -> str:
        """The vocabulary as text, which `loads` reads."""
        content = {"version": VERSION, "pieces": self.pieces, "merges": self.merges}
        return json.dumps(content, ensure_ascii=False)

    def save(self, path: Path) -> None:
        path.write_text(self.dumps(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a dataset's `vocabulary.json`. Raises InputError when it is missing, damaged, or of another version."""
        return cls.loads(read_regular(Path(path), FILE_BYTES), path)

    @classmethod
    def loads(cls, text: str | bytes, path: object) -> "Tokenizer":
        """The vocabulary that a text describes; `path` is its name in errors. Raises InputError as `load` does."""
        try:
            content = json.loads(text)
            version, pieces = content["version"], content["pieces"]
            if version == VERSION and tuple(pieces[:2]) == _SPECIAL:
                return cls(list(pieces), [(left, right) for left, right in content["merges"]])
        except Exception as error:  # the library raises bare ones for merges that do not fit the pieces
            raise InputError(f"{path} is missing or damaged; import the text again") from error
        if version != VERSION:
            raise InputError(
                f"{path} is a vocabulary of version {version!r} and this metadist reads version {VERSION}, which "
                "splits words otherwise; import the text again"
            )
        raise InputError(f"{path} is not a vocabulary of metadist; import the text again")


def padded(ids: np.ndarray, length: int) -> np.ndarray:
    """Ids cut or padded to int32 [length]."""
    return np.pad(ids[:length], (0, max(0, length - len(ids))), constant_values=PAD)


def words(text: str) -> list[str]:
    """The words and single other characters of a text, composed and in lower case."""
    return [word for word, _ in _splitter().pre_tokenize_str(_normalizer().normalize_str(text))]


def _pipeline(model: Any) -> Any:
    from tokenizers import Tokenizer as Pipeline

    pipeline = Pipeline(model)
    pipeline.normalizer = _normalizer()
    pipeline.pre_tokenizer = _splitter()
    return pipeline


@cache
def _normalizer() -> Any:
    """Composed again after the lower case, which may take characters apart."""
    from tokenizers import normalizers

    return normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), normalizers.NFC()])


@cache
def _splitter() -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(_WORD), "removed", invert=True)
