"""Image files of changed bytes are pixels or a named reason, in builds, in training and on review's page."""

import contextlib
import io
import struct
import warnings
import zlib

import evil
import fuzz
import pytest
from conftest import noise_image
from PIL import Image

from data_prep.images import BadImage, Rules, check, check_signature
from data_prep.review.server import webp
from data_prep.web import Refused
from train.data.decode import decode, decoded

SIDE, MAX_PIXELS = 24, 1 << 20
RULES = Rules(max_pixels=MAX_PIXELS)


def encoded(format: str, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    noise_image(SIDE, SIDE).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def exif() -> bytes:
    tags = Image.Exif()
    tags[0x0112] = 6
    return tags.tobytes()


PNGS = [encoded("PNG"), encoded("PNG", "RGBA"), encoded("PNG", "P"), encoded("PNG", "1", exif=exif())]
SEEDS = [
    encoded("JPEG"),
    encoded("JPEG", progressive=True, exif=exif()),
    encoded("JPEG", "CMYK"),
    encoded("WEBP"),
]
SEEDS += [
    encoded("WEBP", "RGBA", lossless=True),
    encoded("GIF", save_all=True, append_images=[noise_image(9, 9)]),
]
SEEDS += [encoded("BMP"), encoded("TIFF"), encoded("TIFF", compression="tiff_lzw"), encoded("TIFF", "I;16")]
SEEDS += [encoded("ICO", sizes=[(16, 16)]), encoded("JPEG2000"), encoded("AVIF"), *PNGS]
SVG = b"""<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"
width="20" height="20" viewBox="0 0 9 9">
<defs><linearGradient id="a"><stop offset="0" stop-color="red"/></linearGradient></defs>
<style>.b{fill:blue}</style><rect class="b" width="10" height="10"/><path d="M1 1L9 9" stroke="url(#a)"/>
<use href="#a"/><text>a</text></svg>"""


def chunks_changed(seed: bytes, choices: fuzz.Choices) -> bytes:
    """A PNG with changed contents and names of chunks, and right checksums."""
    parts, start = [], 8
    while start < len(seed):
        length = int.from_bytes(seed[start : start + 4], "big")
        parts.append([seed[start + 4 : start + 8], seed[start + 8 : start + 8 + length]])
        start += 12 + length
    for _ in range(1 + choices.number() % 3):
        part, act = choices.of(parts), choices.number() % 8
        if act == 0:
            part[0] = choices.of(
                [b"tRNS", b"acTL", b"fcTL", b"iTXt", b"zTXt", b"sBIT", b"eXIf", b"PLTE", b"gAMA"]
            )
        elif act == 1:
            parts.insert(choices.number() % len(parts), list(part))
        elif part[0] == b"IDAT" and act < 5:
            part[1] = zlib.compress(fuzz.edited(zlib.decompress(parts_of(parts)), choices))
        else:
            part[1] = fuzz.edited(part[1], choices)
    return evil.png_of(*map(tuple, parts))


def parts_of(parts: list) -> bytes:
    """The compressed pixels of a PNG; none where they were renamed or changed."""
    data = b"".join(content for name, content in parts if name == b"IDAT")
    try:
        zlib.decompress(data)
    except zlib.error:
        return zlib.compress(b"")
    return data


def made(choices: fuzz.Choices) -> bytes:
    kind = choices.number() % 8
    if kind == 0:
        return fuzz.edited(SVG, choices)
    return chunks_changed(choices.of(PNGS), choices) if kind < 3 else fuzz.edited(choices.of(SEEDS), choices)


def large(data: bytes) -> bool:
    """A file whose header names more pixels than these tests take time for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            width, height = Image.open(io.BytesIO(data)).size
    except Exception:  # noqa: BLE001 whatever Pillow raises
        return False
    return MAX_PIXELS < width * height < 2 * Image.MAX_IMAGE_PIXELS


def for_training(data: bytes) -> None:
    if not large(data):
        decode(data)
        decoded(data, 4)


READERS = (
    lambda data: check(data, RULES),
    check_signature,  # --skip-decode
    for_training,
    lambda data: webp(data, 64, MAX_PIXELS),
)


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_images(count):
    def act(data: bytes) -> None:
        for read in READERS:
            with contextlib.suppress(BadImage, Refused):
                read(data)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged metadata and large images
        fuzz.check(count, fuzz.made_by(made, 60), act)


def test_a_header_alone_takes_no_memory():
    """Of each number of pixels that a header can name."""
    sizes = [(1 << n, 1 << m) for n in (0, 4, 12, 16, 20, 30) for m in (4, 12, 16, 20, 30)]
    pngs = [evil.png_of(evil.header(*size), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")) for size in sizes]
    bmps = [encoded("BMP")[:18] + struct.pack("<ii", *size) + encoded("BMP")[26:] for size in sizes]
    for data in (*pngs, *bmps):
        if not large(data):
            for read in READERS:
                fuzz.ends_in(lambda read=read, data=data: read(data), BadImage, Refused)
