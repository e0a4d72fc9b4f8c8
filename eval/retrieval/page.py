"""A page of what a model finds: its figures, and random captions with the images that score highest."""

from pathlib import Path
from typing import NamedTuple

import torch

from data_prep.html import write_page
from data_prep.shards import Shards
from eval.embed import Embedded
from eval.report.images import Thumbnail, thumbnail
from eval.report.plots import recall, robustness, svg, write_png
from train.metrics import ALL_DIRECTIONS

QUERIES, MAX_RESULTS, THUMBNAIL_PX = 24, 8, 96


class Result(NamedTuple):
    """An image that a caption finds; `hit`: it is in the caption's group."""

    image: Thumbnail
    hit: bool


class Query(NamedTuple):
    """A caption, the rank of its first relevant image, and the images that score highest."""

    caption: str
    rank: int
    results: list[Result]


def write_retrieval_page(
    path: Path, embedded: Embedded, shards: Shards, models: list[dict], text: str
) -> None:
    """Write the page, and its plot of R@k as a PNG beside it.

    Args:
        models: results of eval.retrieval.score.evaluate_full with their "model"; the queries are of the last.
        text: the tables.
    """
    result = models[-1]
    curves = None
    if "robustness" in result:
        curves = svg(robustness(result["robustness"], result["metrics"]["image_to_text/R@1"]))
    plot = recall(models, ALL_DIRECTIONS)
    write_page(
        path,
        Path(__file__).with_name("retrieval.html"),
        title=f"Retrieval by {result['model']}",
        text=text,
        plot=svg(plot),
        robustness=curves,
        queries=random_queries(embedded, shards),
        n_texts=len(embedded.captions.texts),
        n_images=len(shards),
        n_shown=min(MAX_RESULTS, len(shards)),
    )
    write_png(path.with_suffix(".png"), plot)


def random_queries(embedded: Embedded, shards: Shards) -> list[Query]:
    """Random captions and what they find; the same captions for every model on the same data."""
    captions, queries = embedded.captions, []
    shuffled = torch.randperm(len(captions.texts), generator=torch.Generator().manual_seed(0))
    for text in shuffled[:QUERIES].tolist():
        scores = embedded.image_features @ embedded.text_features[text]
        groups = set(captions.group_of[captions.text_of == text].tolist())
        order = scores.argsort(descending=True, stable=True).tolist()
        hits = [int(shards.groups[number]) in groups for number in order]
        results = [
            Result(thumbnail(shards, number, THUMBNAIL_PX), hit)
            for number, hit in zip(order[:MAX_RESULTS], hits, strict=False)
        ]
        queries.append(Query(captions.texts[text], 1 + hits.index(True), results))
    return queries
