"""Decoding and resizing pictures."""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from metadist.core.errors import InputError
from metadist.data.files import open_regular, read_regular, within
from metadist.data.notes import Notes, shown

SUFFIXES = {
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
FILTER = "Lanczos"
DARK = "a picture of 16 bits per colour that uses 14 or fewer and would be dark: save it with 8 bits"
FILE_BYTES = 1 << 28
TOLD = 20  # bad pictures named in one message
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, struct.error, zlib.error)


class BadPicture(InputError):
    """One picture that cannot be used; `why` in a few words."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where} is {why}; replace or remove it")
        self.where, self.why = where, why


class Decoder:
    """Pictures as uint8 [C, H, W]: upright, transparency over white, resized to `size` (H, W) by Pillow's Lanczos.

    `mode` is Pillow's: "L" (C = 1) or "RGB" (C = 3). The aspect ratio is not kept. Grey levels of more than 8 bits are
    shifted down from `deep_bits`, one number for all pictures (see `measure`). What is lost is noted.
    """

    def __init__(self, size: tuple[int, int], mode: str, notes: Notes) -> None:
        self.size, self.mode, self.notes = size, mode, notes
        self.deep_bits = 16
        self.dark_colours = False  # whether the pictures of 16 bits per colour use far fewer

    def measure(self, files: Iterable[Path], root: Path) -> None:
        """Find how many bits the deep pictures use: 12-bit data often lie in 16-bit files."""
        highest, count, example, brightest = 0, 0, "", -1
        for file in files:
            grey, colours = _deep_levels(file)
            if grey is not None:
                highest, count = max(highest, int(grey.max())), count + 1
                example = example or within(file, root)
            if colours is not None:
                brightest = max(brightest, int(colours.max()))
        self.dark_colours = 0 <= brightest < 64
        bits = max(8, highest.bit_length() + highest.bit_length() % 2)
        self.deep_bits = bits
        what = "grey pictures of more than 8 bits scaled to 0..255"
        why = f"their largest value is {highest}, so they are taken as {bits} bits and divided by {1 << (bits - 8)}"
        self.notes.add(what, why, example, "make 8-bit pictures of them for another scale", count)

    def __call__(self, data: bytes, where: str) -> np.ndarray:
        """Decode one picture. Raises BadPicture naming `where`."""
        from PIL import Image, ImageOps

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd tags and palettes: what matters raises
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(data)) as file:
                    coarse = _sixteen_bit_colour(file, data)
                    if coarse and self.dark_colours:
                        raise BadPicture(where, DARK)
                    frames = getattr(file, "is_animated", False)
                    image = self._eight_bits(ImageOps.exif_transpose(file), where)
                return self._fit(image, where, coarse, frames)
        except BadPicture:
            raise
        except DAMAGE as error:
            raise BadPicture(where, "not a picture that can be read or is cut short") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise BadPicture(where, "a picture with too many pixels to be read safely") from error

    def _fit(self, image: Any, where: str, coarse: bool, frames: bool) -> np.ndarray:
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
            raise BadPicture(where, f"a picture in {image.mode} colours, which have no plain RGB") from error
        if coarse:
            why = "colours of 16 bits are taken by their high byte, which loses data of fewer bits"
            self.notes.add("deep colours cut", why, where, "make 8-bit pictures of them if they use fewer bits")
        if frames:
            why = "they have several frames or pages, of which the first is taken"
            self.notes.add("frames left out of pictures", why, where, "save the frames as pictures of their own")
        if abs(image.width * height - image.height * width) > 0.02 * image.height * width:
            why = f"to {height} x {width} without keeping the aspect ratio"
            example = f"{where}, {image.height} x {image.width}"
            self.notes.add("pictures stretched", why, example, "crop or pad them before, or choose another size")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        pixels = np.asarray(image)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def _eight_bits(self, image: Any, where: str) -> Any:
        """Deep grey levels to 8 bits by a shift: Pillow's own conversion may clip them instead."""
        from PIL import Image

        if image.mode == "F":
            raise BadPicture(
                where, "a picture of floating-point pixels, whose range is not known: save it with 8 or 16 bits"
            )
        if not image.mode.startswith("I"):
            return image
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0:
            raise BadPicture(where, "a picture with negative pixels, whose range is not known")
        return Image.fromarray((levels >> (self.deep_bits - 8)).clip(0, 255).astype(np.uint8))


def read(path: Path) -> bytes:
    return read_regular(path, FILE_BYTES)


def refuse(bad: list[BadPicture], total: int, source: Path, remedy: str) -> None:
    """Raise one InputError for all bad pictures, where there are any."""
    if len(bad) == 1:
        raise InputError(f"{bad[0].where} is {bad[0].why}; {remedy}") from bad[0]
    if bad:
        reasons: dict[str, list[str]] = {}
        for picture in bad[:TOLD]:
            reasons.setdefault(picture.why, []).append(picture.where)
        named = ", ".join(f"{', '.join(where)} ({why})" for why, where in reasons.items())
        more = f" and {len(bad) - TOLD} more" if len(bad) > TOLD else ""
        raise InputError(
            f"{len(bad)} of {total} pictures in {shown(source)} cannot be used: {named}{more}; for each: {remedy}"
        ) from bad[0]


def natural(name: str) -> tuple[list[Any], str]:
    """A sort key by which "image2" comes before "image10"."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def _deep_levels(file: Path) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The grey levels of a picture of more than 8 bits, or the high bytes of one of 16 bits per colour; none of others
    and of what cannot be read."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_regular(file) as opened:
                start = opened.read(26)
                with Image.open(opened) as image:
                    if image.mode.startswith("I"):
                        return np.asarray(image), None
                    if _sixteen_bit_colour(image, start):
                        return None, np.asarray(image.convert("RGB"))
    except (*DAMAGE, Image.DecompressionBombError, Image.DecompressionBombWarning):
        pass  # decoding it will say so
    return None, None


def _sixteen_bit_colour(file: Any, data: bytes) -> bool:
    """Whether Pillow keeps only the high byte of each of several channels."""
    if file.format == "PNG":
        return data[24] == 16 and data[25] in (2, 4, 6)  # bit depth and colour type of the IHDR chunk
    bits = file.tag_v2.get(258, ()) if file.format == "TIFF" else ()
    return isinstance(bits, tuple) and len(bits) > 1 and max(bits) > 8
