"""Decoding and resizing pictures."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from metadist.core.errors import InputError
from metadist.data.files import Unreadable, open_regular, within
from metadist.data.notes import Faults, Notes, Progress

SUFFIXES = {
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
FILTER = "Lanczos"
SCALED, RESCALE = "grey pictures of more than 8 bits scaled to 0..255", "make 8-bit pictures of them for another scale"
FILE_BYTES = 1 << 28
Resize = Literal["squash", "crop", "pad"]
RESIZED = {  # what is noted of pictures of another aspect ratio: what, why, remedy
    "squash": ("pictures stretched", "without keeping the aspect ratio", "--resize crop or pad keeps it"),
    "crop": ("pictures cropped", "by what lies beside or above their middle", "--resize pad keeps all of them"),
    "pad": ("pictures padded", "with black bars", "--resize crop fills the picture"),
}
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, struct.error, zlib.error)


class Picture(NamedTuple):
    """A picture, where it lies in the source, and how to read its bytes (raises InputError where that fails)."""

    where: str
    read: Callable[[], bytes]


class BadPicture(InputError):
    """A picture that cannot be used, and why."""


@dataclass(frozen=True)
class PictureForm:
    """How an opened picture becomes the array that is stored: uint8 [C, H, W], upright, transparency over white. Plain
    values: a data set of pictures says it in its metadata, so that other pictures can be treated likewise.

    `size` is (H, W), `mode` Pillow's: "L" (C = 1) or "RGB" (C = 3). `resize` says what happens where the aspect ratio
    is another: "squash" gives it up, "crop" keeps the middle, "pad" adds black bars; all by Pillow's Lanczos. Grey
    levels of more than 8 bits are shifted down from `deep_bits`. `inverted`: ink is bright on 0, and dark ink on white
    paper is turned so. `highest` is the value of full brightness.

    Example:
        >>> form = PictureForm.of(open_dataset("data/birds").metadata["extra"])
        >>> form(PIL.Image.open("new.jpg")).shape
        (3, 84, 84)
    """

    size: tuple[int, int]
    mode: Literal["L", "RGB"]
    resize: Resize = "squash"
    deep_bits: int = 16
    inverted: bool = False
    highest: int = 255

    def __post_init__(self) -> None:
        if min(self.size) < 1 or not 8 <= self.deep_bits <= 32 or not 1 <= self.highest <= 255:
            raise ValueError("no form that pictures can have")

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> "PictureForm | None":
        """The one that a data set's metadata keeps (`about` wrote it), or None where it is not of pictures."""
        kept = extra.get("preprocessing", {}).get("pictures")
        return None if kept is None else cls(**{**kept, "size": tuple(kept["size"])})

    def about(self) -> dict[str, Any]:
        """What a data set says of it in its metadata."""
        return {"filter": FILTER, "preprocessing": {"pictures": asdict(self)}}

    def __call__(self, image: Any, notes: Notes | None = None, where: str = "") -> np.ndarray:
        """The array of one open picture of Pillow's; what it loses is noted. Raises BadPicture where it cannot be
        used."""
        from PIL import ImageOps

        notes = notes or Notes()
        with _reading():
            image = self._colours(self._eight_bits(ImageOps.exif_transpose(image)), notes, where)
            pixels = np.asarray(self._resized(image, notes, where))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if self.inverted:
            pixels = 255 - pixels
        return pixels if self.highest == 255 else np.round(pixels * (self.highest / 255)).astype(np.uint8)

    def _resized(self, image: Any, notes: Notes, where: str) -> Any:
        from PIL import Image, ImageOps

        height, width = self.size
        if abs(image.width * height - image.height * width) > 0.02 * image.height * width:
            what, why, remedy = RESIZED[self.resize]
            why = f"to {height} x {width} {why}"
            notes.add(what, why, f"{where}, {image.height} x {image.width}", remedy)
        if image.size == (width, height):
            return image
        if self.resize == "crop":
            return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        if self.resize == "pad":
            return _padded(image, width, height)
        return image.resize((width, height), Image.Resampling.LANCZOS)

    def _colours(self, image: Any, notes: Notes, where: str) -> Any:
        """To the mode asked for, with a note of what that loses."""
        from PIL import Image

        if image.has_transparency_data:
            image = image.convert("RGBA")
            if image.getextrema()[3][0] < 255:
                remedy = "fill them yourself for another background"
                notes.add("transparent pictures filled", "transparency is laid over white", where, remedy)
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode == "CMYK":
            remedy = "make RGB pictures of them to choose the colours"
            notes.add("print colours converted", "CMYK to RGB without a colour profile", where, remedy)
        try:
            return image.convert(self.mode)
        except ValueError as error:
            raise BadPicture(f"is a picture in {image.mode} colours, which have no plain RGB") from error

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


