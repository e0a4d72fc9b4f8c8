"""One image file becomes verified, upright, opaque RGB; what cannot be is refused with a named reason."""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from data_prep.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # nothing that starts another program, as EPS does
MAX_PIXELS = 50_000_000
# What Pillow raises on damaged files; the first three cover nearly all of two million mutated ones.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, OverflowError, EOFError, struct.error, zlib.error)


class BadImage(Exception):
    """An image that training must not see: `reason` is a fixed phrase to count by, `detail` is about this one."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class CheckedImage:
    data: bytes  # the original bytes where nothing had to change, else a PNG
    extension: str  # "png" or "jpg"
    width: int  # pixels, after EXIF orientation
    height: int
    fixes: tuple[str, ...]  # what had to be put right, for the report


def parse_color(color: str) -> tuple[int, int, int]:
    """The RGB of a CSS color name or `#rrggbb`."""
    try:
        return ImageColor.getrgb(color)[:3]
    except ValueError:
        raise UserError(f"--background {color!r} is not a color; a name like white or a code like #ffffff is wanted") from None


def check(data: bytes, background: tuple[int, int, int] = (255, 255, 255), max_pixels: int = MAX_PIXELS) -> CheckedImage:
    """Decode `data` in full and put it right: EXIF orientation applied, transparency composited, RGB.

    Raises:
        BadImage: not an image, too many pixels (judged by the header, before decoding), or damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImage("empty file" if not data else "not an image") from None
    except Image.DecompressionBombError as error:
        raise BadImage("too many pixels", str(error)) from None
    except DAMAGE as error:
        raise BadImage("damaged image", str(error)) from None
    if image.width * image.height > max_pixels:
        raise BadImage("too many pixels", f"{image.width} x {image.height}; see --max-pixels")
    original = {"JPEG": "jpg", "PNG": "png"}.get(image.format)
    fixes = [] if original else [f"{image.format} to PNG"]
    try:
        image.load()
        turned = image.getexif().get(0x0112, 1) != 1
        upright = ImageOps.exif_transpose(image)
    except DAMAGE as error:
        raise BadImage("damaged image", str(error)) from None
    if turned:
        fixes.append("orientation")
    if upright.has_transparency_data:
        canvas = Image.new("RGBA", upright.size, (*background, 255))
        canvas.alpha_composite(upright.convert("RGBA"))
        upright = canvas
        fixes.append("transparency")
    elif upright.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit gray at 255, which turns a picture white.
        upright = Image.fromarray((np.asarray(upright).clip(0, 65535) // 257).astype(np.uint8))
        fixes.append("16 bit")
    elif upright.mode == "F":
        raise BadImage("unsupported pixel type", "floating point")
    elif upright.mode != "RGB":
        fixes.append(f"{upright.mode} to RGB")
    if not fixes:
        return CheckedImage(data, original, *upright.size, ())
    buffer = io.BytesIO()
    upright.convert("RGB").save(buffer, "PNG")
    return CheckedImage(buffer.getvalue(), "png", *upright.size, tuple(fixes))
