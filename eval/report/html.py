"""Pages for people: one HTML file that loads nothing, and its drawing as a PNG beside it."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from data_prep.atomic import atomic_file
from data_prep.shards import Shards
from eval.report.plots import svg, write_png
from train.data.decode import decode

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
 :root {{ color-scheme: light dark; }}
 body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }}
 pre, .wide {{ overflow-x: auto; }} pre {{ padding: .8rem 1rem; border: 1px solid #8885; border-radius: .5rem; overflow-wrap: normal; }}
 h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }} h3 {{ font-size: .95rem; margin: 1.2rem 0 .4rem; }}
 small {{ font-weight: normal; opacity: .75; }}
 svg {{ max-width: 100%; height: auto; background: #fff; border-radius: .5rem; }}
 img {{ width: 4rem; height: 4rem; object-fit: contain; background: #fff; border: 1px solid #8886; border-radius: .3rem; }}
 .row {{ display: flex; flex-wrap: wrap; gap: .6rem; }} figure {{ margin: 0; width: 9.4rem; }} figcaption {{ font-size: .8rem; }}
 .large img {{ width: 6.4rem; height: 6.4rem; border-width: 3px; }}
 .hit img {{ border-color: #1a9850; }} .hit figcaption::before {{ content: "\\2713 "; color: #1a9850; }}
 table {{ border-collapse: collapse; }} td, th {{ padding: .2rem .8rem; text-align: right; font-weight: normal; white-space: nowrap; }}
 td:first-child, th:first-child {{ text-align: left; }} tr + tr {{ border-top: 1px solid #8884; }} tr:first-child th {{ font-weight: 600; }}
 {style}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def write(path: Path, title: str, body: list[str], drawing: Figure | None = None, style: str = "") -> None:
    """Write a page.

    Args:
        path: the HTML file; the drawing's PNG gets the same name.
        title: plain text, its heading.
        body: HTML, in which everything that was read from somewhere is escaped.
        drawing: stands above the body.
        style: CSS of this page alone.
    """
    parts = [svg(drawing), *body] if drawing else body
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text(
            PAGE.format(title=html.escape(title), body="\n".join(parts), style=style), encoding="utf-8"
        )
    if drawing:
        write_png(path.with_suffix(".png"), drawing)


def pre(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts, the first row its header."""
    kinds = ["th", *["td"] * (len(rows) - 1)]
    lines = (
        "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row)
        for kind, row in zip(kinds, rows, strict=True)
    )
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def figure(picture: str, caption: str, hit: bool = False) -> str:
    """A picture with HTML below it; one that is a hit gets a green frame and a tick."""
    return f"<figure{' class=hit' if hit else ''}>{picture}<figcaption>{caption}</figcaption></figure>"


def picture(shards: Shards, number: int, side_px: int = 64) -> str:
    """An <img> of a sample, its caption as its title."""
    sample = shards.read(number)
    return image(decode(sample.image), sample.captions[0] if sample.captions else sample.key, side_px)


def image(picture: Image.Image, title: str, side_px: int = 64) -> str:
    """An <img> that holds the picture itself, no larger than side_px."""
    picture = picture.copy()
    picture.thumbnail((side_px, side_px))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    source, title = base64.b64encode(buffer.getvalue()).decode(), html.escape(title)
    return f'<img src="data:image/png;base64,{source}" alt="{title}" title="{title}">'
