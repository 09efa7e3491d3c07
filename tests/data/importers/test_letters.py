import hashlib
import re
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageFont

from metadist.core.errors import InputError
from metadist.data import Dataset, cached, importers, open_dataset

FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
REGULAR = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")
SCRIPTS = {
    "train": {"Arabic", "Canadian Aboriginal", "Coptic", "Cyrillic", "Greek", "Hiragana", "Latin"},
    "validation": {"Hebrew", "Lao", "Ogham"},
    "test": {"Armenian", "Georgian", "Lisu", "Nko", "Old Italic", "Tifinagh"},
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Dataset:
    return open_dataset(importers.letters(tmp_path_factory.mktemp("letters") / "set", drawings=6), verify=True)


def character(name: str) -> str:
    """The letter of a class "Script/its name"."""
    script, _, rest = name.partition("/")
    for full in (f"{script} {rest}", rest):
        try:
            return unicodedata.lookup(full)
        except KeyError:
            continue
    raise AssertionError(f"{name} names no letter")


def fitted(pixels: np.ndarray, side: int = 20) -> np.ndarray:
    """Cut to its ink and stretched to a square, 0 to 1."""
    image = Image.fromarray(pixels)
    return np.asarray(image.crop(image.getbbox()).resize((side, side), Image.Resampling.BOX)) / 255


def printed(letters: str, face: str = "DejaVuSans") -> dict[str, np.ndarray]:
    """Letters as Pillow draws them, which uses FreeType."""
    font = ImageFont.truetype(str(FONTS / f"{face}.ttf"), 60)
    images = [Image.frombytes("L", mask.size, bytes(mask)) for mask in map(font.getmask, letters)]
    return {letter: np.asarray(image.crop(image.getbbox())) for letter, image in zip(letters, images, strict=True)}


def test_scripts_are_whole_and_disjoint_between_splits(drawn: Dataset) -> None:
    for split, table in drawn.splits.items():
        assert set(table.parent_names) == SCRIPTS[split]
        assert (table.counts == 6).all()
        for name, parent in zip(table.group_names, table.parents, strict=True):
            assert name.partition("/")[0] == table.parent_names[parent]
            letter = character(name)
            assert unicodedata.category(letter)[0] == "L"
            first = unicodedata.name(letter).split()[0]
            assert first in table.parent_names[parent].upper() or split == "train", f"{name} is {first}"
    counts = {split: len(table.group_names) for split, table in drawn.splits.items()}
    assert counts["train"] > 1000 and counts["validation"] > 80 and counts["test"] > 200


def test_what_is_left_out_is_said_and_adds_up(drawn: Dataset) -> None:
    """Letters of the fonts, as FreeType lists them: one class each, but for those that the notes count."""
    faces = [face for face in FONTS.glob("*.ttf") if re.match("DejaVuSans|DejaVuSerif|STIXGeneral", face.name)]
    assert len([face for face in faces if "Display" not in face.name]) == 16
    covered = {chr(code) for face in faces for code in FT2Font(str(face)).get_charmap()}
    letters = {letter for letter in covered if unicodedata.category(letter)[0] == "L"}
    notes = drawn.metadata["notes"]
    assert {note["what"] for note in notes} == {"letters left out"}
    classes = {character(name) for table in drawn.splits.values() for name in table.group_names}
    assert len(classes) + sum(note["count"] for note in notes) == len(letters)
    assert classes < letters
    across = [note for note in notes if "in another split" in note["why"]]
    assert len(across) == 1 and across[0]["count"] > 50 and " like " in across[0]["example"]


def test_a_shape_has_one_class_also_across_scripts_and_splits(drawn: Dataset) -> None:
    classes = {character(name) for table in drawn.splits.values() for name in table.group_names}
    same = "A\u0391\u0410\ua4ee\U00010300"  # Latin, Greek, Cyrillic, Lisu, Old Italic
    assert {unicodedata.name(letter).split()[0] for letter in same} == {"LATIN", "GREEK", "CYRILLIC", "LISU", "OLD"}
    assert classes.intersection(same) == {"A"}
    assert classes.intersection("Oo\u039f\u041e\u0555\u2c54\ua4f3") == {"O"}
    assert classes.issuperset("EFCGQRbdpqhnñΩЖЩשა")


def test_no_two_classes_are_near_equal_as_another_library_draws_them(drawn: Dataset) -> None:
    """By the share of pixels that differ, of all that either has, where both are cut to their ink and made square."""
    covered = FT2Font(str(FONTS / "DejaVuSans.ttf")).get_charmap()
    classes = [character(name) for table in drawn.splits.values() for name in table.group_names]
    letters = printed("".join(letter for letter in classes if ord(letter) in covered))
    shapes = np.stack([fitted(pixels, 24).ravel() for pixels in letters.values()]).astype(np.float32)
    shapes = (shapes > 0.5).astype(np.float32)
    both = shapes @ shapes.T
    either = shapes.sum(1)[:, None] + shapes.sum(1) - both
    wide = np.array([pixels.shape[1] / pixels.shape[0] for pixels in letters.values()])
    alike = (both / either > 0.93) & (np.abs(np.log(wide[:, None] / wide)) < 0.2)
    np.fill_diagonal(alike, False)
    names = list(letters)
    assert not alike.any(), [names[i] + names[j] for i, j in np.argwhere(alike)]


def test_drawings_look_like_their_letters(drawn: Dataset) -> None:
    """Of Pillow's drawings of all capitals in four faces, most drawings of a letter are nearest to that letter."""
    train, capitals = drawn.splits["train"], "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    exact = np.stack([fitted(pixels) for face in REGULAR for pixels in printed(capitals, face).values()])
    hits = {}
    for letter in capitals:
        first = train.starts[train.group_names.index(f"Latin/capital letter {letter.lower()}")]
        images = train.column("image")[first : first + 6, 0]
        nearest = [np.square(fitted(image) - exact).sum((1, 2)).argmin() % len(capitals) for image in images]
        hits[letter] = "".join(capitals[place] for place in nearest)
    assert hits["A"].count("A") > 3
    assert sum(found.count(letter) > 3 for letter, found in hits.items()) >= 21, hits


def test_drawings_are_whole_and_all_different(drawn: Dataset) -> None:
    for table in drawn.splits.values():
        images = table.column("image")[:, 0]
        assert images.shape[1:] == (28, 28) and images.dtype == np.uint8
        border = [images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]]
        assert np.max(border) < 64, "ink at an edge"
        assert images.max(axis=(1, 2)).min() > 128, "a drawing without ink"
        assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)
    centres = np.array([np.argwhere(image).mean(0) for image in images])
    assert (centres.min(0) < 12).all() and (centres.max(0) > 15).all(), "letters do not move"


