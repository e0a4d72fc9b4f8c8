"""Whichever decoder is used, the pixels equal Pillow's."""

import io
import struct
import zlib

import numpy as np
import pytest
from conftest import png
from PIL import Image, ImageFilter

from data_prep.images import BadImage
from train.data.decode import _quick, decode, decoded, rgb_jpeg_size


def smooth(width: int = 61, height: int = 47) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3))


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def rgb_16_bit_png() -> bytes:
    """48 bits per pixel, which Pillow cannot write."""
    rows = np.random.default_rng(0).integers(0, 1 << 16, (5, 7, 3)).astype(">u2")

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header, body = (
        struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0),
        zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)),
    )
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


STORED = {
    "png": png(smooth()),
    "png that has a transparent color": png(smooth(), transparency=(0, 0, 0)),
    "png with gamma": png(smooth(), icc_profile=b"", dpi=(72, 72)),
    "jpeg 444": png(smooth(), "JPEG", subsampling=0),
    "jpeg 420": png(smooth(), "JPEG", subsampling=2, quality=60),
    "jpeg 422, progressive": png(smooth(), "JPEG", subsampling=1, progressive=True),
    "jpeg in rgb": png(smooth(), "JPEG", keep_rgb=True),
    "jpeg that is cut, with an end marker": png(smooth(200, 200), "JPEG")[:-20] + b"\xff\xd9",
}
BY_PILLOW = {
    "png gray": png(smooth().convert("L")),
    "png 1 bit": png(smooth().convert("1")),
    "png palette": png(smooth().quantize(9)),
    "png alpha": png(smooth().convert("RGBA")),
    "png gray and alpha": png(smooth().convert("LA")),
    "png 16 bit gray": png(Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50))),
    "png 16 bit": rgb_16_bit_png(),
    "jpeg gray": png(smooth().convert("L"), "JPEG"),
    "jpeg cmyk": png(smooth().convert("CMYK"), "JPEG"),
    "webp": png(smooth(), "WEBP", quality=80),
}


@pytest.mark.parametrize("name", [*STORED, *BY_PILLOW])
def test_pixels_equal_pillows(name):
    data = (STORED | BY_PILLOW)[name]
    expected = by_pillow(data)
    np.testing.assert_array_equal(decoded(data), expected)
    np.testing.assert_array_equal(np.asarray(decode(data)), expected)
    assert (_quick(data) is None) == (name in BY_PILLOW or "is cut" in name)


def test_a_large_jpeg_is_decoded_at_a_reduced_size():
    data = png(smooth(400, 208), "JPEG", quality=95)
    assert rgb_jpeg_size(data) == (208, 400)
    for reduce in (2, 4, 8):
        boxes = Image.fromarray(by_pillow(data)).resize((400 // reduce, 208 // reduce), Image.BOX)
        assert np.abs(decoded(data, reduce) - np.asarray(boxes).astype(int)).mean() < 1.5
    assert decoded(png(smooth(401, 203), "JPEG"), 4).shape == (51, 101, 3)
    for name in BY_PILLOW:
        assert rgb_jpeg_size(BY_PILLOW[name]) is None
        assert decoded(BY_PILLOW[name], 8).shape == decoded(BY_PILLOW[name]).shape


def test_bytes_that_are_no_image_are_bad_images():
    for data in (
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xe0",
        STORED["png"][:20],
        STORED["png"][:200],
        STORED["jpeg 444"][:300],
        b"GIF89a",
    ):
        with pytest.raises(BadImage, match=r"not PNG, JPEG or WebP|damaged image"):
            decoded(data)
