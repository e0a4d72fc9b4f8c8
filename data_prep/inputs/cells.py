"""The cells of a table: text, an image as a path or as bytes, a field of a struct."""

import base64
import json
import math
from typing import NamedTuple

from data_prep.inputs.names import Problem
from data_prep.inputs.storage import is_url

MAX_PATH_CHARACTERS = 4096  # PATH_MAX of Linux
# How the base64 of PNG, JPEG, GIF, WebP, BMP, TIFF, HEIC, AVIF and SVG files begins. Text of this length
# without a dot is hardly a path.
BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A", "AAAA", "PHN2Zy", "PD94bWw")
MIN_BASE64_CHARACTERS = 64
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
    """The image of a cell: a path, bytes, base64, the text of an SVG, or {"bytes": ..., "path": ...} as in
    data sets on the Hugging Face hub.
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
    if len(text) < MIN_BASE64_CHARACTERS:
        return ImageCell(text)
    if (data := _from_base64(text)) is not None:
        return ImageCell(data=data)
    if text.startswith("data:") or (len(text) > MAX_PATH_CHARACTERS and not is_url(text)):
        detail = f"{len(text):,} characters that are neither a path nor the base64 of an image"
        return ImageCell(shortened(text), problem=Problem("image is not a path", detail))
    return ImageCell(text)


def _from_base64(text: str) -> bytes | None:
    """The bytes of an image in base64 or in a data: URL; None if it is neither."""
    if text.startswith("data:image/"):
        text = text.partition(";base64,")[2]
    elif not text[:16].translate(URL_SAFE).startswith(BASE64_STARTS):
        return None
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


def is_nan(value) -> bool:
    return isinstance(value, float) and math.isnan(value)


def shortened(text: str, characters: int = 40) -> str:
    return text if len(text) <= characters else f"{text[:characters]}..."