def test_another_seed_draws_the_same_letters_otherwise(drawn: Dataset, tmp_path: Path) -> None:
    other = open_dataset(importers.letters(tmp_path / "other", drawings=2, seed=1))
    for split, table in drawn.splits.items():
        assert other.splits[split].group_names == table.group_names
        images, others = table.column("image").reshape(-1, 6, 28, 28), other.splits[split].column("image")
        assert (images[:, :2] != others.reshape(-1, 2, 28, 28)).any(axis=(1, 2, 3)).all()


def test_the_bits_are_those_of_any_machine(drawn: Dataset) -> None:
    """Of the fonts in matplotlib 3.8 to 3.11; with others there is nothing to compare with."""
    fonts = "".join(drawn.metadata["extra"]["fonts"].values())
    if not hashlib.sha256(fonts.encode()).hexdigest().startswith("3302c5ba5a8c18c8"):
        pytest.skip("this matplotlib carries other fonts than the digest below was made of")
    assert drawn.digest == "c403faa50a23ea124db291958c73b309"


def test_fonts_that_are_missing_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(InputError, match="DejaVuSans.ttf is missing.*install matplotlib with pip"):
        importers.letters(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_fonts_and_seed_decide_the_bits_also_in_the_cache(
    drawn: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same again; then a matplotlib whose bold face is another one: what was drawn before is not taken for it."""
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "cache"))
    before = cached("letters", {"drawings": 2})
    fonts = tmp_path / "fonts" / "ttf"
    fonts.mkdir(parents=True)
    for file in FONTS.glob("*.ttf"):
        (fonts / file.name).symlink_to(FONTS / file.name.replace("DejaVuSans-Bold.", "DejaVuSans-Oblique."))
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    after = cached("letters", {"drawings": 2})
    same, other = (open_dataset(path).splits["test"].column("image") for path in (before, after))
    six = drawn.splits["test"].column("image")
    np.testing.assert_array_equal(same, six.reshape(-1, 6, 1, 28, 28)[:, :2].reshape(same.shape))
    assert before != after and other.shape == same.shape
    assert 0.02 < (other != same).any(axis=(1, 2, 3)).mean() < 0.5, "one face of 16 is another one"


@pytest.mark.parametrize("asked", [{"drawings": 0}, {"size": 4}])
def test_impossible_drawings_are_refused(tmp_path: Path, asked: dict) -> None:
    with pytest.raises(InputError, match="drawings >= 1"):
        importers.letters(tmp_path / "set", **asked)
    assert list(tmp_path.iterdir()) == []