def _padded(image: Any, width: int, height: int) -> Any:
    """The whole picture in the middle of a black one. (Pillow's own `pad` fails for very long pictures.)"""
    from PIL import Image

    scale = min(width / image.width, height / image.height)
    inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    padded = Image.new(image.mode, (width, height))
    padded.paste(image.resize(inner, Image.Resampling.LANCZOS), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return padded


class Decoder:
    """Pictures as arrays of a form. What is lost is noted; what cannot be used is counted in `faults`."""

    def __init__(self, form: PictureForm, notes: Notes) -> None:
        self.form, self.notes = form, notes
        self.faults = Faults("pictures")
        self.dark_colours = False  # whether the pictures of 16 bits per colour use far fewer
        self._measured = False

    def measure(self, files: Sequence[Path], root: Path, progress: Progress | None = None) -> None:
        """Find how many bits the deep pictures use (12-bit data often lie in 16-bit files): one number for all."""
        highest, count, example, brightest = 0, 0, "", -1
        for number, path in enumerate(files, start=1):
            if progress is not None:
                progress(number - 1, len(files), "pictures looked at")  # whose end is that of the rows
            try:
                with open_regular(path) as file, _opened(file) as (image, coarse):
                    if image.mode.startswith("I"):
                        highest, count = max(highest, int(np.asarray(image).max())), count + 1
                        example = example or within(path, root)
                    elif coarse:
                        brightest = max(brightest, int(np.asarray(image.convert("RGB")).max()))
            except InputError:
                continue  # decoding it will say so
        self.dark_colours, self._measured = 0 <= brightest < 64, True
        bits = max(8, highest.bit_length() + highest.bit_length() % 2)
        self.form = replace(self.form, deep_bits=bits)
        why = f"their largest value is {highest}, so they are taken as {bits} bits and divided by {1 << (bits - 8)}"
        self.notes.add(SCALED, why, example, RESCALE, count)

    def _note_depth(self, image: Any, where: str) -> None:
        """Say on which scale a deep grey picture is taken, where that was not measured here but kept from an import."""
        if self._measured or not image.mode.startswith("I"):
            return
        bits = self.form.deep_bits
        why = f"they are taken as {bits} bits, as those of training were, and divided by {1 << (bits - 8)}"
        if bits == 8:
            why = "training had none that use more than 8 bits, so they are taken as 8 bits, and above 255 all is white"
        self.notes.add(SCALED, why, where, RESCALE)

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
            self._note_depth(image, where)
            return self.form(image, self.notes, where)
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
            self._note_depth(file, where)
            pixels = self.form(file, self.notes, where)
            if coarse:
                why = "colours of 16 bits are taken by their high byte, which loses data of fewer bits"
                self.notes.add("deep colours cut", why, where, "make 8-bit pictures of them if they use fewer bits")
            if getattr(file, "is_animated", False):
                why = "they have several frames or pages, of which the first is taken"
                self.notes.add("frames left out of pictures", why, where, "save the frames as pictures of their own")
            return pixels


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
