"""A page of what a model finds: its figures, and random captions with the images that score highest."""

from pathlib import Path
from typing import NamedTuple

import torch

from data_prep.html import write_page
from data_prep.shards import Shards
from eval.embed import Embedded
from eval.report.images import Thumbnail, thumbnail
from eval.report.names import with_display_names
from eval.report.plots import directions_of, recall, robustness, svg, write_png
from eval.retrieval.table import result_parts
from train.metrics import ALL_DIRECTIONS

TEMPLATE = Path(__file__).with_name("retrieval.html")
QUERIES, MAX_RESULTS, THUMBNAIL_PX = 24, 8, 128


class Result(NamedTuple):
    """An image that a caption finds; `hit`: it is in the caption's group."""

    image: Thumbnail
    hit: bool


class Query(NamedTuple):
    """A caption and what it finds.

    Attributes:
        rank: of the first relevant image.
        relevant: this image.
        results: the images that score highest.
    """

    caption: str
    rank: int
    relevant: Thumbnail
    results: list[Result]


def write_retrieval_page(
    path: Path, embedded: Embedded, shards: Shards, result: dict, baseline: dict | None
) -> None:
    """Write the page, and its plot of R@k as a PNG beside it.

    Args:
        result: of eval.retrieval.score.evaluate_full, with its "model"; the queries are of this model.
        baseline: another result on the same data.
    """
    models = with_display_names([baseline, result] if baseline else [result])
    result, baseline = models[-1], models[0] if baseline else None
    degraded = result.get("robustness", {})
    undegraded = result["metrics"]["image_to_text/R@1"]
    write_page(
        path,
        TEMPLATE,
        title=f"Retrieval by {result['model']}",
        parts=result_parts(result, baseline),
        plots=[svg(recall(models, [direction])) for direction in directions_of(models, ALL_DIRECTIONS)],
        robustness=[svg(robustness({name: curve}, undegraded)) for name, curve in degraded.items()],
        queries=random_queries(embedded, shards),
        n_texts=len(embedded.captions.texts),
        n_images=len(shards),
        n_shown=min(MAX_RESULTS, len(shards)),
    )
    write_png(path.with_suffix(".png"), recall(models, ALL_DIRECTIONS))


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
        first = hits.index(True)
        relevant = thumbnail(shards, order[first], THUMBNAIL_PX)
        queries.append(Query(captions.texts[text], 1 + first, relevant, results))
    return queries
