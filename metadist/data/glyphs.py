"""Letters as outlines in font files, and grey drawings of them in any shape: the same bits on any machine.

Nothing here depends on a library's way of drawing: outlines are the whole numbers in the font file, and what is done
with them is arithmetic of which every step is rounded as IEEE 754 says.
"""

import hashlib
import io
import logging
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metadist.core.errors import InputError

CURVE_POINTS = np.array([0.25, 0.5, 0.75, 1.0])  # where a curve is cut into straight lines
ROWS_PER_PIXEL = 4  # lines on which the ink of a row of pixels is measured
SHARPEST = 0.3  # of 1 + the cosine at a corner: a thicker stroke moves no corner further than 1 / this


class Outlines(NamedTuple):
    """The outlines of G glyphs as closed polygons, y upward, in units of their fonts.

    points: float64 [P, 2], glyph after glyph. before, after: int64 [P], each point's neighbours on its contour.
    ends: int64 [G], where the points of each glyph end.
    """

    points: np.ndarray
    before: np.ndarray
    after: np.ndarray
    ends: np.ndarray

    def sides(self) -> np.ndarray:
        """Width and height of each glyph, [G, 2]."""
        starts = np.concatenate([[0], self.ends[:-1]])
        return np.maximum.reduceat(self.points, starts) - np.minimum.reduceat(self.points, starts)


