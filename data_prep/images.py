"""One image file becomes verified, upright, opaque RGB; what cannot be is refused with a named reason."""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyspng
import simplejpeg
import xxhash
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from data_prep.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # nothing that starts another program, as EPS does
EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}  # formats that training reads as they are
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
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
LOOK_PX = 16


class BadImage(Exception):
    """An image that training must not see: `reason` is a fixed phrase to count by, `detail` is about this
    one.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


@dataclass(frozen=True)
class Rules:
    """What is let in, and what becomes of an image that has to change."""

    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: int = 50_000_000
    min_side_px: int = 8
    max_aspect: float = 20.0
    resize_px: int = 0
    encode: str = "png"


@dataclass(frozen=True)
class CheckedImage:
    extension: str  # "png", "jpg" or "webp"
    width: int  # pixels, after EXIF orientation and resizing; 0 where nothing was decoded
    height: int
    content: bytes  # xxh3 of the bytes that go into the shard
    pixels: bytes  # equal for equal pixels, however they were stored
    # 256 bits and a color, that differ little between near-identical images; empty where nothing was decoded
    look: bytes
    fixes: tuple[str, ...]  # what had to be put right, for the report
    data: bytes | None  # the new file where something had to change, else None


def parse_color(color: str) -> tuple[int, int, int]:
    """The RGB of a CSS color name or `#rrggbb`."""
    try:
        return ImageColor.getrgb(color)[:3]
    except ValueError:
        raise UserError(
            f"--background {color!r} is not a color; a name like white or a code like #ffffff is wanted"
        ) from None


def check(data: bytes, rules: Rules = Rules()) -> CheckedImage:
    """Decode `data` in full and put it right: EXIF orientation applied, transparency composited, 8-bit RGB.

    Plain RGB files, nearly all of most data sets, take a short way: a PNG's checksums are walked (a decoder
    alone misses damage), a JPEG is decoded strictly. The rest goes through Pillow.

    Raises:
        BadImage: not an image, too many pixels (judged by the header, before decoding), damaged, or of no
            use.
    """
    try:
        if data.startswith(PNG_SIGNATURE):
            plain = _plain_png(data, rules)
        elif data.startswith(b"\xff\xd8"):
            plain = _plain_jpeg(data, rules)
        else:
            plain = None
        if plain is not None:
            pixels, extension, fixes, changed = (
                plain,
                "png" if data.startswith(PNG_SIGNATURE) else "jpg",
                [],
                False,
            )
        else:
            with _quiet():
                pixels, extension, fixes, changed = _any(data, rules)
    except DAMAGE as error:
        raise BadImage("damaged image", str(error)) from None
    if rules.resize_px and min(pixels.shape[:2]) > rules.resize_px:
        image = Image.fromarray(pixels)
        scale = rules.resize_px / min(image.size)
        size = tuple(max(rules.resize_px, round(side * scale)) for side in image.size)
        pixels, changed = np.asarray(image.resize(size, Image.BICUBIC)), True
        fixes.append("resized")
    look = _look(pixels)
    if look is None:
        raise BadImage("blank image", "one color, {}".format("#{:02x}{:02x}{:02x}".format(*pixels[0, 0])))
    height, width = pixels.shape[:2]
    if changed:
        extension, stored = _encode(pixels, rules.encode)
    else:
        stored = data
    digest = xxhash.xxh3_128(struct.pack("<II", width, height))
    digest.update(np.ascontiguousarray(pixels).data)
    content = xxhash.xxh3_128_digest(stored)
    return CheckedImage(
        extension, width, height, content, digest.digest(), look, tuple(fixes), stored if changed else None
    )


def trust(data: bytes) -> CheckedImage:
    """`data` as it is: only its first bytes are looked at.

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
            "not PNG, JPEG or WebP" if data else "empty file", "and --trust converts nothing" if data else ""
        )
    content = xxhash.xxh3_128_digest(data)
    return CheckedImage(extension, 0, 0, content, content, b"", (), None)


def _check_size(width: int, height: int, rules: Rules) -> None:
    if width * height > rules.max_pixels:
        raise BadImage("too many pixels", f"{width} x {height}; see --max-pixels")
    if min(width, height) < rules.min_side_px:
        raise BadImage("too small", f"{width} x {height}; see --min-side-px")
    if max(width, height) > rules.max_aspect * min(width, height):
        raise BadImage("extreme aspect", f"{width} x {height}; see --max-aspect")


