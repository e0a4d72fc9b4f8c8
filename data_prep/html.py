"""One HTML layer for every page: jinja2 with autoescape. A page is one file that loads no other.

    values -> a template beside the code that fills it, which extends page.html -> PATH

Text is escaped by jinja2; only what this module makes (Markup) is not.
"""

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from data_prep.atomic import atomic_file
from data_prep.tables import MAX_UNBROKEN
from data_prep.terminal import CONTROL, safe

TEMPLATES = Path(__file__).parent / "templates"  # page.html, the frame of all pages, and macros.html


def render(template: Path, **values: object) -> str:
    """The text of a page.

    Args:
        template: a jinja2 file that may extend page.html and import macros.html; its name must be another.
        values: what the template names; one that it names and that is missing is our bug.
    """
    loader = FileSystemLoader([template.parent, TEMPLATES])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["has_long_word"] = has_long_word
    return environment.get_template(template.name).render(**values)


def has_long_word(text: str) -> bool:
    """Whether a table's cell must break within a word to fit a phone; others break between words only."""
    return max(map(len, text.split()), default=0) > MAX_UNBROKEN


def write_page(path: Path, template: Path, **values: object) -> None:
    """Write a page, whole or not at all; folders are made. Control characters are escaped, see safe()."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = safe(render(template, **values), CONTROL)
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def data_uri(image: Image.Image, side_px: int = 64) -> Markup:
    """An image as the value of <img src>, no larger than side_px."""
    small = image.copy()
    small.thumbnail((side_px, side_px))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return Markup(f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}")
