"""Retrieval metrics of a model on a split. Training and evaluation call the same function, so figures agree.

embed -> ranks -> evaluate             both directions, by group and by instance: what training validates
      -> positions -> evaluate_full    also mAP, nDCG, recall@k, image to image, intervals, query scores
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_prep.atomic import atomic_file
from data_prep.errors import UserError
from data_prep.shards import Shards
from data_prep.strict_json import load_json
from eval.arrays import load_arrays
from eval.embed import Captions, Embedded, embed
from eval.options import INFERENCE, Inference
from eval.retrieval.intervals import mean_interval, paired_difference
from eval.retrieval.metrics import all_relevant, chance, instance_upper_bounds
from eval.retrieval.ranking import Relevance, first_of, positions, query_values, ranks, summarize
from train.metrics import (
    ALL_DIRECTIONS,
    CHANCE,
    COMPARE,
    DIRECTIONS,
    INSTANCE,
    OWN_CAPTIONS,
    RESULT,
    metrics_in,
)
from train.model.clip import Clip
from train.world import World

# Relevant pairs. Where groups are so large that there are more, only each query's first relevant item is
# ranked.
MAX_PAIRS = 30_000_000


def evaluate(clip: Clip, shards: Shards, world: World, inference: Inference = INFERENCE) -> dict:
    """Retrieval in both directions on one split; see evaluate_features()."""
    return evaluate_features(embed(clip, shards, world, inference), shards.groups, world)


def evaluate_features(embedded: Embedded, groups: np.ndarray, world: World) -> dict:
    """Retrieval in both directions.

    Args:
        groups: int64 [n_images], the group of each image.

    Returns:
        n_images, n_texts, and metrics: DIRECTION/METRIC by group, mean/R@1 of both directions,
        instance/DIRECTION/METRIC (each image with its first caption alone), chance/DIRECTION/METRIC.
    """
    images, texts, captions = embedded.image_features, embedded.text_features, embedded.captions
    relevance = Relevance(groups, captions.text_of, captions.group_of)
    by_group = ranks(images, texts, relevance, world)
    first_captions = texts[torch.from_numpy(captions.first).to(texts.device)]
    by_instance = ranks(images, first_captions, Relevance.diagonal(len(images)), world)
    by_chance = (
        chance(relevance.texts_per_image, len(texts)),
        chance(relevance.images_per_text, len(images)),
    )
    metrics = {}
    for number, direction in enumerate(DIRECTIONS):
        metrics |= _prefixed(f"{direction}/", summarize(by_group[number]))
        instance = summarize(by_instance[number])
        instance["median_rank"] = float(np.floor(instance["median_rank"]))  # as open_clip does on model cards
        metrics |= _prefixed(f"{INSTANCE}{direction}/", instance)
        metrics |= _prefixed(f"{CHANCE}{direction}/", by_chance[number])
    metrics["mean/R@1"] = sum(metrics[f"{direction}/R@1"] for direction in DIRECTIONS) / len(DIRECTIONS)
    return {"n_images": len(images), "n_texts": len(texts), "metrics": metrics}


def _prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in metrics.items()}


def metric_names() -> list[str]:
    """Names of the metrics of evaluate(), without chance/; found by evaluating two images."""
    numbers = np.arange(2)
    two = Embedded(torch.eye(2), torch.eye(2), Captions(["a", "b"], numbers, numbers, numbers, numbers))
    return [
        name for name in evaluate_features(two, numbers, World())["metrics"] if not name.startswith(CHANCE)
    ]


class QueryScores:
    """What each query scores, to compare models query by query.

    Attributes:
        values: "DIRECTION/METRIC" -> float [queries]; the metric is their mean.
        groups: DIRECTION -> int64 [queries]; queries of one group are correlated.
    """

    def __init__(self, values: dict[str, np.ndarray], groups: dict[str, np.ndarray]):
        self.values, self.groups = values, groups

    def save(self, path: Path) -> None:
        groups = {f"groups/{direction}": groups for direction, groups in self.groups.items()}
        with atomic_file(path) as partial, open(partial, "wb") as file:
            np.savez_compressed(file, **self.values, **groups)

    @classmethod
    def load(cls, path: Path) -> "QueryScores":
        """Raises:
        UserError: the file is damaged.
        """
        try:
            arrays = load_arrays(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: damaged ({error}); make the result again: python -m eval retrieval MODEL --data"
                " SHARDS --json FILE"
            ) from None
        is_group = {name: name.startswith("groups/") for name in arrays}
        return cls(
            {name: values for name, values in arrays.items() if not is_group[name]},
            {name.removeprefix("groups/"): groups for name, groups in arrays.items() if is_group[name]},
        )


class ExtraQueries(NamedTuple):
    """Sentences that are no captions.

    Attributes:
        text_features: fp32 [queries, d], L2-normed.
        query_of, image_of: int64, all relevant pairs, sorted by query.
    """

    text_features: torch.Tensor
    query_of: np.ndarray
    image_of: np.ndarray


def evaluate_full(
    embedded: Embedded, groups: np.ndarray, world: World, extra: ExtraQueries | None = None
) -> tuple[dict, QueryScores]:
    """All that evaluate_features() returns, and more: mAP, nDCG@10, recall@k, image_to_image,
    queries_to_image, own_captions/ where an image has several, upper bounds of R@1 by instance, 95 %
    intervals.

    Args:
        groups: int64 [n_images], the group of each image.
        extra: further queries, for queries_to_image.

    Returns:
        The result of evaluate_features() with more metrics and `intervals`, "DIRECTION/METRIC" -> [low,
        high]; and what each query scores.
    """
    result = evaluate_features(embedded, groups, world)
    images, metrics, queries = embedded.image_features, result["metrics"], QueryScores({}, {})
    _add_captions(queries, embedded, groups, world)
    image, mate = _group_mates(groups)
    if 0 < len(image) <= MAX_PAIRS:
        asked, query_of = np.unique(image, return_inverse=True)
        found = positions(images, images, image, mate, world, exclude_self=True)
        _add_direction(queries, "image_to_image", groups[asked], found, query_of)
        metrics |= _prefixed(f"{CHANCE}image_to_image/", chance(np.bincount(query_of), len(images) - 1))
    if extra:
        found = positions(extra.text_features, images, extra.query_of, extra.image_of, world)
        first = np.unique(extra.query_of, return_index=True)[1]
        _add_direction(queries, "queries_to_image", groups[extra.image_of[first]], found, extra.query_of)
        metrics |= _prefixed(f"{CHANCE}queries_to_image/", chance(np.bincount(extra.query_of), len(images)))
    intervals = {}
    for name, values in queries.values.items():
        direction, _, metric = name.partition("/")
        value, low, high = mean_interval(values, queries.groups[direction])
        metrics.setdefault(name, value)
        intervals[name] = [low, high]
        if metric == "mean_rank":
            metrics.setdefault(f"{direction}/median_rank", float(np.median(values)))
    _add_upper_bounds(metrics, embedded)
    if len(embedded.captions.image_of) > len(images):
        metrics |= _by_own_captions(embedded, world)
    return result | {"intervals": intervals, "n_groups": len(np.unique(groups))}, queries


def _add_upper_bounds(metrics: dict[str, float], embedded: Embedded) -> None:
    """Add instance/DIRECTION/R@1_upper_bound, which no measured value can exceed."""
    same_image = embedded.captions.same_image
    images = np.arange(len(embedded.image_features)) if same_image is None else same_image
    for direction, bound in instance_upper_bounds(embedded.captions.first, images).items():
        measured = metrics[f"{INSTANCE}{direction}/R@1"]
        assert measured <= bound + 1e-6, (direction, measured, bound)
        metrics[f"{INSTANCE}{direction}/R@1_upper_bound"] = bound


def _by_own_captions(embedded: Embedded, world: World) -> dict[str, float]:
    """Metrics under own_captions/: any caption of an image is relevant to it, and no other."""
    images, captions = embedded.image_features, embedded.captions
    relevance = Relevance(np.arange(len(images)), captions.text_of, captions.image_of)
    metrics = {}
    for direction, counts in zip(
        DIRECTIONS, ranks(images, embedded.text_features, relevance, world), strict=True
    ):
        metrics |= _prefixed(f"{OWN_CAPTIONS}{direction}/", summarize(counts))
    return metrics


def _add_captions(queries: QueryScores, embedded: Embedded, groups: np.ndarray, world: World) -> None:
    """Score every query of image_to_text and text_to_image; nothing above MAX_PAIRS."""
    images, texts = embedded.image_features, embedded.text_features
    relevance = Relevance(groups, embedded.captions.text_of, embedded.captions.group_of)
    if relevance.texts_per_image.sum() > MAX_PAIRS:
        return
    image_of, text_of = relevance.all_pairs()
    found = positions(images, texts, image_of, text_of, world)
    _add_direction(queries, "image_to_text", groups, found, image_of)
    order = np.lexsort((image_of, text_of))
    found = positions(texts, images, text_of[order], image_of[order], world)
    _add_direction(queries, "text_to_image", embedded.captions.first_group(), found, text_of[order])


def _add_direction(
    queries: QueryScores,
    direction: str,
    groups: np.ndarray,
    found: tuple[np.ndarray, np.ndarray],
    query_of: np.ndarray,
) -> None:
    """Args:
    groups: int64 [queries].
    found: of positions(), for the relevant pairs of `query_of`.
    """
    values = query_values(first_of(*found, query_of, len(groups)))
    values |= all_relevant(*found, query_of, len(groups))
    queries.values |= {f"{direction}/{metric}": of_queries for metric, of_queries in values.items()}
    queries.groups[direction] = groups


def _group_mates(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 images, and other images of their groups, sorted by image; more than MAX_PAIRS are not listed."""
    order = np.argsort(groups, kind="stable")
    _, starts, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    if int((sizes * (sizes - 1)).sum()) > MAX_PAIRS:
        return np.zeros(MAX_PAIRS + 1, np.int64), np.zeros(0, np.int64)
    members = [order[start : start + size] for start, size in zip(starts, sizes, strict=True) if size > 1]
    pairs = [np.array(np.meshgrid(group, group)).reshape(2, -1) for group in members]
    image, mate = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), np.int64)
    image, mate = image[image != mate], mate[image != mate]
    by_image = np.lexsort((mate, image))
    return image[by_image], mate[by_image]


