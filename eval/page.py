"""What a model finds, as one self-contained HTML page: captions drawn at random, and the pictures they bring up."""

import base64
import html
import io
from pathlib import Path

import torch

from data_prep.atomic import atomic_file
from data_prep.shards import Shards
from eval.embed import Embedded
from train.loader import decode

QUERIES, SHOWN, THUMBNAIL_PX = 24, 8, 96

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>What {model} finds</title>
<style>
 :root {{ color-scheme: light dark; }}
 body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }}
 pre {{ overflow-x: auto; padding: .8rem 1rem; border: 1px solid #8885; border-radius: .5rem; }}
 h2 {{ font-size: 1rem; margin: 1.6rem 0 .5rem; }} h2 small {{ font-weight: normal; opacity: .7; }}
  svg {{ max-width: 40rem; display: block; }}
 .row {{ display: flex; flex-wrap: wrap; gap: .5rem; }}
 figure {{ margin: 0; width: 7rem; }}
 img {{ width: 6.4rem; height: 6.4rem; object-fit: contain; background: #fff; border: 3px solid #8884; border-radius: .5rem; }}
 .hit img {{ border: 3px solid #1a9850; }} .hit figcaption::before {{ content: "\\2713 "; color: #1a9850; }}
 figcaption {{ font-size: .75rem; opacity: .8; overflow-wrap: anywhere; }}
</style>
<h1>What {model} finds</h1>
<pre>{table}</pre>
{drawing}
<p>{queries} of {n_texts} captions, drawn at random, each with the {shown} pictures that score highest among {n_images}.
A green frame and a tick: the picture is in the caption's group.</p>
{rows}
</html>
"""


def write_page(path: Path, embedded: Embedded, shards: Shards, model: str, table: str, drawing: str = "") -> None:
    """Write the page; the same captions for every model on the same data, so that two pages compare."""
    texts, captions = embedded.captions.texts, embedded.captions
    chosen = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:QUERIES].tolist()
    rows = []
    for text in chosen:
        scores = embedded.image_features @ embedded.text_features[text]
        groups = set(captions.group_of[captions.text_of == text].tolist())
        order = scores.argsort(descending=True, stable=True).tolist()
        place = 1 + next(at for at, number in enumerate(order) if int(shards.groups[number]) in groups)
        figures = "".join(_figure(shards, number, int(shards.groups[number]) in groups) for number in order[:SHOWN])
        rows.append(
            f'<h2>{html.escape(texts[text])} <small>first right picture at place {place}</small></h2><div class="row">{figures}</div>'
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        values = {
            "model": html.escape(model),
            "table": html.escape(table),
            "drawing": drawing,
            "rows": "\n".join(rows),
            "n_texts": len(texts),
            "n_images": len(shards),
        }
        partial.write_text(PAGE.format(queries=len(chosen), shown=min(SHOWN, len(shards)), **values), encoding="utf-8")


def _figure(shards: Shards, number: int, hit: bool) -> str:
    sample = shards.read(number)
    image = decode(sample.image)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    caption, frame = html.escape(sample.captions[0]), " class=hit" if hit else ""
    return f'<figure{frame}><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
