"""Decoding and resizing pictures."""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from metadist.core.errors import InputError
from metadist.data.files import Unreadable, open_regular, within
from metadist.data.notes import Faults, Notes

SUFFIXES = {
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
FILTER = "Lanczos"
FILE_BYTES = 1 << 28
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, struct.error, zlib.error)


class Picture(NamedTuple):
    """A picture, where it lies in the source, and how to read its bytes (raises InputError where that fails)."""

    where: str
    read: Callable[[], bytes]


class BadPicture(InputError):
    """A picture that cannot be used, and why."""


@dataclass(frozen=True)
class PictureForm:
    """How pictures become pixels, as plain values: a dataset says it, and a run keeps it for the pictures it will be
    asked about.

    `size` (H, W), `mode` and `deep_bits` are those of `Decoder`; `resize` names what is done about the aspect ratio;
    `inverted`: ink is bright on 0, and dark ink on white paper is turned so; `highest`: the value of full brightness.
    """

    size: tuple[int, int]
    mode: Literal["L", "RGB"]
    resize: Literal["squash"] = "squash"
    deep_bits: int = 16
    inverted: bool = False
    highest: int = 255

    def __post_init__(self) -> None:
        if min(self.size) < 1 or not 8 <= self.deep_bits <= 32 or not 1 <= self.highest <= 255:
            raise ValueError("no form that pictures can have")