def differences(first: QueryScores, second: QueryScores) -> dict[str, list[float]]:
    """ "DIRECTION/METRIC" -> [second - first, low, high, p], paired by query; both on the same data."""
    found = {}
    for direction in ALL_DIRECTIONS:
        for metric in metrics_in(COMPARE):
            name = f"{direction}/{metric}"
            if name in first.values and name in second.values:
                scores = first.values[name], second.values[name]
                found[name] = list(paired_difference(*scores, second.groups[direction]))
    return found


def pooled(queries: QueryScores, *directions: str, metric: str = "R@1") -> tuple[np.ndarray, np.ndarray]:
    """The queries of several directions as one sample, for an interval of the mean of the directions' means.

    Returns:
        What each query scores, float [n], so weighted that their mean is that mean; the groups, int64 [n].
    """
    values = [queries.values[f"{direction}/{metric}"] for direction in directions]
    groups = [queries.groups[direction] for direction in directions]
    share = sum(map(len, values)) / len(values)
    return np.concatenate([each * share / len(each) for each in values]), np.concatenate(groups)


def queries_file(path: Path) -> Path:
    """The file beside a result with its QueryScores."""
    return path.with_suffix(".queries.npz")


def read_json(path: Path) -> dict:
    """A result that write_json wrote.

    Raises:
        UserError: it cannot be read, or is no result of retrieval.
    """
    try:
        return load_json(path, RESULT)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path}: not a result of retrieval ({reason}); make one with: python -m eval retrieval MODEL"
            f" --data SHARDS --json {path}"
        ) from None
