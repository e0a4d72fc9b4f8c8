"""An encoded image becomes RGB pixels, by the fastest decoder that gives the same pixels as Pillow.

Plain RGB PNGs are decoded by libspng, RGB JPEGs by libjpeg-turbo, all others (WebP, gray, palettes, alpha, 16
bit, CMYK, what one of the two refuses, very large images) by Pillow. Shards of other makers may have any
image: one that is slow to open, though small, is refused (data_prep.parts).
"""

import io
import struct

import numpy as np
import pyspng
import simplejpeg
from PIL import Image, UnidentifiedImageError

from data_prep.images import DAMAGE, PNG_SIGNATURE, BadImage, check_parts

FORMATS = ("PNG", "JPEG", "WEBP")


def decode(data: bytes) -> Image.Image:
    """The image in RGB, as a PIL image.

    Raises:
        BadImage: it is damaged, has too many pixels, or is slow to open, see data_prep.parts.
    """
    pixels = _quick(data)
    return _by_pillow(data) if pixels is None else Image.fromarray(pixels)


def decoded(data: bytes, reduce: int = 1) -> np.ndarray:
    """The image in RGB, uint8 [H, W, 3].

    Args:
        reduce: 2, 4 or 8 decodes an RGB JPEG at 1/reduce of its size, rounded up, in a fraction of the time:
            higher frequencies are dropped before the inverse cosine transform. Other images are decoded
            whole.

    Raises:
        BadImage: it is damaged, or has too many pixels.
    """
    pixels = _quick(data, reduce)
    return np.array(_by_pillow(data)) if pixels is None else pixels


def rgb_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that `decoded` can reduce, from its header; None for all other images."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (
        (height, width) if colors in ("YCbCr", "RGB") and height * width <= Image.MAX_IMAGE_PIXELS else None
    )


def _quick(data: bytes, reduce: int = 1) -> np.ndarray | None:
    if data.startswith(PNG_SIGNATURE) and len(data) > 29:
        width, height, depth, color_type = struct.unpack_from(">IIBB", data, 16)
        if (depth, color_type) != (8, 2) or width * height > Image.MAX_IMAGE_PIXELS:
            return None
        try:
            return pyspng.load(data)
        except RuntimeError:
            return None
    if data.startswith(b"\xff\xd8"):
        check_parts(data, "JPEG")
    if (size := rgb_jpeg_size(data)) is None:
        return None
    least = {} if reduce == 1 else {"min_height": -(-size[0] // reduce), "min_width": -(-size[1] // reduce)}
    try:
        return simplejpeg.decode_jpeg(data, **least)
    except ValueError:
        return None


def _by_pillow(data: bytes) -> Image.Image:
    """What data_prep has not decoded (--skip-decode) may be anything.

    Raises:
        BadImage: it is no image, damaged, has too many pixels, or is slow to open.
    """
    if data.startswith(PNG_SIGNATURE):
        check_parts(data, "PNG")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS).convert("RGB")
    except Image.DecompressionBombError as error:
        raise BadImage("too many pixels", str(error)) from None
    except UnidentifiedImageError:
        raise BadImage("not PNG, JPEG or WebP", f"it begins with {data[:16]!r}") from None
    except DAMAGE as error:
        raise BadImage("damaged image", str(error)) from None
