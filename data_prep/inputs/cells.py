"""The cells of a table: text, an image as a path or as bytes, a field of a struct."""

import base64
import json
import math
import re
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from data_prep.inputs.names import Problem
from data_prep.inputs.storage import is_url

MAX_PATH_CHARACTERS = 4096  # PATH_MAX of Linux
# How the base64 of PNG, JPEG, GIF, WebP, BMP, TIFF, HEIC, AVIF and SVG files begins. Text of this length
# without a dot is hardly a path.
BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A", "AAAA", "PHN2Zy", "PD94bWw")
MIN_BASE64_CHARACTERS = 64
INVALID_WEIGHT, DECIMAL_COMMA = "invalid weight", re.compile("[0-9]+,[0-9]+")
URL_SAFE = str.maketrans("-_", "+/")


def field_of(cells: dict | list | None, column: str):
    """The cell of a column; `text.en` is the field `en` of the struct `text`, or of each struct of a list."""
    if isinstance(cells, dict) and column in cells:
        return cells[column]
    if isinstance(cells, list):
        return [field_of(item, column) for item in cells]
    if not isinstance(cells, dict):
        return None
    name, dot, rest = column.partition(".")
    return field_of(cells.get(name), rest) if dot else None


def kind_of(value, use: str, column: str) -> str:
    """What a cell is instead of text."""
    if isinstance(value, dict):
        field = next((name for name, inner in value.items() if isinstance(inner, str)), "FIELD")
        fields = ", ".join(map(repr, value)) or "none"
        return f"a struct with the fields {fields}; choose one, for example --{use}-column {column}.{field}"
    if isinstance(value, list):
        return "a list in a list" if use == "caption" else "a list"
    if isinstance(value, (bool, int, float)):
        return f"{json.dumps(value)}; text must be a string"
    return type(value).__name__


class ImageCell(NamedTuple):
    """A cell of an image column: a path or URL; or the bytes of an image; or neither.

    Attributes:
        path: of an image in bytes, the path that its file had, if it is known.
        problem: why it is neither; `path` is then the beginning of the text.
    """

    path: str = ""
    data: bytes | None = None
    problem: Problem | None = None


def image_of(cell) -> ImageCell:
    """The image of a cell: a path, bytes, base64, a data: URL, the text of an SVG, or
    {"bytes": ..., "path": ...} as in data sets on the Hugging Face hub.
    """
    if isinstance(cell, dict):
        if isinstance(cell.get("bytes"), bytes):
            return ImageCell(as_text(cell.get("path")), cell["bytes"])
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, bytes):
        return ImageCell(data=cell)
    if isinstance(cell, list) and cell:
        return ImageCell(problem=Problem("image is not a path", "a list; each row must have one image"))
    text = as_text(cell)
    if text.lstrip("\ufeff \t\r\n").startswith(("<svg", "<?xml")):
        return ImageCell(data=text.encode("utf-8", "surrogateescape"))
    if text[:5].lower() == "data:":
        return _of_data_url(text)
    if len(text) < MIN_BASE64_CHARACTERS:
        return ImageCell(text)
    if text[:16].translate(URL_SAFE).startswith(BASE64_STARTS) and (data := _from_base64(text)):
        return ImageCell(data=data)
    if len(text) > MAX_PATH_CHARACTERS and not is_url(text):
        detail = f"{len(text):,} characters that are neither a path nor the base64 of an image"
        return ImageCell(shortened(text), problem=Problem("image is not a path", detail))
    return ImageCell(text)


def _of_data_url(text: str) -> ImageCell:
    """The image of data:[TYPE][;base64],DATA (RFC 2397); the type is not asked, as the bytes show it."""
    head, comma, body = text.partition(",")
    data = unquote_to_bytes(body.encode("utf-8", "surrogateescape"))
    is_base64 = "".join(head.split()).lower().endswith(";base64")
    if is_base64:
        data = _from_base64(data.decode("latin-1"))
    if data:
        return ImageCell(data=data)
    problem = "its base64 is damaged" if is_base64 and body else "it holds no bytes"
    detail = f"{len(text):,} characters: {problem if comma else 'it has no comma before its data'}"
    return ImageCell(shortened(text), problem=Problem("broken data: URL", detail))


def _from_base64(text: str) -> bytes | None:
    """The bytes; None if the text is no base64, or empty."""
    text = "".join(text.split()).translate(URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True) or None
    except ValueError:
        return None


def as_text(value) -> str:
    """A cell as text; "" if it is empty, not a number, a list or a struct."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):  # some tools write text to Parquet without saying that it is text
        return value.decode("utf-8", "surrogateescape")
    return "" if value is None or isinstance(value, (list, dict)) or is_nan(value) else str(value)


def weight_of(cell) -> float | Problem:
    """The weight in a cell: a finite number of 0 or more; 1 where the cell is empty."""
    text = as_text(cell).strip()
    if cell is None or (isinstance(cell, (str, bytes)) and not text):
        return 1.0
    try:
        weight = float(text) if text.isascii() and "_" not in text else math.nan  # 1_000 and other digits
    except ValueError:  # as_text() leaves nothing of a list, a struct or NaN
        weight = math.nan
    if 0 <= weight < math.inf:
        return abs(weight)  # -0 is 0
    detail = f"it is {shortened(text or str(cell))!r}, but must be a finite number from 0, or empty for 1"
    if DECIMAL_COMMA.fullmatch(text):
        detail += f"; write {shortened(text).replace(',', '.')}, with a decimal point"
    return Problem(INVALID_WEIGHT, detail)


def is_nan(value) -> bool:
    return isinstance(value, float) and math.isnan(value)


def shortened(text: str, characters: int = 40) -> str:
    return text if len(text) <= characters else f"{text[:characters]}..."
