"""What a model sees: the pixels, whatever the file format."""

import io
import struct
import zlib

import numpy as np
import pytest
from conftest import png
from PIL import Image, ImageDraw

from data_prep.errors import UserError
from data_prep.images import BadImage, Rules, _plain_jpeg, _plain_png, check, check_signature, parse_color


def pixels(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    assert image.mode == "RGB"
    return np.asarray(image)


def black_icon() -> Image.Image:
    """A black square in the middle of nothing; the invisible pixels are black as well, as many tools write
    them.
    """
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (2, 2, 6, 6))
    return image


def test_a_black_icon_on_transparency_is_black_on_white():
    checked = check(png(black_icon()))
    assert checked.data is not None
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
    assert pixels(check(png(black_icon()), Rules(background=parse_color("#ff0000"))).data)[0, 0].tolist() == [
        255,
        0,
        0,
    ]
    with pytest.raises(UserError, match="--background"):
        parse_color("nocolor")


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (16, 8), "white")
    image.paste((0, 0, 0), (0, 0, 4, 8))  # black at the left; stored turned
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to view
    checked = check(png(image, "JPEG", exif=exif, quality=95))
    assert (checked.width, checked.height) == (8, 16)
    result = pixels(checked.data)
    assert result[0].mean() < 30
    assert result[-1].mean() > 225
    assert checked.fixes == ("orientation",)


def test_16_bit_gray_keeps_its_range():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    result = pixels(check(png(Image.fromarray(ramp))).data)
    np.testing.assert_array_equal(result[..., 0].ravel(), np.arange(256))


def test_16_bit_gray_is_rounded_to_the_nearest_level():
    levels = np.arange(65536).astype(np.uint16).reshape(256, 256)
    gray = pixels(check(png(Image.fromarray(levels)), Rules()).data)[..., 0]
    np.testing.assert_array_equal(gray, np.round(levels / 257))


def noise(mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    return Image.effect_noise(size, 90).convert(mode)


def test_what_needs_no_change_keeps_its_bytes():
    for format, extension, options in (
        ("PNG", "png", {}),
        ("JPEG", "jpg", {}),
        ("WEBP", "webp", {"lossless": True}),
    ):
        data = png(noise(), format, **options)
        checked = check(data)
        assert (checked.data, checked.extension, checked.fixes) == (None, extension, ())
        assert (check_signature(data).extension, check_signature(data).content) == (
            extension,
            checked.content,
        )


@pytest.mark.parametrize(
    ("mode", "format"),
    [("L", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"), ("L", "JPEG"), ("RGB", "BMP"), ("P", "GIF")],
)
@pytest.mark.parametrize(("encode", "stored"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_everything_else_becomes_rgb(mode, format, encode, stored):
    data = png(noise(mode), format)
    checked = check(data, Rules(encode=encode))
    assert checked.fixes
    assert Image.open(io.BytesIO(checked.data)).format == stored
    assert pixels(checked.data).shape == (16, 24, 3)
    original = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(pixels(checked.data) - original).max() <= (0 if encode != "jpeg" else 12)
    assert check_signature(checked.data).content == checked.content


def test_equal_pixels_are_equal_however_they_are_stored():
    image = noise()
    stored = [
        png(image),
        png(image, compress_level=1),
        png(image, "WEBP", lossless=True),
        png(image, "BMP"),
        png(image.convert("RGBA")),
    ]
    assert len({check(data).pixels for data in stored}) == 1
    other = image.copy()
    other.putpixel((3, 3), (1, 2, 3))
    assert check(png(other)).pixels != check(png(image)).pixels


def test_the_fast_path_decodes_the_same_pixels_as_pillow():
    for data in (
        png(noise(size=(33, 17))),
        png(noise(size=(33, 17)), "JPEG", quality=80),
        png(noise(), compress_level=0),
    ):
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        found = _plain_png(data, Rules()) if data[:1] == b"\x89" else _plain_jpeg(data, Rules())
        np.testing.assert_array_equal(found, expected)


def test_resizing_makes_the_shorter_side():
    checked = check(png(noise(size=(90, 60))), Rules(resize_px=20))
    assert (checked.width, checked.height, checked.fixes) == (30, 20, ("resized",))
    assert pixels(checked.data).shape == (20, 30, 3)
    assert check(png(noise(size=(90, 20))), Rules(resize_px=20)).data is None


def test_phashes_of_near_identical_images_are_near():
    image = Image.new("RGB", (120, 90), "white")
    ImageDraw.Draw(image).polygon([(10, 80), (60, 5), (110, 70)], fill=(20, 90, 200))

    def bits(data: bytes) -> np.ndarray:
        # the edge is white
        assert np.abs(np.frombuffer(check(data).phash, np.uint8)[32:].astype(int) - 255).max() < 8
        return np.unpackbits(np.frombuffer(check(data).phash, np.uint8)[:32])

    phash = bits(png(image))
    for near in (png(image, "JPEG", quality=60), png(image.resize((240, 180)))):
        assert (bits(near) != phash).sum() <= 7
    assert (bits(png(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))) != phash).sum() > 20


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
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript (EPS) is not supported"),
        (good_png[: len(good_png) // 2], "truncated image"),
        (good_jpeg[: len(good_jpeg) // 2], "truncated image"),
        (good_png[:200] + bytes(64) + good_png[264:], "damaged image"),
        (header_only_png(10_000, 10_000), "too many pixels"),
        (header_only_png(60_000, 60_000), "too many pixels"),
        (header_only_png(10, 10), "damaged image"),
        (png(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "unsupported pixel type"),
    ],
    ids=["empty", "text", "eps", "short png", "short jpeg", "holed png", "big", "bomb", "no pixels", "float"],
)
def test_a_bad_image_has_a_named_reason(data, reason):
    with pytest.raises(BadImage) as caught:
        check(data)
    assert caught.value.reason == reason


def test_damage_that_a_decoder_forgives_is_found():
    """Zeroed pages and flipped bits in PNGs are all found; in JPEGs, zeroed pages nearly all (97 % where it
    was measured).
    """
    rng = np.random.default_rng(0)
    large_png, large_jpeg = png(noise(size=(160, 160))), png(noise(size=(320, 240)), "JPEG", quality=90)
    found = []
    for _ in range(40):
        at = int(rng.integers(1000, len(large_jpeg) - 5000))
        bit = int(rng.integers(8, len(large_png)))
        with pytest.raises(BadImage):
            check(
                large_png[:bit] + bytes([large_png[bit] ^ 1 << int(rng.integers(8))]) + large_png[bit + 1 :]
            )
        try:
            check(large_jpeg[:at] + bytes(4096) + large_jpeg[at + 4096 :])
        except BadImage:
            found.append(at)
    assert len(found) >= 36


def test_a_png_whose_checksums_hide_the_damage_does_no_harm():
    """An evil PNG with right checksums reaches the decoder: it is refused or decoded, never a crash."""
    rng = np.random.default_rng(1)
    body = zlib.compress(bytes(rng.integers(0, 256, 16 * 49, dtype=np.uint8)))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    outcomes = set()
    for _ in range(300):
        data = bytearray(body)
        for at in rng.integers(0, len(data), 3):
            data[at] = rng.integers(256)
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0))
        try:
            outcomes.add(
                check(
                    b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", bytes(data)) + chunk(b"IEND", b"")
                ).extension
            )
        except BadImage as bad:
            outcomes.add(bad.reason)
    assert "damaged image" in outcomes
