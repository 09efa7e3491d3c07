"""Decoding and resizing one picture."""

import io
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from metadist.errors import InputError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
FILTER = "Lanczos"


def decode(data: bytes, where: str, size: tuple[int, int], mode: str) -> np.ndarray:
    """A picture as uint8 [C, H, W]: upright, transparency over white, resized to `size` (H, W) by Pillow's Lanczos.

    `mode` is Pillow's: "L" (C = 1) or "RGB" (C = 3). The aspect ratio is not kept. Raises InputError naming `where`.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as file:
                image = _eight_bits(ImageOps.exif_transpose(file))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert(mode)
        if image.size != (size[1], size[0]):
            image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise InputError(f"{where} is not a picture that can be read or is cut short; replace or remove it") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{where} has too many pixels to be read safely; shrink it first") from error
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def natural(name: str) -> list[Any]:
    """A sort key by which "image2" comes before "image10"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def _eight_bits(image: Any) -> Any:
    """16-bit grey levels to 8 by their high byte: Pillow's own conversion may clip them instead."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    return image
