from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import get_data_path

from metadist.core.errors import InputError
from metadist.data.glyphs import Face, draw, letter_name, outlines, script_name

SANS = Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def glyph(*contours):
    """Contours of straight lines, as a font file holds them."""
    points = np.array([point for contour in contours for point in contour], np.int64)
    return points, np.cumsum([len(contour) for contour in contours]) - 1, np.ones(len(points), bool)


def box(left, bottom, right, top):
    return [(left, bottom), (left, top), (right, top), (right, bottom)]


def drawn(*glyphs, side=8.0, size=16, stroke=0.0, shift=(0.0, 0.0), matrix=((1, 0), (0, 1)), fill=False):
    n = len(glyphs)
    matrices, shifts = np.tile(np.array(matrix, float), (n, 1, 1)), np.tile(shift, (n, 1))
    return draw(outlines(glyphs), np.arange(n), matrices, np.full(n, side), shifts, np.full(n, stroke), size, fill)


def area_of(*points) -> float:
    x, y = np.array(points, float).T
    return abs((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2


def area(image) -> float:
    return float(image.sum() / 255)


def test_a_square_covers_its_pixels_and_half_of_a_pixel_is_half_as_bright():
    whole, odd = drawn(glyph(box(0, 0, 100, 100))), drawn(glyph(box(0, 0, 7, 7)), side=7.0)
    expected = np.zeros((16, 16), np.uint8)
    expected[4:12, 4:12] = 255
    np.testing.assert_array_equal(whole[0], expected)
    assert odd[0, 8, 4] == odd[0, 4, 8] == 128 and odd[0, 4, 4] == 64  # its edges lie at 4.5 and 11.5


@pytest.mark.parametrize("fill", [False, True])
def test_the_area_is_that_of_the_polygon(fill):
    triangle = glyph([(0, 0), (300, 400), (500, 0)])
    image = drawn(triangle, side=40, size=64, fill=fill)[0]
    width, height = 40, 40 if fill else 32
    assert area(image) == pytest.approx(width * height / 2, rel=0.01)
    rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == pytest.approx((height, width), abs=1)
    assert image[rows[-1]].sum() > 5 * image[rows[0]].sum(), "its foot is up"


def test_holes_are_empty_and_what_overlaps_is_no_hole():
    hole = glyph(box(0, 0, 80, 80), box(20, 20, 60, 60)[::-1])
    crossing = glyph(box(0, 0, 80, 80), box(20, 20, 60, 60))
    ring, full = drawn(hole, crossing)
    assert area(ring) == 64 - 16 and ring[8, 8] == 0
    assert area(full) == 64


@pytest.mark.parametrize("turned", [False, True], ids=["clockwise", "counter-clockwise"])
def test_strokes_grow_on_each_side_and_holes_shrink(turned):
    way = -1 if turned else 1
    ring = glyph(box(0, 0, 80, 80)[::way], box(20, 20, 60, 60)[::-way])
    assert area(drawn(ring, stroke=0.5)[0]) == pytest.approx(9 * 9 - 3 * 3, rel=2e-3)
    assert area(drawn(ring, stroke=-0.5)[0]) == pytest.approx(7 * 7 - 5 * 5, rel=5e-3)


def test_a_drawing_moves_to_the_edge_and_not_over_it():
    for shift, corner in (((-1, -1), (1, 1)), ((1, 1), (7, 7)), ((1, -1), (1, 7))):
        image = drawn(glyph(box(0, 0, 80, 80)), shift=shift)[0]
        assert tuple(np.argwhere(image)[0]) == corner and area(image) == 64


def test_a_matrix_turns_counter_to_the_pixels_rows():
    """A quarter turn of a letter L takes its foot, which is right, down to up left: x' = y, y' = -x on the page."""
    letter = glyph([(0, 0), (0, 80), (20, 80), (20, 20), (60, 20), (60, 0)])
    upright, turned = drawn(letter)[0], drawn(letter, matrix=((0, 1), (-1, 0)))[0]
    np.testing.assert_array_equal(np.rot90(upright), turned)


def test_curves_are_parabolas_also_where_a_font_leaves_out_the_points_between(tmp_path):
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    pen.qCurveTo((900, 100), (1000, 1000), (100, 900), (0, 500))
    pen.closePath()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "A", "blank", "digit"])
    builder.setupCharacterMap({ord("A"): "A", ord("B"): "blank", ord("1"): "digit"})
    blank = TTGlyphPen(None).glyph()
    builder.setupGlyf({".notdef": blank, "A": pen.glyph(), "blank": blank, "digit": pen.glyph()})
    builder.setupHorizontalMetrics(dict.fromkeys((".notdef", "A", "blank", "digit"), (1000, 0)))
    builder.setupHorizontalHeader()
    builder.setupPost()
    builder.save(tmp_path / "font.ttf")
    face = Face(tmp_path / "font.ttf")
    assert face.letters() == {"A"}
    points, _, _ = face.glyph("A")
    assert len(points) == 5
    shape = outlines([face.glyph("A")])
    ends = np.array([(100, 0), (950, 550), (550, 950), (0, 500)])  # of the three curves, two of them half way
    triangles = [area_of(ends[i], outer, ends[i + 1]) for i, outer in enumerate(points[1:4])]
    # A parabola takes two thirds of the triangle around it, and lines at four equal steps all of that but 1 / 4^2.
    expected = area_of(*ends) + sum(triangles) * 2 / 3 * 15 / 16
    assert area_of(*shape.points) == pytest.approx(expected)
    np.testing.assert_array_equal(shape.after[shape.before], np.arange(len(shape.points)))


def test_letters_look_as_pillow_draws_them():
    from PIL import Image, ImageFont

    font, face, size = ImageFont.truetype(str(SANS), 200), Face(SANS), 40
    letters = "AgÅ&Жض"
    images = drawn(*(face.glyph(letter) for letter in letters), side=size, size=size, fill=True)
    for letter, image in zip(letters, images, strict=True):
        mask = font.getmask(letter)
        whole = Image.frombytes("L", mask.size, bytes(mask))
        exact = whole.crop(whole.getbbox()).resize((size, size), Image.Resampling.BOX)
        assert np.abs(np.asarray(exact, float) - image).mean() < 6, letter


def test_scripts_and_names():
    assert [script_name(letter) for letter in "Aაⵣ𐌂"] == ["Latin", "Georgian", "Tifinagh", "Old Italic"]
    assert script_name("µ") is None and script_name("𝐀") is None
    assert letter_name("A", "Latin") == "capital letter a" and letter_name("A") == "latin capital letter a"


def test_what_is_no_font_is_refused(tmp_path):
    (tmp_path / "font.ttf").write_bytes(b"no font")
    with pytest.raises(InputError, match="no TrueType font"):
        Face(tmp_path / "font.ttf")
