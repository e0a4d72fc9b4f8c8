"""What a model would see: the pixels, after every way in which a picture can be stored."""

import io
import struct
import zlib

import numpy as np
import pytest
from conftest import png
from PIL import Image

from data_prep.errors import UserError
from data_prep.images import BadImage, check, parse_color


def pixels(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    assert image.mode == "RGB"
    return np.asarray(image)


def black_icon() -> Image.Image:
    """A black square in the middle of nothing; the invisible pixels are black as well, as many tools write them."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (2, 2, 6, 6))
    return image


def test_a_black_icon_on_transparency_is_black_on_white():
    checked = check(png(black_icon()))
    expected = np.full((8, 8, 3), 255)
    expected[2:6, 2:6] = 0
    np.testing.assert_array_equal(pixels(checked.data), expected)
    assert checked.fixes == ("transparency",)


@pytest.mark.parametrize("mode", ["LA", "P"])
def test_other_kinds_of_transparency_are_composited(mode):
    image = black_icon().convert("LA") if mode == "LA" else black_icon().quantize(colors=4)
    assert image.mode == mode
    result = pixels(check(png(image)).data)
    assert result[0, 0].tolist() == [255] * 3
    assert result[4, 4].tolist() == [0] * 3


def test_the_background_is_a_choice():
    assert pixels(check(png(black_icon()), parse_color("#ff0000")).data)[0, 0].tolist() == [255, 0, 0]
    with pytest.raises(UserError, match="--background"):
        parse_color("nocolor")


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (8, 4), "white")
    image.paste((0, 0, 0), (0, 0, 2, 4))  # black at the left; stored turned
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to view
    checked = check(png(image, "JPEG", exif=exif, quality=95))
    assert (checked.width, checked.height) == (4, 8)
    result = pixels(checked.data)
    assert result[0].mean() < 30
    assert result[-1].mean() > 225
    assert checked.fixes == ("orientation",)


def test_16_bit_gray_keeps_its_range():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    result = pixels(check(png(Image.fromarray(ramp))).data)
    np.testing.assert_array_equal(result[..., 0].ravel(), np.arange(256))


def test_what_needs_no_change_keeps_its_bytes():
    for format, extension in (("PNG", "png"), ("JPEG", "jpg")):
        data = png(Image.new("RGB", (5, 6), "green"), format)
        checked = check(data)
        assert (checked.data, checked.extension, checked.fixes) == (data, extension, ())


@pytest.mark.parametrize(("mode", "format"), [("L", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"), ("RGB", "WEBP"), ("RGB", "BMP"), ("P", "GIF")])
def test_everything_else_becomes_rgb_png(mode, format):
    checked = check(png(Image.new(mode, (5, 6)), format))
    assert checked.extension == "png"
    assert checked.fixes
    assert pixels(checked.data).shape == (6, 5, 3)


def header_only_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


good_png = png(Image.effect_noise((64, 64), 90).convert("RGB"))
good_jpeg = png(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (good_png[: len(good_png) // 2], "damaged image"),
        (good_jpeg[: len(good_jpeg) // 2], "damaged image"),
        (good_png[:200] + bytes(64) + good_png[264:], "damaged image"),
        (header_only_png(10_000, 10_000), "too many pixels"),
        (header_only_png(60_000, 60_000), "too many pixels"),
        (header_only_png(10, 10), "damaged image"),
        (png(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "unsupported pixel type"),
    ],
    ids=["empty", "text", "eps", "short png", "short jpeg", "holed png", "big", "bomb", "no pixels", "float"],
)
def test_a_bad_image_has_a_named_reason(data, reason):
    with pytest.raises(BadImage) as caught:
        check(data)
    assert caught.value.reason == reason