def _plain_png(data: bytes, rules: Rules) -> np.ndarray | None:
    """uint8 [H, W, 3] of a PNG that needs no change; None where it needs one. Its checksums are right either
    way.
    """
    kinds, at = set(), len(PNG_SIGNATURE)
    while at < len(data):
        if at + 12 > len(data):
            raise BadImage("truncated image", "ends inside a chunk")
        (size,) = struct.unpack_from(">I", data, at)
        end = at + 8 + size
        if end + 4 > len(data):
            raise BadImage("truncated image", "ends inside a chunk")
        kind = data[at + 4 : at + 8]
        if zlib.crc32(memoryview(data)[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise BadImage("damaged image", f"checksum of chunk {kind!r} at byte {at}")
        kinds.add(kind)
        at = end + 4
        if kind == b"IEND":
            break
    if b"IHDR" not in kinds or data[12:16] != b"IHDR" or len(data) < 29:
        raise BadImage("damaged image", "a PNG that does not begin with its header")
    if b"IEND" not in kinds:
        raise BadImage("truncated image", "a PNG without its end")
    width, height, depth, color_type = struct.unpack_from(">IIBB", data, 16)
    _check_size(width, height, rules)
    if (depth, color_type) != (8, 2) or kinds & {b"tRNS", b"eXIf", b"acTL"}:
        return None
    try:
        return pyspng.load(data)
    except RuntimeError as error:
        raise BadImage("damaged image", str(error)) from None


def _plain_jpeg(data: bytes, rules: Rules) -> np.ndarray | None:
    """uint8 [H, W, 3] of a JPEG that needs no change; None where it needs one. It was decoded strictly either
    way.
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
        with _quiet():
            if _open(data, rules).getexif().get(0x0112, 1) != 1:
                return None
    return pixels


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings: damage is ours to name, and max_pixels decides what a bomb is."""
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


def _any(data: bytes, rules: Rules) -> tuple[np.ndarray, str, list[str], bool]:
    """Pixels uint8 [H, W, 3], extension, what had to be put right, and whether the file has to change for it."""
    image = _open(data, rules)
    extension = EXTENSIONS.get(image.format)
    fixes = [] if extension else [f"{image.format} to {rules.encode.upper()}"]
    if getattr(image, "n_frames", 1) > 1:
        fixes.append("animated, first frame")
        image.seek(0)
    try:
        image.load()
    except OSError as error:
        raise BadImage(
            "truncated image" if "truncated" in str(error) else "damaged image", str(error)
        ) from None
    turned = image.getexif().get(0x0112, 1) != 1
    upright = ImageOps.exif_transpose(image)
    if turned:
        fixes.append("orientation")
    if upright.has_transparency_data:
        seen_through = upright.convert("RGBA")
        if upright.mode == "P":
            fixes.append("palette transparency")
        elif seen_through.getextrema()[3][0] < 255:
            fixes.append("transparency")
        else:
            fixes.append("alpha without transparency")
        canvas = Image.new("RGBA", upright.size, (*rules.background, 255))
        canvas.alpha_composite(seen_through)
        upright = canvas
    elif upright.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit gray at 255, which turns a picture white.
        upright = Image.fromarray((np.asarray(upright).clip(0, 65535) // 257).astype(np.uint8))
        fixes.append("16 bit")
    elif upright.mode == "F":
        raise BadImage("unsupported pixel type", "floating point")
    elif upright.mode != "RGB":
        fixes.append({"L": "gray", "1": "gray", "P": "palette"}.get(upright.mode, upright.mode) + " to RGB")
    if image.format == "PNG" and data[24] == 16 and "16 bit" not in fixes:
        fixes.append("16 bit")
    return np.asarray(upright.convert("RGB")), extension or rules.encode, fixes, bool(fixes)


def _encode(pixels: np.ndarray, encode: str) -> tuple[str, bytes]:
    if encode == "jpeg":
        return "jpg", simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=95, colorsubsampling="444")
    buffer = io.BytesIO()
    options = (
        {"lossless": True, "method": 1} if encode == "webp" else {"compress_level": 4}
    )  # 6 takes longer and saves nothing here
    Image.fromarray(pixels).save(buffer, encode.upper(), **options)
    return encode, buffer.getvalue()


def _look(pixels: np.ndarray) -> bytes | None:
    """256 bits: in a thumbnail, whether each cell is brighter than its right neighbor (dHash); and the upper
    edge's mean color.

    It finds candidates for near-identical images, and has to be quick: green alone, and of large images not
    every pixel. None if the image is of one color."""
    step = max(1, min(pixels.shape[:2]) // 64)
    sampled = np.ascontiguousarray(pixels[::step, ::step, 1])
    cells = np.asarray(Image.fromarray(sampled).resize((LOOK_PX + 1, LOOK_PX), Image.BOX), dtype=np.int16)
    if cells.min() == cells.max() and (pixels == pixels[0, 0]).all():
        return None
    edge = pixels[0].sum(0) // pixels.shape[1]
    # A difference of two levels is noise of the encoder.
    return np.packbits(cells[:, :-1] > cells[:, 1:] + 2).tobytes() + bytes(edge.tolist())


def small(data: bytes) -> np.ndarray:
    """uint8 [32, 32, 3]: a checked image, shrunk."""
    image = Image.open(io.BytesIO(data), formats=tuple(EXTENSIONS)).convert("RGB")
    return np.asarray(image.resize((32, 32), Image.BOX))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """How much two `small` images differ, as a share of what there is to see in them: 0 is equal, 1
    unrelated.
    """
    a, b = a.astype(np.float32), b.astype(np.float32)
    seen = sum(float(((each - each.mean((0, 1))) ** 2).sum()) for each in (a, b))
    return float(((a - b) ** 2).sum()) / max(seen, 1e-9)