class Decoder:
    """Pictures as uint8 [C, H, W]: upright, transparency over white, resized to `size` (H, W) by Pillow's Lanczos.

    `mode` is Pillow's: "L" (C = 1) or "RGB" (C = 3). The aspect ratio is not kept. Grey levels of more than 8 bits are
    shifted down from `deep_bits`, one number for all pictures (see `measure`). What is lost is noted; what cannot be
    used is counted in `faults`.
    """

    def __init__(self, size: tuple[int, int], mode: str, notes: Notes) -> None:
        self.size, self.mode, self.notes = size, mode, notes
        self.faults = Faults("pictures")
        self.deep_bits = 16
        self.inverted, self.highest = False, 255  # see `PictureForm`
        self.dark_colours = False  # whether the pictures of 16 bits per colour use far fewer

    @classmethod
    def of(cls, form: PictureForm, notes: Notes) -> "Decoder":
        """The decoder that makes pixels of this form."""
        decoder = cls(form.size, form.mode, notes)
        decoder.deep_bits, decoder.inverted, decoder.highest = form.deep_bits, form.inverted, form.highest
        return decoder

    @property
    def form(self) -> PictureForm:
        """All that decides which pixels a picture becomes, once the pictures are measured."""
        size, mode = (self.size[0], self.size[1]), "L" if self.mode == "L" else "RGB"
        return PictureForm(size, mode, "squash", self.deep_bits, self.inverted, self.highest)

    def measure(self, files: Iterable[Path], root: Path) -> None:
        """Find how many bits the deep pictures use: 12-bit data often lie in 16-bit files."""
        highest, count, example, brightest = 0, 0, "", -1
        for path in files:
            try:
                with open_regular(path) as file, _opened(file) as (image, coarse):
                    if image.mode.startswith("I"):
                        highest, count = max(highest, int(np.asarray(image).max())), count + 1
                        example = example or within(path, root)
                    elif coarse:
                        brightest = max(brightest, int(np.asarray(image.convert("RGB")).max()))
            except InputError:
                continue  # decoding it will say so
        self.dark_colours = 0 <= brightest < 64
        bits = max(8, highest.bit_length() + highest.bit_length() % 2)
        self.deep_bits = bits
        what = "grey pictures of more than 8 bits scaled to 0..255"
        why = f"their largest value is {highest}, so they are taken as {bits} bits and divided by {1 << (bits - 8)}"
        self.notes.add(what, why, example, "make 8-bit pictures of them for another scale", count)

    def __call__(self, picture: Picture) -> np.ndarray | None:
        """The pixels of a picture; None, and one more of the `faults`, where it cannot be used."""
        try:
            return self._decode(picture)
        except BadPicture as error:
            self.faults.add(picture.where, str(error))
        except Unreadable as error:
            self.faults.add(picture.where, error.why)
        return None

    def open_picture(self, image: Any, where: str) -> np.ndarray | None:
        """The same of an open picture of Pillow's, called `where`."""
        try:
            return self.pixels(image, where)
        except BadPicture as error:
            self.faults.add(where, str(error))
        return None

    def _decode(self, picture: Picture) -> np.ndarray:
        where = picture.where
        with _opened(io.BytesIO(picture.read())) as (file, coarse):
            if coarse and self.dark_colours:
                raise BadPicture(
                    "is a picture of 16 bits per colour that uses 14 or fewer and would be dark: save it with 8 bits"
                )
            pixels = self.pixels(file, where)
            if coarse:
                why = "colours of 16 bits are taken by their high byte, which loses data of fewer bits"
                self.notes.add("deep colours cut", why, where, "make 8-bit pictures of them if they use fewer bits")
            if getattr(file, "is_animated", False):
                why = "they have several frames or pages, of which the first is taken"
                self.notes.add("frames left out of pictures", why, where, "save the frames as pictures of their own")
            return pixels

    def pixels(self, image: Any, where: str) -> np.ndarray:
        """The pixels of an open picture of Pillow's. Raises BadPicture where it cannot be used."""
        from PIL import ImageOps

        with _reading():
            pixels = self._fit(self._eight_bits(ImageOps.exif_transpose(image)), where)
        if self.inverted:
            pixels = 255 - pixels
        return pixels if self.highest == 255 else np.round(pixels * (self.highest / 255)).astype(np.uint8)

    def _fit(self, image: Any, where: str) -> np.ndarray:
        """To the mode and size asked for, with a note of what that loses."""
        from PIL import Image

        height, width = self.size
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if image.getextrema()[3][0] < 255:
                remedy = "fill them yourself for another background"
                self.notes.add("transparent pictures filled", "transparency is laid over white", where, remedy)
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode == "CMYK":
            remedy = "make RGB pictures of them to choose the colours"
            self.notes.add("print colours converted", "CMYK to RGB without a colour profile", where, remedy)
        try:
            image = image.convert(self.mode)
        except ValueError as error:
            raise BadPicture(f"is a picture in {image.mode} colours, which have no plain RGB") from error
        if abs(image.width * height - image.height * width) > 0.02 * image.height * width:
            why = f"to {height} x {width} without keeping the aspect ratio"
            example = f"{where}, {image.height} x {image.width}"
            self.notes.add("pictures stretched", why, example, "crop or pad them before, or choose another size")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        pixels = np.asarray(image)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def _eight_bits(self, image: Any) -> Any:
        """Deep grey levels to 8 bits by a shift: Pillow's own conversion may clip them instead."""
        from PIL import Image

        if image.mode == "F":
            why = "is a picture of floating-point pixels, whose range is not known: save it with 8 or 16 bits"
            raise BadPicture(why)
        if not image.mode.startswith("I"):
            return image
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0:
            raise BadPicture("is a picture with negative pixels, whose range is not known")
        return Image.fromarray((levels >> (self.deep_bits - 8)).clip(0, 255).astype(np.uint8))


def natural(name: str) -> tuple[list[Any], str]:
    """A sort key by which "image2" comes before "image10"."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


@contextmanager
def _opened(data: BinaryIO) -> Iterator[tuple[Any, bool]]:
    """A picture, and whether Pillow keeps only the high byte of each of several channels of 16 bits. Raises BadPicture
    where it cannot be read, also later, as its pixels are read when they are needed."""
    from PIL import Image

    with _reading():
        start = data.read(26)
        data.seek(0)
        with Image.open(data) as file:
            yield file, _sixteen_bit_colour(file, start)


@contextmanager
def _reading() -> Iterator[None]:
    """Raises BadPicture where Pillow cannot read a picture meanwhile."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd tags and palettes: what matters raises
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except InputError:
        raise
    except DAMAGE as error:
        raise BadPicture("is not a picture that can be read or is cut short") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadPicture("is a picture with too many pixels to be read safely") from error


def _sixteen_bit_colour(file: Any, start: bytes) -> bool:
    if file.format == "PNG":
        return start[24] == 16 and start[25] in (2, 4, 6)  # bit depth and colour type of the IHDR chunk
    bits = file.tag_v2.get(258, ()) if file.format == "TIFF" else ()
    return isinstance(bits, tuple) and len(bits) > 1 and max(bits) > 8
