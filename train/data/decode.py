"""An encoded picture becomes RGB pixels, by the quickest decoder that gives those of Pillow.

Plain RGB PNGs go to libspng and RGB JPEGs to libjpeg-turbo; all the rest (WebP, gray, palettes, alpha, 16
bit, CMYK, what one of the two refuses, what is large enough for Pillow to warn of) goes to Pillow."""

import io
import struct

import numpy as np
import pyspng
import simplejpeg
from PIL import Image

from data_prep.images import PNG_SIGNATURE

FORMATS = ("PNG", "JPEG", "WEBP")


def decode(data: bytes) -> Image.Image:
    """The picture in RGB, as PIL has it."""
    pixels = _quick(data)
    return _by_pillow(data) if pixels is None else Image.fromarray(pixels)


def decoded(data: bytes, reduce: int = 1) -> np.ndarray:
    """The picture in RGB, uint8 [H, W, 3].

    Args:
        reduce: 2, 4 or 8 decodes an RGB JPEG to that part of its size, rounded up, in a fraction of the time:
            what is smaller than that is left out before the inverse cosine transform. Other pictures come
            whole.
    """
    pixels = _quick(data, reduce)
    return np.array(_by_pillow(data)) if pixels is None else pixels


def rgb_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that `decoded` can reduce, by its header; None for all other pictures."""
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
    if (size := rgb_jpeg_size(data)) is None:
        return None
    least = {} if reduce == 1 else {"min_height": -(-size[0] // reduce), "min_width": -(-size[1] // reduce)}
    try:
        return simplejpeg.decode_jpeg(data, **least)
    except ValueError:
        return None


def _by_pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS).convert("RGB")
