"""An SVG becomes a PNG, by resvg, in a separate process.

The renderer alone is not safe for files of strangers: it reads the files that an <image> names, takes any
amount of time and memory, and ends its process when there is no memory. So one child per process renders
(data_prep.child): it removes references to files, computes the size itself, and has limits of time, memory
and open files. Fonts are those of matplotlib, so that text is the same on every machine.
"""

import math
import re
import resource
import struct
import xml.etree.ElementTree as ET
import zlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from data_prep import child
from data_prep.child import limit

MAX_SECONDS = 10  # of a CPU, per image
MAX_MEMORY = 2 << 30
MAX_BYTES = 64 << 20  # of a decompressed .svgz
NAMESPACE = "http://www.w3.org/2000/svg"
# In px, at 96 per inch (https://www.w3.org/TR/css-values-3/#absolute-lengths); em and ex of a 16-px font.
UNITS = {
    "": 1,
    "px": 1,
    "pt": 4 / 3,
    "pc": 16,
    "in": 96,
    "cm": 96 / 2.54,
    "mm": 96 / 25.4,
    "em": 16,
    "rem": 16,
    "ex": 8,
}
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf")
LENGTH = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([a-zA-Z]*)\s*")
_REQUEST = struct.Struct(">IQ")
_PNG, _PNG_WITHOUT_REFERENCES, _TOO_LARGE, _BAD = range(4)


class SvgError(Exception):
    """An SVG that cannot be rendered, and why."""


class TooLarge(SvgError):
    """More than max_pixels; args are width and height."""


class Rendered(NamedTuple):
    """
    Attributes:
        png: with transparency.
        left_out: the SVG names other files, which were not read.
    """

    png: bytes
    left_out: bool


def render(data: bytes, side_px: int, max_pixels: int) -> Rendered:
    """The PNG of an SVG or .svgz.

    Args:
        side_px: of the shorter side; the other one follows from the SVG's width and height, or viewBox.

    Raises:
        TooLarge: the PNG would have more than `max_pixels`.
        SvgError: it cannot be rendered.
    """
    renderer = child.own(f"{__name__}:_answer", MAX_SECONDS, MAX_MEMORY)
    try:
        reply = renderer.ask(_REQUEST.pack(side_px, max_pixels), data)
    except child.Died as died:
        raise SvgError("the renderer crashed on it" if died.reason == "crash" else str(died)) from None
    status, payload = reply[0], reply[1:]
    if status == _TOO_LARGE:
        raise TooLarge(*struct.unpack(">QQ", payload))
    if status == _BAD:
        raise SvgError(payload.decode())
    return Rendered(payload, status == _PNG_WITHOUT_REFERENCES)


def _answer(request: bytes) -> tuple[bytes, bytes]:
    """The reply of the child: a status, and a PNG, a size or the text of a problem."""
    import resvg_py  # noqa: F401 while files can be opened

    (side_px, max_pixels), fonts = _REQUEST.unpack_from(request), _fonts()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        drawing = _prepare(request[_REQUEST.size :], side_px, max_pixels)
        # Of all files only the fonts can be opened, one after another: 0, 1 and 2 are open.
        limit(resource.RLIMIT_NOFILE, 4 if drawing.has_text else 3)
        status, payload = drawing.status, _png(drawing, fonts)
    except TooLarge as error:
        status, payload = _TOO_LARGE, struct.pack(">QQ", *error.args)
    except (ET.ParseError, SvgError, ValueError, LookupError, OSError, MemoryError) as error:
        status, payload = _BAD, (str(error) or type(error).__name__).encode("utf-8", "replace")
    except RecursionError:
        status, payload = _BAD, b"its elements are nested too deeply"
    limit(resource.RLIMIT_NOFILE, files)
    return bytes([status]), payload


class _Drawing(NamedTuple):
    """An SVG that names no file and has the size of its image."""

    text: str
    width: int
    height: int
    status: int
    has_text: bool


def _prepare(data: bytes, side_px: int, max_pixels: int) -> _Drawing:
    """Set the size of an SVG, and remove its references to files."""
    root = ET.fromstring(_decompressed(data))  # expat bounds the expansion of entities and opens no file
    width, height = _size(root)
    scale = side_px / min(width, height)
    pixels = [min(max(side_px, round(side * scale)), 1 << 62) for side in (width, height)]
    if math.prod(pixels) > max_pixels:
        raise TooLarge(*pixels)
    if not _view_box(root):
        root.set("viewBox", f"0 0 {width} {height}")
    root.set("width", str(pixels[0]))
    root.set("height", str(pixels[1]))
    left_out = has_text = False
    for element in root.iter():
        tag = _local(element.tag)
        has_text |= tag == "text"
        for name, value in list(element.attrib.items()):
            if _local(name) == "href" and not value.strip().startswith(("#", "data:")):
                del element.attrib[name]
                left_out |= tag in ("image", "feImage", "use")
    ET.register_namespace("", NAMESPACE)
    text = ET.tostring(root, encoding="unicode")
    return _Drawing(text, *pixels, _PNG_WITHOUT_REFERENCES if left_out else _PNG, has_text)


def _decompressed(data: bytes) -> bytes:
    if not data.startswith(b"\x1f\x8b"):
        return data
    stream = zlib.decompressobj(wbits=31)
    try:
        data = stream.decompress(data, MAX_BYTES)
    except zlib.error as error:
        raise SvgError(str(error)) from None
    if not stream.eof:
        raise SvgError("it is truncated, or has more than 64 MiB")
    return data


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _size(root: ET.Element) -> tuple[float, float]:
    """Width and height in px, as browsers take them from the root element."""
    if _local(root.tag) != "svg":
        raise SvgError(f"its root element is {_local(root.tag)}")
    width, height = (_length(root.get(name, "")) for name in ("width", "height"))
    if box := _view_box(root):
        if width is None and height is None:
            width, height = box
        width = height * box[0] / box[1] if width is None else width
        height = width * box[1] / box[0] if height is None else height
    if width is None or height is None:
        raise SvgError("it has neither width and height nor a viewBox")
    if not (width > 0 and height > 0 and math.isfinite(max(width, height) / min(width, height))):
        raise SvgError(f"its size is {width:g} x {height:g}")
    return width, height


def _length(text: str) -> float | None:
    """Px of a length with a unit; None for one that depends on where the SVG is shown."""
    match = LENGTH.fullmatch(text)
    unit = match and UNITS.get(match[2].lower())
    return float(match[1]) * unit if unit else None


def _view_box(root: ET.Element) -> tuple[float, float] | None:
    """Width and height of the viewBox, if it is valid."""
    try:
        _, _, width, height = map(float, re.split(r"[\s,]+", root.get("viewBox", "").strip()))
    except ValueError:
        return None
    return (width, height) if width > 0 and height > 0 else None


def _png(drawing: _Drawing, fonts: list[str]) -> bytes:
    import resvg_py

    return resvg_py.svg_to_bytes(
        svg_string=drawing.text,
        width=drawing.width,
        height=drawing.height,
        skip_system_fonts=True,
        font_files=fonts if drawing.has_text else None,
        **dict.fromkeys(
            ("font_family", "serif_family", "sans_serif_family", "cursive_family", "fantasy_family"),
            "DejaVu Sans",
        ),
        monospace_family="DejaVu Sans Mono",
    )


@cache
def _fonts() -> list[str]:
    """Files of the fonts that matplotlib has in its package; none without it."""
    package = find_spec("matplotlib")
    folder = Path(package.origin).parent / "mpl-data/fonts/ttf" if package else Path()
    return [str(folder / name) for name in FONTS if (folder / name).is_file()]
