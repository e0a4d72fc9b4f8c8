"""One image file becomes verified, upright, opaque RGB; what cannot is rejected with a named reason."""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyspng
import simplejpeg
import xxhash
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from data_prep.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # none that starts another program, as EPS does
EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}  # formats that training reads unchanged
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8"
EXIF_ORIENTATION = 0x0112
# What Pillow raises on damaged files; the first three cover nearly all of two million mutated ones.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    EOFError,
    struct.error,
    zlib.error,
)
PHASH_PX = 16
# Reasons: nothing of the image is seen; and nothing of it is seen on this background.
WHOLLY_TRANSPARENT, UNSEEN = "wholly transparent", "blank on the background"


class BadImage(Exception):
    """An image that cannot be used: `reason` is a fixed phrase to count by, `detail` is about this image."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


@dataclass(frozen=True)
class Rules:
    """Which images are accepted, and how an image that has to change is stored."""

    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: int = 50_000_000
    min_side_px: int = 8
    max_aspect: float = 20.0
    resize_px: int = 0
    encode: str = "png"


@dataclass(frozen=True)
class CheckedImage:
    """The result of `check`.

    Attributes:
        extension: "png", "jpg" or "webp".
        width, height: pixels, after EXIF orientation and resizing; 0 if the image was not decoded.
        content: xxh3 of the bytes that are stored in the shard.
        pixels: a hash of the pixels, whatever the file format.
        phash: 256 bits and a color that differ little between near-identical images (see _phash); empty if
            the image was not decoded.
        fixes: what had to be changed, for the report.
        data: the new file if something had to change, else None.
    """

    extension: str
    width: int
    height: int
    content: bytes
    pixels: bytes
    phash: bytes
    fixes: tuple[str, ...]
    data: bytes | None


class _Decoded(NamedTuple):
    pixels: np.ndarray  # uint8 [H, W, 3]
    extension: str
    fixes: list[str]


def parse_color(color: str) -> tuple[int, int, int]:
    """The RGB of a CSS color name or `#rrggbb`."""
    try:
        return ImageColor.getrgb(color)[:3]
    except ValueError:
        raise UserError(
            f"--background {color!r} is not a color; pass a CSS name like white or a code like #ffffff"
        ) from None


def check(data: bytes, rules: Rules = Rules()) -> CheckedImage:
    """Decode `data` completely; apply EXIF orientation, composite transparency, convert to 8-bit RGB.

    Plain RGB files, nearly all of most data sets, take a fast path: a PNG's checksums are verified (a decoder
    alone misses damage), a JPEG is decoded strictly. All other files go through Pillow.

    Raises:
        BadImage: not an image, too many pixels (by its header, before decoding), damaged, or blank.
    """
    try:
        decoded = _decode(data, rules)
    except DAMAGE as error:
        raise BadImage("damaged image", str(error)) from None
    pixels, extension, fixes = decoded
    if rules.resize_px and min(pixels.shape[:2]) > rules.resize_px:
        image = Image.fromarray(pixels)
        scale = rules.resize_px / min(image.size)
        size = tuple(max(rules.resize_px, round(side * scale)) for side in image.size)
        pixels = np.asarray(image.resize(size, Image.BICUBIC))
        fixes.append("resized")
    phash = _phash(pixels)
    if phash is None:
        color = "one color, #{:02x}{:02x}{:02x}".format(*pixels[0, 0])
        if any("transparency" in fix and "without" not in fix for fix in fixes):
            raise BadImage(UNSEEN, f"{color}; see --background")
        raise BadImage("blank image", color)
    height, width = pixels.shape[:2]
    stored = data
    if fixes:
        extension, stored = _encode(pixels, rules.encode)
    digest = xxhash.xxh3_128(struct.pack("<II", width, height))
    digest.update(np.ascontiguousarray(pixels).data)
    return CheckedImage(
        extension=extension,
        width=width,
        height=height,
        content=xxhash.xxh3_128_digest(stored),
        pixels=digest.digest(),
        phash=phash,
        fixes=tuple(fixes),
        data=stored if fixes else None,
    )


def check_signature(data: bytes) -> CheckedImage:
    """Accept `data` by its first bytes, without decoding it.

    Raises:
        BadImage: it does not begin like a file that training reads.
    """
    if data.startswith(PNG_SIGNATURE):
        extension = "png"
    elif data.startswith(b"\xff\xd8\xff"):
        extension = "jpg"
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        extension = "webp"
    else:
        raise BadImage(
            "not PNG, JPEG or WebP" if data else "empty file",
            "--skip-decode does not convert images" if data else "",
        )
    content = xxhash.xxh3_128_digest(data)
    return CheckedImage(extension, 0, 0, content, pixels=content, phash=b"", fixes=(), data=None)


def _decode(data: bytes, rules: Rules) -> _Decoded:
    """By the fast path if the file needs no change, else by Pillow."""
    if data.startswith(PNG_SIGNATURE):
        pixels, extension = _plain_png(data, rules), "png"
    elif data.startswith(JPEG_SIGNATURE):
        pixels, extension = _plain_jpeg(data, rules), "jpg"
    else:
        pixels, extension = None, ""
    if pixels is not None:
        return _Decoded(pixels, extension, [])
    with _no_warnings():
        return _decode_with_pillow(data, rules)


def _check_size(width: int, height: int, rules: Rules) -> None:
    if width * height > rules.max_pixels:
        raise BadImage("too many pixels", f"{width} x {height}; see --max-pixels")
    if min(width, height) < rules.min_side_px:
        raise BadImage("too small", f"{width} x {height}; see --min-side-px")
    if max(width, height) > rules.max_aspect * min(width, height):
        raise BadImage("extreme aspect", f"{width} x {height}; see --max-aspect")


def _plain_png(data: bytes, rules: Rules) -> np.ndarray | None:
    """uint8 [H, W, 3] of a PNG that needs no change, None if it needs one; its checksums are verified in both
    cases.
    """
    chunks = _png_chunks(data)
    if b"IHDR" not in chunks or data[12:16] != b"IHDR" or len(data) < 29:
        raise BadImage("damaged image", "the PNG does not begin with its header")
    if b"IEND" not in chunks:
        raise BadImage("truncated image", "the PNG has no end chunk")
    width, height, depth, color_type = struct.unpack_from(">IIBB", data, 16)
    _check_size(width, height, rules)
    if (depth, color_type) != (8, 2) or chunks & {b"tRNS", b"eXIf", b"acTL"}:
        return None
    try:
        return pyspng.load(data)
    except RuntimeError as error:
        raise BadImage("damaged image", str(error)) from None


def _png_chunks(data: bytes) -> set[bytes]:
    """The chunk types of a PNG, up to IEND; every checksum is verified."""
    types, start = set(), len(PNG_SIGNATURE)
    while start < len(data):
        if start + 12 > len(data):
            raise BadImage("truncated image", "the file ends inside a chunk")
        (length,) = struct.unpack_from(">I", data, start)
        end = start + 8 + length
        if end + 4 > len(data):
            raise BadImage("truncated image", "the file ends inside a chunk")
        chunk_type = data[start + 4 : start + 8]
        if zlib.crc32(memoryview(data)[start + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise BadImage("damaged image", f"checksum of chunk {chunk_type!r} at byte {start}")
        types.add(chunk_type)
        start = end + 4
        if chunk_type == b"IEND":
            break
    return types


def _plain_jpeg(data: bytes, rules: Rules) -> np.ndarray | None:
    """uint8 [H, W, 3] of a JPEG that needs no change, None if it needs one; it is decoded strictly in both
    cases.
    """
    height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height, rules)
    colorspace = {"YCbCr": "RGB", "RGB": "RGB", "Gray": "GRAY"}.get(colors, "CMYK")
    try:
        pixels = simplejpeg.decode_jpeg(data, colorspace=colorspace, strict=True)
    except ValueError as error:
        reason = "truncated image" if "premature end" in str(error).lower() else "damaged image"
        raise BadImage(reason, str(error)) from None
    if colorspace != "RGB":
        return None
    if b"Exif" in data[:65536]:
        with _no_warnings():
            if _open(data, rules).getexif().get(EXIF_ORIENTATION, 1) != 1:
                return None
    return pixels


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silences Pillow: damage becomes a BadImage, and max_pixels decides what a decompression bomb is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(data: bytes, rules: Rules) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImage("empty file" if not data else "not an image") from None
    except Image.DecompressionBombError:
        raise BadImage("too many pixels", "see --max-pixels") from None
    _check_size(*image.size, rules)
    return image


def _decode_with_pillow(data: bytes, rules: Rules) -> _Decoded:
    """Any image of FORMATS as RGB. If a fix is listed, the file has to be encoded again."""
    image = _open(data, rules)
    extension = EXTENSIONS.get(image.format)
    fixes = [] if extension else [f"{image.format} to {rules.encode.upper()}"]
    if getattr(image, "n_frames", 1) > 1:
        fixes.append("animated, first frame")
        image.seek(0)
    try:
        image.load()
    except OSError as error:
        reason = "truncated image" if "truncated" in str(error) else "damaged image"
        raise BadImage(reason, str(error)) from None
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        fixes.append("orientation")
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        upright, fix = _composite(upright, rules.background)
        fixes.append(fix)
    elif upright.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit gray at 255, which turns most images white.
        levels = np.asarray(upright).astype(np.int32).clip(0, 65535)
        upright = Image.fromarray(((levels + 128) // 257).astype(np.uint8))  # rounded: 65535 / 255 is 257
        fixes.append("16 bit")
    elif upright.mode == "F":
        raise BadImage("unsupported pixel type", "floating point")
    elif upright.mode != "RGB":
        fixes.append({"L": "gray", "1": "gray", "P": "palette"}.get(upright.mode, upright.mode) + " to RGB")
    if image.format == "PNG" and data[24] == 16 and "16 bit" not in fixes:
        fixes.append("16 bit")
    return _Decoded(np.asarray(upright.convert("RGB")), extension or rules.encode, fixes)


def _composite(image: Image.Image, background: tuple[int, int, int]) -> tuple[Image.Image, str]:
    """The image on `background`, and the name of the fix."""
    rgba = image.convert("RGBA")
    if image.mode == "P":
        fix = "palette transparency"
    elif rgba.getextrema()[3][0] < 255:
        fix = "transparency"
    else:
        fix = "alpha without transparency"
    if rgba.getextrema()[3][1] == 0:
        raise BadImage(WHOLLY_TRANSPARENT, "nothing is seen on any background")
    canvas = Image.new("RGBA", image.size, (*background, 255))
    canvas.alpha_composite(rgba)
    return canvas, fix


def _encode(pixels: np.ndarray, encode: str) -> tuple[str, bytes]:
    """Extension and bytes of the new file."""
    if encode == "jpeg":
        return "jpg", simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=95, colorsubsampling="444")
    buffer = io.BytesIO()
    # PNG: level 6, the default, takes longer and saves nothing here.
    options = {"lossless": True, "method": 1} if encode == "webp" else {"compress_level": 4}
    Image.fromarray(pixels).save(buffer, encode.upper(), **options)
    return encode, buffer.getvalue()


def _phash(pixels: np.ndarray) -> bytes | None:
    """A perceptual hash (dHash): 256 bits, whether each cell of a thumbnail is brighter than its right
    neighbor; and 3 bytes, the mean color of the top row. None if the image has a single color.

    It only finds candidates for near-identical images and must be fast: it uses the green channel and, in
    large images, not every pixel.
    """
    step = max(1, min(pixels.shape[:2]) // 64)
    sampled = np.ascontiguousarray(pixels[::step, ::step, 1])
    cells = np.asarray(Image.fromarray(sampled).resize((PHASH_PX + 1, PHASH_PX), Image.BOX), dtype=np.int16)
    if cells.min() == cells.max() and (pixels == pixels[0, 0]).all():
        return None
    edge = pixels[0].sum(0) // pixels.shape[1]
    # A difference of two levels is encoder noise.
    return np.packbits(cells[:, :-1] > cells[:, 1:] + 2).tobytes() + bytes(edge.tolist())


def thumbnail(data: bytes) -> np.ndarray:
    """uint8 [32, 32, 3] of a checked image."""
    image = Image.open(io.BytesIO(data), formats=tuple(EXTENSIONS)).convert("RGB")
    return np.asarray(image.resize((32, 32), Image.BOX))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Squared difference of two thumbnails, relative to their variance: 0 is equal, 1 is unrelated."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    variance = sum(float(((image - image.mean((0, 1))) ** 2).sum()) for image in (a, b))
    return float(((a - b) ** 2).sum()) / max(variance, 1e-9)
