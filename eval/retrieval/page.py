"""What a model finds, as a page: its figures, and captions drawn at random with the pictures they bring up."""

import html
from pathlib import Path

import torch

from data_prep.shards import Shards
from eval.embed import Embedded
from eval.report import html as sheet
from eval.report.plots import degraded, recall, svg

QUERIES, SHOWN, THUMBNAIL_PX = 24, 8, 96


def write_page(path: Path, embedded: Embedded, shards: Shards, models: list[dict], table: str) -> None:
    """Write the page; the same captions for every model on the same data, so that two pages compare.

    Args:
        models: results of eval.retrieval.score.examine with their "model"; the last is the one whose finds
            are shown.
        table: the same as text.
    """
    texts, captions, result = embedded.captions.texts, embedded.captions, models[-1]
    body = [sheet.pre(table)]
    if "degraded" in result:
        drawing = degraded(result["degraded"], result["metrics"]["image_to_text/R@1"])
        body += ["<h2>Degraded query images</h2>", svg(drawing)]
    chosen = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:QUERIES].tolist()
    body.append(
        f"<p>{len(chosen)} of {len(texts)} captions, drawn at random, each with the {min(SHOWN, len(shards))}"
        f" pictures that score highest among {len(shards)}. A green frame and a tick: the picture is in the"
        " caption's group.</p>"
    )
    for text in chosen:
        scores = embedded.image_features @ embedded.text_features[text]
        groups = set(captions.group_of[captions.text_of == text].tolist())
        order = scores.argsort(descending=True, stable=True).tolist()
        place = 1 + next(at for at, number in enumerate(order) if int(shards.groups[number]) in groups)
        figures = (_figure(shards, number, int(shards.groups[number]) in groups) for number in order[:SHOWN])
        body.append(
            f"<h2>{html.escape(texts[text])} <small>first right picture at place {place}</small></h2>"
        )
        body.append(f'<div class="row large">{"".join(figures)}</div>')
    drawing = recall(models, ("image_to_text", "text_to_image", "image_to_image", "queries_to_image"))
    sheet.write(path, f"What {result['model']} finds", body, drawing)


def _figure(shards: Shards, number: int, hit: bool) -> str:
    caption = html.escape(shards.captions(number)[0])
    return sheet.figure(sheet.picture(shards, number, THUMBNAIL_PX), caption, hit)
