"""Letters of many scripts, drawn from the fonts that matplotlib carries: a data set without a download."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metadist.core.errors import InputError
from metadist.core.task import SPLITS, Split
from metadist.data.glyphs import Face, Outlines, draw, letter_name, outlines, script_name
from metadist.data.importers.pictures import PictureForm
from metadist.data.notes import Notes, Progress
from metadist.data.splits import uniforms
from metadist.data.table import Field
from metadist.data.writer import About, DatasetWriter, Group, options_of, staging

REGULAR = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")  # in these, shapes are compared
FACES = (
    *REGULAR,
    "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
    "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
)  # fmt: skip
HELD_OUT: Mapping[str, Split] = {
    **dict.fromkeys(("Hebrew", "Lao", "Ogham"), "validation"),
    **dict.fromkeys(("Armenian", "Georgian", "Lisu", "Nko", "Old Italic", "Tifinagh"), "test"),
}
LICENCE = "DejaVu fonts: Bitstream Vera and Arev licences; STIX fonts: STIX Font License"

TURN, SHEAR = 0.09, 0.15  # at most: the tangent of half the angle; sideways per height
STRETCH = (0.85, 1.18)  # width to height, times what it was
BOX = (0.65, 0.82)  # the longer side, as a share of the drawing's
STROKE = (-0.004, 0.018)  # what the strokes grow by on each side, as a share of the drawing's side
NUMBERS = 8  # random ones for a drawing

COMPARED = 20  # pixels of a side, of the drawings by which shapes are compared
NEAR = 0.05  # two are near-equal whose difference, squared, is a smaller share of their ink, squared
NEAR_STRETCH = 1.5  # and if neither is longer by more than that
BLOCK_CLASSES = 64
EXAMPLES = 4


class Letter(NamedTuple):
    """A class: its name "Script/the letter's name", its script, and the places in `FACES` of those that have it."""

    character: str
    name: str
    script: str
    faces: tuple[int, ...]

    @property
    def split(self) -> Split:
        return HELD_OUT.get(self.script, "train")


def letters(
    out: str | Path,
    *,
    drawings: int = 20,
    size: int = 28,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Draw the letters of many scripts from matplotlib's fonts; works offline.

    About 1,600 letters, each in random faces of DejaVu and STIX, turned, sheared, stretched, shifted, its strokes
    thicker or thinner. Field `image`: uint8 (1, size, size), ink 255 on 0, scale 1/255. Groups are
    "Script/name of the letter", parents the scripts, which are disjoint between the splits: Armenian, Georgian, Lisu,
    N'Ko, Old Italic and Tifinagh for test, Hebrew, Lao and Ogham for validation, the others (Latin, Greek, Cyrillic,
    Arabic, Canadian syllabics ...) for train. Of letters that look alike, also across scripts, one is kept, and the
    import says how many were left out. The same fonts give the same bits on any machine.

    Args:
        out: directory to write.
        drawings: of each letter.
        size: pixels.
        seed: of the draws.
        overwrite: replace a dataset that is there.
        progress: called now and then with the rows drawn so far and in all.

    Example:
        metadist data letters --out data/letters
    """
    options = options_of("letters", locals())
    if drawings < 1 or size < 8:
        raise InputError(f"letters takes drawings >= 1 and size >= 8; not {drawings} and {size}")
    with staging(out, overwrite) as directory:
        faces, notes = [Face(path) for path in carried_files()], Notes()
        chosen = _distinct(_covered(faces, notes), faces, notes)
        groups = [Group(letter.name, letter.split, drawings, letter.script) for letter in chosen]
        field = Field("image", "input", "uint8", (1, size, size), scale=1 / 255)
        source = "drawn from the fonts DejaVu and STIX that matplotlib carries"
        prints = {face.name: face.fingerprint for face in faces}
        form = PictureForm((size, size), "L", inverted=True)
        extra = {"fonts": prints, "preprocessing": {"pictures": asdict(form)}}
        about = About("classes", source, LICENCE, options, extra, notes)
        writer = DatasetWriter(directory, [field], groups, about, progress=progress)
        for start in range(0, len(chosen), BLOCK_CLASSES):
            block = chosen[start : start + BLOCK_CLASSES]
            images = _drawings(block, faces, drawings, size, seed)
            writer.add(np.arange(start, start + len(block)).repeat(drawings), {"image": images[:, None]})
        writer.finish()
    return Path(out)


