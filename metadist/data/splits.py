"""Which group belongs to which split, and raw uniform draws: both fixed by a seed for good, on any numpy release."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from metadist.core.errors import InputError
from metadist.core.task import SPLITS, Split
from metadist.data.notes import Notes, shown

FRACTIONS = (0.64, 0.16, 0.20)

_STEM = re.compile(r"([A-Za-z]+)([-_.].*)?")
_NAMES: dict[str, Split] = {
    **{split: split for split in SPLITS},
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
}


def split_named(text: str) -> Split | None:
    """The split a folder or column value stands for ("val" and "valid" are validation), or None."""
    return _NAMES.get(text.strip().lower())


def split_of_file(path: Path, source: Path | None = None) -> Split | None:
    """The split that a file's name says, or that of its folder in the source (train/data-00000-of-00001.arrow)."""
    stem = _STEM.fullmatch(path.name.split(".")[0])
    folder = split_named(path.parent.name) if source is not None and path.parent != source else None
    return (split_named(stem[1]) if stem else None) or folder


def merged_or_refused(
    found: Mapping[str, set[Split]], what: str, source: str, merge: bool, notes: Notes
) -> dict[str, Split]:
    """The split of each class, of those it was found in; none with `merge`, where the splits do not count, and that is
    noted. Raises InputError where classes are in two splits, as in usual classification data."""
    shared = [name for name, splits in found.items() if len(splits) > 1]
    known = sorted({split for splits in found.values() for split in splits}, key=SPLITS.index)
    if merge and known:
        why = f"{' and '.join(known)} are put together, and whole {what} are given to the splits anew"
        remedy = "import without --merge where the splits share none"
        notes.add(f"splits of {what} merged", why, shown((shared or list(found))[0]), remedy, len(found))
        return {}
    if shared:
        raise InputError(
            f"{len(shared)} of {len(found)} {what} of {source} are in two splits ({shared[0]!r} first), which is usual "
            "elsewhere, but few-shot learning is tested on classes never seen in training: put the splits together and "
            "divide whole classes anew with --merge, or give one of the splits alone as --source"
        )
    return {name: next(iter(splits)) for name, splits in found.items()}


def shuffled(names: Iterable[str], seed: int) -> list[str]:
    """The names in an order that depends only on them and the seed: by the sha256 of both."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())


def split_by_counts(names: Iterable[str], counts: Sequence[int], seed: int) -> dict[str, Split]:
    """Shuffle the names, then give the first `counts[0]` to train, the next to validation, the next to test."""
    order = shuffled(names, seed)
    splits: list[Split] = [split for split, count in zip(SPLITS, counts, strict=True) for _ in range(count)]
    return dict(zip(order, splits, strict=True))


def divide(names: Iterable[str], fractions: Sequence[float], seed: int) -> dict[str, Split]:
    """Split the groups by fractions (train, validation, test), rounded so that no split asked for is empty.

    Raises InputError when the fractions do not sum to 1 or there are fewer groups than splits.
    """
    names = list(names)
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise InputError(f"fractions {tuple(fractions)} must be three numbers (train, validation, test) that sum to 1")
    wanted = sum(fraction > 0 for fraction in fractions)
    if len(names) < wanted:
        raise InputError(f"{len(names)} groups cannot fill {wanted} splits; add groups or set a fraction to 0")
    counts = [max(int(fraction * len(names)), int(fraction > 0)) for fraction in fractions]
    while sum(counts) != len(names):
        step = 1 if sum(counts) < len(names) else -1
        pairs = zip(fractions, counts, strict=True)
        lacking = [step * (f * len(names) - c) if f and c + step >= 1 else -np.inf for f, c in pairs]
        counts[int(np.argmax(lacking))] += step
    return split_by_counts(names, counts, seed)


def uniforms(label: str, seed: int, count: int) -> np.ndarray:
    """`count` draws from U[0, 1), float64, of the stream named by (label, seed): raw Philox words over 2^53."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{label}".encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(count)
    return (words >> np.uint64(11)) * 2.0**-53
