"""One image file becomes verified, upright, opaque RGB; what cannot is rejected with a named reason.

PNG, JPEG, WebP    decoded here: what their headers and parts say bounds the time and the memory
SVG                rendered by data_prep.svg
other formats      decoded in a child process with limits of time and memory (data_prep.child)
"""

import io
import json
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import pyspng
import simplejpeg
import xxhash
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError, features

from data_prep import child, parts, svg
from data_prep.child import Child
from data_prep.errors import UserError
from data_prep.signatures import Kind, kind_of

EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}  # formats that training reads unchanged
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
EXIF_ORIENTATION = 0x0112
# What Pillow and its plugins raise on damaged files, of which two million were tried.
DAMAGE = (
    OSError,
    RuntimeError,
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
OPAQUE_ALPHA = "alpha without transparency"
MAX_PNG_TEXT = 1 << 20  # characters; Pillow refuses a PNG with more of them in a chunk
NEARLY_BLACK = 4095  # the largest value of 12 bits; of 16 bits it is 6 % gray
LARGE_TEXT = "large text left out"
SLOW = "slow to decode"
DECODER_DIED = {"slow": SLOW, "memory": "too much memory to decode", "crash": "the decoder crashed on it"}
MAX_SECONDS = 60  # of CPU time for an image of a format that is decoded in a child
MEMORY, MEMORY_PER_PIXEL = 2 << 30, 64  # bytes of address space of a child; 16-bit gray takes the most
TIFF_BITS, TIFF_MAX_VALUE = 258, (281, 341)  # BitsPerSample; MaxSampleValue, SMaxSampleValue
WHITE = "#ffffff"


class BadImage(Exception):
    """An image that cannot be used: `reason` is a fixed phrase to count by, `detail` is about this image."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


TOO_MANY_PIXELS = BadImage("too many pixels", "see --max-pixels")


@dataclass(frozen=True)
class Rules:
    """Which images are accepted, and how an image that has to change is stored."""

    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: int = 50_000_000
    min_side_px: int = 8
    max_aspect: float = 20.0
    resize_px: int = 0
    encode: str = "png"
    svg_px: int = 256


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


@cache
def installed_version(package: str) -> str:
    """The version of an optional package; "" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def parse_color(color: str) -> tuple[int, int, int]:
    """The RGB of a CSS color name or `#rrggbb`."""
    try:
        return ImageColor.getrgb(color)[:3]
    except ValueError:
        raise UserError(
            f"--background {color!r} is not a color; pass a CSS name like white or a code like #ffffff"
        ) from None


def hex_color(color: str) -> str:
    """`#rrggbb` of a CSS color name or code, as models name their background."""
    return "#{:02x}{:02x}{:02x}".format(*parse_color(color))


def check(data: bytes, rules: Rules = Rules()) -> CheckedImage:
    """Decode `data` completely; apply EXIF orientation, composite transparency, convert to 8-bit RGB.

    Plain RGB files, nearly all of most data sets, take a fast path: a PNG's checksums are verified (a decoder
    alone misses damage), a JPEG is decoded strictly. All other files go through Pillow.

    Raises:
        BadImage: not an image, too many pixels (by its header, before decoding), damaged, or blank.
    """
    pixels, extension, fixes = _decode(data, rules)
    if rules.resize_px and min(pixels.shape[:2]) > rules.resize_px:
        image = Image.fromarray(pixels)
        scale = rules.resize_px / min(image.size)
        size = tuple(max(rules.resize_px, round(side * scale)) for side in image.size)
        pixels = np.asarray(image.resize(size, Image.BICUBIC))
        fixes.append("resized")
    phash = _phash_of_seen(pixels, fixes)
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


def rgb(data: bytes, rules: Rules = Rules(), decoder: Child | None = None) -> np.ndarray:
    """uint8 [H, W, 3] of an image; the pixels of the file that `check` would store, if it were stored as PNG.

    Args:
        decoder: the child that decodes it, see child_decoder; by default, only unusual formats are decoded in
            a child.

    Raises:
        BadImage: as check().
    """
    decoded = _decode_in(decoder, data, rules) if decoder else _decode(data, rules)
    _phash_of_seen(decoded.pixels, decoded.fixes)
    return decoded.pixels


def child_decoder(seconds: int, rules: Rules = Rules()) -> Child:
    """A child process that decodes images, for `rgb`: it takes at most `seconds` of CPU time for each."""
    return Child(f"{__name__}:_answer", seconds, MEMORY + MEMORY_PER_PIXEL * rules.max_pixels)


def signature_of(data: bytes, why: str) -> str:
    """The extension of an image, by its first bytes.

    Args:
        why: no other format is accepted.

    Raises:
        BadImage: it does not begin like a file that training reads.
    """
    if data.startswith(PNG_SIGNATURE):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    raise BadImage("not PNG, JPEG or WebP" if data else "empty file", why if data else "")


def check_signature(data: bytes) -> CheckedImage:
    """Accept `data` by its first bytes, without decoding it.

    Raises:
        BadImage: it does not begin like a file that training reads.
    """
    extension = signature_of(data, "--skip-decode does not convert images")
    content = xxhash.xxh3_128_digest(data)
    return CheckedImage(extension, 0, 0, content, pixels=content, phash=b"", fixes=(), data=None)


def _decode(data: bytes, rules: Rules) -> _Decoded:
    """Decode an image here, or in the child of this process if its format is an unusual one."""
    kind = _image_kind(data).name
    if kind in (*EXTENSIONS, "SVG"):
        return _decode_here(data, kind, rules)
    memory = MEMORY + MEMORY_PER_PIXEL * rules.max_pixels
    return _decode_in(child.own(f"{__name__}:_answer", MAX_SECONDS, memory), data, rules)


def _decode_in(decoder: Child, data: bytes, rules: Rules) -> _Decoded:
    """Decode an image in a child, see _answer."""
    request = json.dumps(asdict(rules)).encode()
    try:
        reply = decoder.ask(struct.pack(">I", len(request)), request, data)
    except child.Died as died:
        raise BadImage(DECODER_DIED[died.reason], "" if died.reason == "crash" else str(died)) from None
    start = 4 + struct.unpack_from(">I", reply)[0]
    about = json.loads(reply[4:start])
    if "reason" in about:
        raise BadImage(about["reason"], about["detail"])
    pixels = np.frombuffer(reply, np.uint8, offset=start).reshape(about["shape"])
    return _Decoded(pixels, about["extension"], about["fixes"])


def _answer(request: bytes) -> tuple[bytes | memoryview, ...]:
    """What the child does: JSON rules and a file become JSON and pixels, each JSON after its length."""
    start, pixels = 4 + struct.unpack_from(">I", request)[0], b""
    rules, data = Rules(**json.loads(request[4:start])), request[start:]
    try:
        kind = _image_kind(data).name
        decoded = _decode_here(data, kind, replace(rules, background=tuple(rules.background)))
        about = {"shape": decoded.pixels.shape, "extension": decoded.extension, "fixes": decoded.fixes}
        pixels = np.ascontiguousarray(decoded.pixels).data.cast("B")
    except BadImage as bad:
        about = {"reason": bad.reason, "detail": bad.detail}
    except MemoryError:
        limit = MEMORY + MEMORY_PER_PIXEL * rules.max_pixels
        detail = f"it needs more than {limit / (1 << 30):.3g} GiB of memory"
        about = {"reason": DECODER_DIED["memory"], "detail": detail}
    text = json.dumps(about).encode()
    return struct.pack(">I", len(text)), text, pixels


def _decode_here(data: bytes, kind: str, rules: Rules) -> _Decoded:
    try:
        return _decode_kind(data, kind, rules)
    except DAMAGE as error:
        raise BadImage("damaged image", str(error)) from None


def _decode_kind(data: bytes, kind: str, rules: Rules) -> _Decoded:
    """By the fast path if the file needs no change, else by resvg (SVG) or Pillow."""
    fixes = []
    if kind == "SVG":
        data, fixes = _png_of_svg(data, rules)
        decoded = _decode_with_pillow(data, "PNG", rules, fixes)
        return decoded._replace(fixes=[fix for fix in decoded.fixes if fix != OPAQUE_ALPHA])
    if kind == "PNG" and (shorter := _without_large_text(data)):
        data, fixes = shorter, [LARGE_TEXT]
    plain = {"PNG": _plain_png, "JPEG": _plain_jpeg}.get(kind)
    pixels = plain(data, rules) if plain else None
    if pixels is not None:
        return _Decoded(pixels, EXTENSIONS[kind], fixes)
    return _decode_with_pillow(data, kind, rules, fixes)


def _image_kind(data: bytes) -> Kind:
    """The format of an image.

    Raises:
        BadImage: it is none, or one that cannot be decoded here, whose format is named; or see parts.excess.
    """
    kind = kind_of(data)
    if kind is None:
        if not data:
            raise BadImage("empty file")
        raise BadImage("not an image", f"it begins with {data[:16]!r}")
    if kind.fix:
        raise BadImage(f"{kind.name}, not an image", kind.fix)
    if not kind.is_image:
        raise BadImage(f"{kind.name} is not supported")
    if kind.name == "SVG" and not installed_version("resvg_py"):
        raise BadImage("SVG: install resvg-py", "pip install resvg-py")
    if kind.name == "HEIF":
        if not installed_version("pillow_heif"):
            raise BadImage("HEIC: install pillow-heif", "pip install pillow-heif")
        import pillow_heif

        pillow_heif.register_heif_opener()
    if kind.name == "AVIF" and not features.check("avif"):
        raise BadImage("AVIF: install Pillow 11.3 or newer", "pip install -U pillow")
    check_parts(data, kind.name)
    return kind


def check_parts(data: bytes, format: str) -> None:
    """Refuse an image that is slow to open, though small in bytes and pixels; see parts.excess.

    Raises:
        BadImage: it has too many scans, chunks, comments or tags.
    """
    if problem := parts.excess(data, format):
        raise BadImage(SLOW, problem)


def _png_of_svg(data: bytes, rules: Rules) -> tuple[bytes, list[str]]:
    """The PNG of an SVG, and the names of the fixes."""
    try:
        rendered = svg.render(data, rules.svg_px, rules.max_pixels)
    except svg.TooLarge as error:
        _check_size(*error.args, rules)
    except svg.SvgError as error:
        raise BadImage("SVG cannot be rendered", str(error)) from None
    fixes = [f"SVG to {rules.encode.upper()}"]
    return rendered.png, fixes + ["SVG without the files that it names"] * rendered.left_out


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
    types = set()
    for chunk_type, start, end in _chunks(data):
        if end > len(data) or start + 12 > len(data):
            raise BadImage("truncated image", "the file ends inside a chunk")
        if zlib.crc32(memoryview(data)[start + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise BadImage("damaged image", f"checksum of chunk {chunk_type!r} at byte {start}")
        types.add(chunk_type)
    return types


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and end of each chunk of a PNG, up to IEND; a truncated file ends before the last end."""
    start, chunk_type = len(PNG_SIGNATURE), b""
    while start < len(data) and chunk_type != b"IEND":
        chunk_type = data[start + 4 : start + 8]
        length = int.from_bytes(data[start : start + 4], "big")
        yield chunk_type, start, start + 12 + length
        start += 12 + length


def _without_large_text(data: bytes) -> bytes | None:
    """A PNG without its text chunks, if they are longer than Pillow accepts, else None."""
    texts = [chunk for chunk in _chunks(data) if chunk[0] in (b"tEXt", b"zTXt", b"iTXt")]
    lengths = accumulate(_text_length(kind, data[start + 8 : end - 4]) for kind, start, end in texts)
    if not any(length > MAX_PNG_TEXT for length in lengths):  # the first that is too long ends it
        return None
    pieces, kept = [], 0
    for _, start, end in texts:
        pieces.append(data[kept:start])
        kept = end
    return b"".join([*pieces, data[kept:]])


def _text_length(chunk_type: bytes, content: bytes) -> int:
    """Bytes of the text in a chunk (https://www.w3.org/TR/png-3/#11textinfo), at most MAX_PNG_TEXT + 1."""
    text = content.partition(b"\0")[2]  # after the keyword
    is_compressed = chunk_type == b"zTXt"
    if chunk_type == b"iTXt":
        is_compressed, text = text[:1] == b"\1", text[2:].split(b"\0", 2)[-1]
    elif is_compressed:
        text = text[1:]  # after the method
    if not is_compressed:
        return len(text)
    try:
        return len(zlib.decompressobj().decompress(text, MAX_PNG_TEXT + 1))
    except zlib.error:
        return 0


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
            if _orientation(_open(data, "JPEG", rules)) != 1:
                return None
    return pixels


def _orientation(image: Image.Image) -> int:
    """The orientation by EXIF, 1 for upright; its other tags are read too, so they are counted first."""
    exif = image.info.get("exif") or b""
    if raw := "" if exif else image.info.get("Raw profile type exif", ""):  # of PNGs by ImageMagick
        exif = bytes.fromhex("".join(raw.split("\n")[3:]))
    check_parts(exif.removeprefix(b"Exif\0\0"), "EXIF")
    return image.getexif().get(EXIF_ORIENTATION, 1)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silences Pillow: damage becomes a BadImage, and max_pixels decides what a decompression bomb is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_image(data: bytes, format: str = "") -> Image.Image:
    """An image as Pillow has it, lazily: nothing but its header is decoded. For SVG see check().

    Args:
        format: as kind_of names it, if that is known; no other format is tried.

    Raises:
        BadImage: not an image.
    """
    format = format or _image_kind(data).name
    try:
        return Image.open(io.BytesIO(data), formats=[format])
    except UnidentifiedImageError:
        raise BadImage("damaged image", f"its {format} header cannot be read") from None
    except Image.DecompressionBombError:
        raise TOO_MANY_PIXELS from None


def _open(data: bytes, format: str, rules: Rules) -> Image.Image:
    if format == "ICO":
        _check_icon(data, rules)
    image = open_image(data, format)
    _check_size(*image.size, rules)
    return image


def _check_icon(data: bytes, rules: Rules) -> None:
    """Check the sizes of the PNGs in an icon, which Pillow decodes when it opens the file."""
    for match in re.finditer(re.escape(PNG_SIGNATURE), data):
        if match.end() + 16 <= len(data):
            width, height = struct.unpack_from(">II", data, match.end() + 8)
            if width * height > rules.max_pixels:
                raise BadImage("too many pixels", f"{width} x {height}; see --max-pixels")
            check_parts(data[match.start() :], "PNG")


def _decode_with_pillow(data: bytes, format: str, rules: Rules, fixes: list[str]) -> _Decoded:
    """Any image as RGB. If a fix is listed, the file has to be encoded again."""
    with _no_warnings():
        image = _open(data, format, rules)
        extension = EXTENSIONS.get(format)
        fixes = fixes if extension else [*fixes, f"{format} to {rules.encode.upper()}"]
        # Further images of a HEIC, and of a JPEG of a phone (MPO), are views and maps of the first.
        # Not n_frames, for which Pillow reads all frames of a GIF and all pages of a TIFF.
        if format not in ("HEIF", "JPEG") and getattr(image, "is_animated", False):
            fixes.append("animated, first frame")
            image.seek(0)
        try:
            image.load()
        except OSError as error:
            reason = "truncated image" if "truncated" in str(error) else "damaged image"
            raise BadImage(reason, str(error)) from None
        except Image.DecompressionBombError:
            raise TOO_MANY_PIXELS from None
        if _orientation(image) != 1:
            fixes.append("orientation")
        bits, white = _bits(image, data), _white_level(image, data)
        pixels, fix = _rgb(ImageOps.exif_transpose(image), bits, white, rules.background)
    return _Decoded(np.asarray(pixels), extension or rules.encode, fixes + [fix] * bool(fix))


def _rgb(
    image: Image.Image, bits: int, white: int, background: tuple[int, int, int]
) -> tuple[Image.Image, str]:
    """A loaded image in 8-bit RGB, and the name of the fix, "" if none was needed.

    Args:
        bits: of each channel in the file.
        white: see _white_level.
    """
    if image.has_transparency_data:
        composited, fix = _composite(image, background)
        return composited.convert("RGB"), fix
    if image.mode == "F":
        raise BadImage("unsupported pixel type", "floating point")
    if image.mode.startswith("I"):
        return _eight_bit_gray(image, bits, white).convert("RGB"), "16 bit"
    rgb = image.convert("RGB")  # Pillow has kept the upper 8 of 16 bits
    if bits == 16:
        _check_not_nearly_black(max(high for _, high in rgb.getextrema()) << 8 | 255)
        return rgb, "16 bit"
    gray = {"L": "gray", "1": "gray", "P": "palette"}.get(image.mode, image.mode)
    return rgb, "" if image.mode == "RGB" else f"{gray} to RGB"


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits of each channel in the file, where they can be more than 8."""
    if image.format == "PNG":
        return data[24]
    if image.format == "TIFF":
        return image.tag_v2.get(TIFF_BITS, (8,))[0]
    return 16 if image.mode.startswith("I;16") else 8


def _white_level(image: Image.Image, data: bytes) -> int:
    """The value of white by the file: significant bits (sBIT) of a PNG, MaxSampleValue of a TIFF; else 0."""
    if image.format == "PNG":
        significant = (
            data[start + 8] for kind, start, end in _chunks(data) if kind == b"sBIT" and end > start + 12
        )
        return (1 << next(significant, 0)) - 1
    if image.format != "TIFF":
        return 0
    value = next((image.tag_v2[tag] for tag in TIFF_MAX_VALUE if tag in image.tag_v2), 0)
    return int(value[0] if isinstance(value, tuple) else value)


def _eight_bit_gray(image: Image.Image, bits: int, white: int) -> Image.Image:
    """Gray of more than 8 bits in 8. Pillow's own conversion clips at 255, which turns most images white.

    Args:
        white: what the file says; it does not count if the image has larger values.
    """
    levels = np.asarray(image).astype(np.int64)
    low, high = int(levels.min()), int(levels.max())
    if not 0 < high <= white:
        if bits > 16:
            detail = f"{bits}-bit gray with values from {low} to {high}; convert it to 8 or 16 bits"
            raise BadImage("range of gray unknown", detail)
        if low < high:  # else it is blank
            _check_not_nearly_black(high)
        white = 65535
    levels = (levels.clip(0, white) * 255 + white // 2) // white
    return Image.fromarray(levels.astype(np.uint8))


def _check_not_nearly_black(high: int) -> None:
    """Refuse images of scanners and cameras with 10 or 12 bits that were stored in 16 without scaling."""
    if high <= NEARLY_BLACK:
        raise BadImage(
            "nearly black in 16 bit",
            f"no value is above {high} of 65535; scale it to 16 bits, or convert it to 8",
        )


def _composite(image: Image.Image, background: tuple[int, int, int]) -> tuple[Image.Image, str]:
    """The image on `background`, and the name of the fix."""
    rgba = image.convert("RGBA")
    if image.mode == "P":
        fix = "palette transparency"
    elif rgba.getextrema()[3][0] < 255:
        fix = "transparency"
    else:
        fix = OPAQUE_ALPHA
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


def _phash_of_seen(pixels: np.ndarray, fixes: list[str]) -> bytes:
    """See _phash.

    Raises:
        BadImage: nothing is seen on the image, it has a single color.
    """
    phash = _phash(pixels)
    if phash is None:
        color = "one color, #{:02x}{:02x}{:02x}".format(*pixels[0, 0])
        if any("transparency" in fix and fix != OPAQUE_ALPHA for fix in fixes):
            raise BadImage(UNSEEN, f"{color}; see --background")
        raise BadImage("blank image", color)
    return phash


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
    image = open_image(data).convert("RGB")
    return np.asarray(image.resize((32, 32), Image.BOX))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Squared difference of two thumbnails, relative to their variance: 0 is equal, 1 is unrelated."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    variance = sum(float(((image - image.mean((0, 1))) ** 2).sum()) for image in (a, b))
    return float(((a - b) ** 2).sum()) / max(variance, 1e-9)