class Face:
    """A TrueType font file: the letters it covers, and their outlines.

    Example:
        >>> face = Face(Path("DejaVuSans.ttf"))
        >>> outline = outlines([face.glyph("A")])
    """

    def __init__(self, path: Path) -> None:
        from fontTools.ttLib import TTFont, TTLibError

        data = path.read_bytes()
        self.name, self.fingerprint = path.stem, hashlib.sha256(data).hexdigest()
        log = logging.getLogger("fontTools")
        level = log.level
        log.setLevel(logging.ERROR)  # STIX says it was made in 1970
        try:
            font = TTFont(io.BytesIO(data))
            self._glyphs = font["glyf"]
            self._named: dict[int, str] = font.getBestCmap() or {}
            lengths = np.diff(font["loca"].locations)
            self._blank = {name for name, length in zip(font.getGlyphOrder(), lengths, strict=True) if length == 0}
        except (TTLibError, KeyError) as error:
            raise InputError(f"{path} is damaged or no TrueType font; install again what it belongs to") from error
        finally:
            log.setLevel(level)

    def letters(self) -> set[str]:
        """Every character of Unicode's general categories L... that the font has an outline for."""
        named = {chr(code) for code, name in self._named.items() if name not in self._blank}
        return {character for character in named if unicodedata.category(character).startswith("L")}

    def glyph(self, letter: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As it lies in the file: points int64 [n, 2], the last point of each contour int64, and bool [n], whether the
        curve goes through a point or is drawn to it."""
        coordinates, ends, flags = self._glyphs[self._named[ord(letter)]].getCoordinates(self._glyphs)
        on_curve = np.array(flags, np.uint8) & 1 > 0
        return np.array(coordinates, np.int64).reshape(-1, 2), np.array(ends, np.int64), on_curve


def script_name(character: str) -> str | None:
    """The script a character belongs to, such as "Old Italic"; None where that is none, or several."""
    from fontTools import unicodedata as scripts

    code = scripts.script(character)
    return None if code in ("Zinh", "Zyyy", "Zzzz") else scripts.script_name(code).replace("_", " ")


def letter_name(character: str, script: str = "") -> str:
    """The name that Unicode gives a character, without that of its script: "capital letter a"."""
    return unicodedata.name(character, f"U+{ord(character):04X}").lower().removeprefix(f"{script.lower()} ")


def outlines(glyphs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Outlines:
    """What `Face.glyph` gave, as polygons: each curve (a parabola of three points) becomes four lines."""
    sizes = np.array([len(points) for points, _, _ in glyphs], np.int64)
    starts = np.cumsum(sizes) - sizes
    points = np.concatenate([points for points, _, _ in glyphs]).astype(np.float64)
    on_curve = np.concatenate([on for _, _, on in glyphs])
    lasts = np.concatenate([last + start for (_, last, _), start in zip(glyphs, starts, strict=True)])
    before, after = _neighbours(lasts)
    # An outer point's curve goes from the point before it to the one after, or half way there if that is outer too.
    first = np.where(on_curve[before, None], points[before], (points[before] + points) / 2)
    last = np.where(on_curve[after, None], points[after], (points[after] + points) / 2)
    t = CURVE_POINTS[:, None]
    curve = first[:, None] * (1 - t) ** 2 + points[:, None] * (2 * t * (1 - t)) + last[:, None] * t**2
    curve[on_curve, 0] = points[on_curve]
    chosen = np.tile(~on_curve[:, None], len(t))
    chosen[:, -1] &= ~on_curve[after]  # else the next point is that one
    chosen[:, 0] = True
    counts = np.concatenate([[0], np.cumsum(chosen.sum(1))])
    before, after = _neighbours(counts[lasts + 1] - 1)
    return Outlines(curve[chosen], before, after, counts[starts + sizes])


def _neighbours(lasts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The point before and after each one, on contours that end at the points `lasts`."""
    places = np.arange(lasts[-1] + 1 if len(lasts) else 0)
    before, after = places - 1, places + 1
    firsts = np.concatenate([[0], lasts[:-1] + 1])
    before[firsts], after[lasts] = lasts, firsts
    return before, after


def draw(
    shapes: Outlines,
    chosen: np.ndarray,
    matrices: np.ndarray,
    boxes: np.ndarray,
    shifts: np.ndarray,
    strokes: np.ndarray,
    size: int,
    fill: bool = False,
) -> np.ndarray:
    """Drawings of glyphs, uint8 [n, size, size], ink 255 on 0.

    Args:
        shapes: outlines, none of them empty.
        chosen: int [n], which outline to draw.
        matrices: [n, 2, 2], applied to the outline.
        boxes: [n], pixels that the longer side of the result takes.
        shifts: [n, 2] from -1 to 1, how far it is moved from the middle towards an edge of the drawing (left, top).
        strokes: [n], pixels by which all strokes grow on each side.
        size: pixels of a side of the drawing.
        fill: stretch it so that the shorter side is as long.
    """
    ends, points = shapes.ends, shapes.points
    starts = np.concatenate([[0], ends[:-1]])
    counts = ends[chosen] - starts[chosen]
    firsts = np.cumsum(counts) - counts  # of each drawing, among the points of all
    owner = np.repeat(np.arange(len(chosen)), counts)
    offsets = firsts - starts[chosen]
    places = np.arange(counts.sum()) - offsets[owner]
    before, after = shapes.before[places] + offsets[owner], shapes.after[places] + offsets[owner]
    x, y = points[places, 0], -points[places, 1]
    x, y = (matrices[owner, row, 0] * x + matrices[owner, row, 1] * y for row in (0, 1))
    lows = [np.minimum.reduceat(z, firsts) for z in (x, y)]
    sides = [np.maximum.reduceat(z, firsts) - low for z, low in zip((x, y), lows, strict=True)]
    longer = np.maximum(*sides)
    for axis, (z, low, side) in enumerate(zip((x, y), lows, sides, strict=True)):
        scale = boxes / np.where(fill & (side > 0), side, longer)
        room = (size - scale * side) / 2
        corner = room + shifts[:, axis] * (room - strokes - 1).clip(0)
        z -= low[owner]
        z *= scale[owner]
        z += corner[owner]
    _grow(x, y, before, after, firsts, strokes[owner])
    return _fill(x, y, after, owner, len(chosen), size)


def _grow(
    x: np.ndarray, y: np.ndarray, before: np.ndarray, after: np.ndarray, firsts: np.ndarray, by: np.ndarray
) -> None:
    """Move each point outward, so that each side of a polygon moves by so many pixels."""
    area = np.add.reduceat(x * y[after] - x[after] * y, firsts)
    counts = np.diff(firsts, append=len(x))
    by = np.repeat(np.where(area < 0, -1.0, 1.0), counts) * by
    along_x, along_y = x[after] - x, y[after] - y
    length = np.sqrt(along_x * along_x + along_y * along_y)
    length[length == 0] = 1
    along_x, along_y = along_x / length, along_y / length
    back_x, back_y = along_x[before], along_y[before]
    corner = by / (1 + along_x * back_x + along_y * back_y).clip(SHARPEST)
    x += corner * (along_y + back_y)
    y -= corner * (along_x + back_x)


def _fill(x: np.ndarray, y: np.ndarray, after: np.ndarray, owner: np.ndarray, count: int, size: int) -> np.ndarray:
    """The share of each pixel that lies inside the polygons of its drawing (its winding number is not 0), as uint8
    [count, size, size]: exact along x, on a few lines for each row of pixels."""
    to_x, to_y = x[after], y[after]
    low, high = (np.ceil(z * ROWS_PER_PIXEL - 0.5).clip(0, size * ROWS_PER_PIXEL) for z in (y, to_y))
    crossed = np.abs(high - low).astype(np.int64)
    edge = np.repeat(np.arange(len(x)), crossed)
    number = np.arange(len(edge)) - np.repeat(np.cumsum(crossed) - crossed, crossed)
    line = np.minimum(low, high).astype(np.int64)[edge] + number
    slope = (to_x - x) / np.where(to_y == y, 1, to_y - y)
    where = (x[edge] + ((line + 0.5) / ROWS_PER_PIXEL - y[edge]) * slope[edge]).clip(0, size)
    column = where.astype(np.int64)
    rest = where - column
    turn = np.sign(high - low)[edge]
    cell = (owner[edge] * size + line // ROWS_PER_PIXEL) * (size + 2) + column
    cells = count * size * (size + 2)
    ink = np.bincount(cell, turn * (1 - rest), cells) + np.bincount(cell + 1, turn * rest, cells)
    share = np.abs(np.cumsum(ink.reshape(count, size, size + 2), axis=2)[..., :size]) / ROWS_PER_PIXEL
    return np.floor(share.clip(0, 1) * 255 + 0.5).astype(np.uint8)
