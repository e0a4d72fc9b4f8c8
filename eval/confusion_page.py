"""What captions a model confuses, as one self-contained page: heatmaps of several models, and the captions that steal images."""

import base64
import html
import io
from pathlib import Path

from PIL import Image

from data_prep.atomic import atomic_file
from data_prep.shards import Shards
from train.loader import decode

THUMBNAIL_PX = 64

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Caption confusion</title>
<style>
 :root {{ color-scheme: light dark; }}
 body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1rem; }}
 pre, .wide {{ overflow-x: auto; }} pre {{ padding: .8rem 1rem; border: 1px solid #8885; border-radius: .5rem; }}
 h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }} h3 {{ font-size: .95rem; margin: 1.2rem 0 .4rem; }}
 small {{ font-weight: normal; opacity: .7; }}
 img {{ width: 4rem; height: 4rem; object-fit: contain; background: #fff; border: 1px solid #8886; border-radius: .3rem; }}
 table {{ border-collapse: separate; border-spacing: 2px; }} td {{ min-width: 3rem; text-align: center; font-size: .8rem; }}
 th img {{ width: 2.4rem; height: 2.4rem; vertical-align: middle; }} th {{ font-weight: normal; font-size: .8rem; text-align: right; }}
 thead th {{ writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; max-height: 11rem; overflow-wrap: anywhere; }}
 td.own {{ outline: 1px solid; outline-offset: -1px; }} td.full {{ color: #fff; }}
</style>
<h1>Caption confusion</h1>
<pre>{table}</pre>
{body}
</html>
"""


def table(result: dict) -> str:
    """The result for people: a row per model, a column per column of texts."""
    width = max(len("chance"), *(len(one["model"]) for one in result["models"])) + 2
    lines = [
        f"{result['n_images']} images ({result['data']}), the caption of each against {result['k']} of other groups, seed {result['seed']}"
    ]
    for name, column in result["columns"].items():
        clipped = f", {column['clipped']} of them against all there are, fewer than {result['k']}" if column["clipped"] else ""
        lines.append(f"{name}: {column['n_texts']} distinct texts, {column['n_scored']} images scored{clipped}")
    for kind, title in (("accuracy", "accuracy, with 95 % interval"), ("over_all_draws", "its mean over all draws, from the ranks")):
        lines += [title, " " * width + "".join(name.rjust(24) for name in result["columns"])]
        lines.append(
            "  chance".ljust(width) + "".join(f"{100 * column['chance']:.1f} %".rjust(24) for column in result["columns"].values())
        )
        for one in result["models"]:
            cells = (one["columns"][name][kind] for name in result["columns"])
            said = (f"{100 * at['value']:.1f} % ({100 * at['low']:.1f} to {100 * at['high']:.1f})" for at in cells)
            lines.append(f"  {one['model']}".ljust(width) + "".join(cell.rjust(24) for cell in said))
    for one in result["models"]:
        said = ", ".join(f"{thief['caption']!r} {thief['stolen']:.4g}" for thief in one["thieves"][:3])
        lines += [f"captions that steal most images from {one['model']}", f"  {said or 'none'}"]
    return "\n".join(lines)


def write_page(path: Path, result: dict, shards: Shards) -> None:
    """The page: one file that loads nothing."""
    body, shown = [], result["heatmap"]
    head = "".join(f"<th>{html.escape(caption)}</th>" for caption in shown["captions"])
    for one in result["models"]:
        rows = []
        for at, cells in enumerate(one["heatmap"]):
            # One scale for all models: opacity is the probability, over the page's own background.
            style = 'style="background: rgb(29 78 216 / {0:.3f})" class="{1}"'
            marks = [" ".join(["own"] * (at == other) + ["full"] * (cell > 0.75)) for other, cell in enumerate(cells)]
            row = "".join(f"<td {style.format(cell, mark)}>{100 * cell:.0f}</td>" for cell, mark in zip(cells, marks, strict=True))
            rows.append(f"<tr><th>{html.escape(shown['captions'][at])} {picture(shards, shown['images'][at])}</th>{row}</tr>")
        scale = f"softmax of {one['logit_scale']:.1f} &times; cosine, % of each row; one color scale"
        body.append(f"<h2>{html.escape(one['model'])} <small>{scale}</small></h2>")
        body.append(f'<div class="wide"><table><thead><tr><td></td>{head}</tr></thead>{"".join(rows)}</table></div>')
    for one in result["models"]:
        body.append(
            f"<h2>Captions that steal most images from {html.escape(one['model'])}</h2>" + ("" if one["thieves"] else "<p>None.</p>")
        )
        for thief in one["thieves"]:
            body.append(f"<h3>{html.escape(thief['caption'])} <small>first for {thief['stolen']:.4g} images of other groups</small></h3>")
            body.append("".join(picture(shards, at) for at in thief["images"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text(PAGE.format(table=html.escape(table(result)), body="\n".join(body)), encoding="utf-8")


def picture(shards: Shards, number: int) -> str:
    """An <img> of a sample, its caption as its title."""
    sample = shards.read(number)
    image = decode(sample.image)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    caption = html.escape(sample.captions[0] if sample.captions else sample.key)
    return f'<img src="{data_uri(image)}" alt="{caption}" title="{caption}">'


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