def carried_files() -> list[Path]:
    """The font files, which are matplotlib's: of others, `letters` would make other data. Raises InputError where one
    is missing."""
    import matplotlib

    files = [Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf") for face in FACES]
    for file in files:
        if not file.is_file():
            raise InputError(
                f"letters are drawn from fonts of matplotlib, and {file} is missing, as some distributions leave it "
                "out: install matplotlib with pip"
            )
    return files


def _covered(faces: Sequence[Face], notes: Notes) -> list[Letter]:
    """The letters that have a script and a regular face: those to train on first, then plain ones before those
    that are put together of others (with accents, ligatures), then by code point."""
    having: dict[str, list[int]] = {}
    for number, face in enumerate(faces):
        for character in face.letters():
            having.setdefault(character, []).append(number)
    found = []
    for character in sorted(having):
        script, numbers = script_name(character), having[character]
        if script is None:
            why = "they belong to no script (mathematical alphabets, signs used in several scripts)"
            notes.add("letters left out", why, letter_name(character), "they repeat shapes of letters that are there")
        elif numbers[0] >= len(REGULAR):
            why = f"they are in none of {', '.join(REGULAR)}, where shapes are compared"
            notes.add("letters left out", why, letter_name(character), "the others are kept")
        else:
            found.append(Letter(character, f"{script}/{letter_name(character, script)}", script, tuple(numbers)))
    return sorted(found, key=lambda it: (SPLITS.index(it.split), unicodedata.decomposition(it.character) > ""))


def _distinct(found: Sequence[Letter], faces: Sequence[Face], notes: Notes) -> list[Letter]:
    """Without those that look like an earlier one in some regular face."""
    near = np.zeros((len(found), len(found)), dtype=bool)
    for number in range(len(REGULAR)):
        places = np.array([place for place, letter in enumerate(found) if number in letter.faces])
        shapes = outlines([faces[number].glyph(found[place].character) for place in places])
        near[np.ix_(places, places)] |= _near(shapes)
    kept: list[int] = []
    left_out: dict[str, list[str]] = {}
    for place, letter in enumerate(found):
        like = np.flatnonzero(near[place, kept])
        if not len(like):
            kept.append(place)
            continue
        twin = found[kept[like[0]]]
        where = "another letter of their script" if twin.script == letter.script else "a letter of another script"
        where += "" if twin.split == letter.split else ", in another split"
        left_out.setdefault(where, []).append(f"{letter.name} like {twin.name}")
    for where, names in left_out.items():
        examples = "; ".join(names[:: max(1, len(names) // EXAMPLES)][:EXAMPLES])
        why = f"near-equal in shape to {where}"
        remedy = "the earlier one is kept, as classes that look alike cannot be told apart"
        notes.add("letters left out", why, examples, remedy, len(names))
    return [found[place] for place in kept]


def _near(shapes: Outlines) -> np.ndarray:
    """Which glyphs of a face are near-equal where both fill a square, and about as wide for their height: bool [G, G].

    All sums are of whole numbers below 2^24, so that they are exact in float32 in any order."""
    count = len(shapes.ends)
    places, still = np.arange(count), np.zeros(count)
    same, unmoved = np.tile(np.eye(2), (count, 1, 1)), np.zeros((count, 2))
    images = draw(shapes, places, same, np.full(count, float(COMPARED)), unmoved, still, COMPARED, fill=True)
    padded = np.pad(images.astype(np.int64), ((0, 0), (1, 1), (1, 1)))
    moved = [padded[:, i : i + COMPARED, j : j + COMPARED] for i in range(3) for j in range(3)]
    flat = (np.sum(moved, axis=0) // 64).reshape(count, -1).astype(np.float32)
    ink = (flat * flat).sum(1)
    width, height = shapes.sides().clip(1).T
    longer = width[:, None] * height[None, :] / (height[:, None] * width[None, :])
    both = ink[:, None] + ink
    return (both - 2 * flat @ flat.T < NEAR * both) & (np.maximum(longer, longer.T) < NEAR_STRETCH)


def _drawings(block: Sequence[Letter], faces: Sequence[Face], drawings: int, size: int, seed: int) -> np.ndarray:
    """Random drawings of some letters, uint8 [letters * drawings, size, size]; each letter's depend on itself alone."""
    u = np.stack([uniforms(f"letters/{letter.character}", seed, drawings * NUMBERS) for letter in block])
    u = u.reshape(len(block), drawings, NUMBERS)
    glyphs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    chosen = np.empty((len(block), drawings), dtype=np.int64)
    for letter, row, draws in zip(block, chosen, u[..., 0], strict=True):
        picked = [letter.faces[place] for place in (draws * len(letter.faces)).astype(np.int64)]
        known = {number: len(glyphs) + place for place, number in enumerate(sorted(set(picked)))}
        glyphs += [faces[number].glyph(letter.character) for number in known]
        row[:] = [known[number] for number in picked]
    u = u.reshape(-1, NUMBERS)
    box, stroke = (size * (low + (high - low) * u[:, n]) for n, (low, high) in ((1, BOX), (2, STROKE)))
    shifts = 2 * u[:, 6:8] - 1
    return draw(outlines(glyphs), chosen.reshape(-1), _matrices(u[:, 3:6]), box, shifts, stroke, size)


def _matrices(u: np.ndarray) -> np.ndarray:
    """Stretch, then shear, then turn, [n, 2, 2], by uniform draws [n, 3]."""
    low, high = STRETCH
    half, shear, stretch = TURN * (2 * u[:, 0] - 1), SHEAR * (2 * u[:, 1] - 1), low + (high - low) * u[:, 2]
    cosine, sine = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
    rows = [cosine * stretch, cosine * shear - sine, sine * stretch, sine * shear + cosine]
    return np.stack(rows, axis=1).reshape(-1, 2, 2)
