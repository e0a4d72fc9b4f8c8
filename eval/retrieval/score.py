"""How well captions find their pictures, and pictures their captions and each other: the same function in
training and after.
"""

import json
from pathlib import Path

import numpy as np
import torch

from data_prep.atomic import atomic_file
from data_prep.errors import UserError
from data_prep.shards import Shards
from eval.embed import Captions, Embedded, embed
from eval.options import INFERENCE, Inference
from eval.retrieval.intervals import mean_interval, paired_difference
from eval.retrieval.metrics import DEPTH, KS, ceiling, set_measures
from eval.retrieval.ranking import (
    Ranks,
    Relevance,
    chance,
    first_of,
    positions,
    query_values,
    ranks,
    summarize,
)
from train.model.clip import Clip
from train.world import World

DIRECTIONS = ("image_to_text", "text_to_image")
SHOWN = (*(f"R@{k}" for k in KS), "mean_rank", "median_rank", "MRR", "mAP", f"nDCG@{DEPTH}")
# relevant pairs; where groups are larger, only the first relevant item of a query is looked for
MAX_PAIRS = 30_000_000


def evaluate(clip: Clip, shards: Shards, world: World, inference: Inference = INFERENCE) -> dict:
    """Retrieval in both directions over one split; see score()."""
    return score(embed(clip, shards, world, inference), shards.groups, world)


def score(embedded: Embedded, groups: np.ndarray, world: World) -> dict:
    """Retrieval in both directions.

    Args:
        groups: int64 [n_images], the group of each image.

    Returns:
        n_images, n_texts, and metrics: DIRECTION/R@1 and so on by group, mean/R@1 of both directions,
        legacy_diagonal/DIRECTION/R@1 by instance (each image with its first caption), chance/DIRECTION/R@1.
    """
    image_features, text_features, captions = (
        embedded.image_features,
        embedded.text_features,
        embedded.captions,
    )
    relevance = Relevance(groups, captions.text_of, captions.group_of)
    by_group = ranks(image_features, text_features, relevance, world)
    n_images, n_texts = len(image_features), len(text_features)
    diagonal = text_features[torch.from_numpy(captions.first).to(text_features.device)]
    by_instance = ranks(image_features, diagonal, Relevance.diagonal(n_images), world)
    guesses = chance(relevance.texts_per_image, n_texts), chance(relevance.images_per_text, n_images)
    metrics = {}
    for direction, found, instance, guess in zip(DIRECTIONS, by_group, by_instance, guesses, strict=True):
        metrics |= {f"{direction}/{name}": value for name, value in summarize(found).items()}
        metrics |= {f"legacy_diagonal/{direction}/{name}": value for name, value in _legacy(instance).items()}
        metrics |= {f"chance/{direction}/{name}": value for name, value in guess.items()}
    metrics["mean/R@1"] = sum(metrics[f"{direction}/R@1"] for direction in DIRECTIONS) / 2
    return {"n_images": n_images, "n_texts": n_texts, "metrics": metrics}


def metric_names() -> list[str]:
    """What score() calls its metrics, without those of chance; found by scoring two pictures."""
    number = np.arange(2)
    made_up = Embedded(torch.eye(2), torch.eye(2), Captions(["one", "two"], number, number, number, number))
    return [name for name in score(made_up, number, World())["metrics"] if not name.startswith("chance/")]


def _legacy(found: Ranks) -> dict[str, float]:
    """As model cards have it: open_clip rounds the median down."""
    values = summarize(found)
    return values | {"median_rank": float(np.floor(values["median_rank"]))}


class Queries:
    """What each query of each direction scores, to compare models query by query.

    Attributes:
        values: "DIRECTION/NAME" -> float [queries].
        groups: DIRECTION -> int64 [queries], which queries stand or fall together.
    """

    def __init__(self, values: dict[str, np.ndarray], groups: dict[str, np.ndarray]):
        self.values, self.groups = values, groups

    def save(self, path: Path) -> None:
        with atomic_file(path) as partial, open(partial, "wb") as file:
            np.savez_compressed(
                file, **self.values, **{f"groups/{name}": each for name, each in self.groups.items()}
            )

    @classmethod
    def load(cls, path: Path) -> "Queries":
        with np.load(path, allow_pickle=False) as stored:
            groups = {
                name.removeprefix("groups/"): stored[name]
                for name in stored.files
                if name.startswith("groups/")
            }
            return cls(
                {name: stored[name] for name in stored.files if not name.startswith("groups/")}, groups
            )


Unseen = tuple[torch.Tensor, np.ndarray, np.ndarray]


def examine(
    embedded: Embedded, groups: np.ndarray, world: World, unseen: Unseen | None = None
) -> tuple[dict, Queries]:
    """All that score() says, and more: mAP, nDCG@10, recall@k, image_to_image, the ceiling of instance
    figures, 95 % intervals.

    Args:
        groups: int64 [n_images], the group of each image.
        unseen: text_features of further queries, and int64 queries and images of their relevant pairs, sorted
            by query.

    Returns:
        The result of score() with more metrics and `intervals`, "DIRECTION/NAME" -> [low, high]; and what
        each query scores.
    """
    result = score(embedded, groups, world)
    relevance = Relevance(groups, embedded.captions.text_of, embedded.captions.group_of)
    images, texts = embedded.image_features, embedded.text_features
    queries = Queries({}, {})
    if relevance.texts_per_image.sum() <= MAX_PAIRS:
        image_of, text_of = relevance.all_pairs()
        order = np.lexsort((image_of, text_of))
        group_of_text = np.full(len(texts), np.iinfo(np.int64).max)
        np.minimum.at(group_of_text, text_of, groups[image_of])
        _direction(
            queries, "image_to_text", groups, positions(images, texts, image_of, text_of, world), image_of
        )
        found = positions(texts, images, text_of[order], image_of[order], world)
        _direction(queries, "text_to_image", group_of_text, found, text_of[order])
    one, other = _mates(groups)
    if 0 < len(one) <= MAX_PAIRS:
        asked, query_of = np.unique(one, return_inverse=True)
        found = positions(images, images, one, other, world, without_self=True)
        _direction(queries, "image_to_image", groups[asked], found, query_of)
        guess = chance(np.bincount(query_of), len(images) - 1)
        result["metrics"] |= {f"chance/image_to_image/{name}": value for name, value in guess.items()}
    if unseen:
        found = positions(unseen[0], images, unseen[1], unseen[2], world)
        _direction(
            queries,
            "queries_to_image",
            groups[unseen[2]][np.unique(unseen[1], return_index=True)[1]],
            found,
            unseen[1],
        )
        guess = chance(np.bincount(unseen[1]), len(images))
        result["metrics"] |= {f"chance/queries_to_image/{name}": value for name, value in guess.items()}
    intervals = {}
    for name, values in queries.values.items():
        direction, _, measure = name.partition("/")
        title = f"{direction}/{ {'rank': 'mean_rank', 'reciprocal_rank': 'MRR', 'AP': 'mAP'}.get(measure, measure) }"
        value, low, high = mean_interval(values, queries.groups[direction])
        result["metrics"].setdefault(title, value)
        intervals[title] = [low, high]
        if measure == "rank":
            result["metrics"].setdefault(f"{direction}/median_rank", float(np.median(values)))
    _, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    result["metrics"]["legacy_diagonal/ceiling_R@1"] = ceiling(sizes[members])
    return result | {"intervals": intervals}, queries


def _direction(
    queries: Queries,
    name: str,
    groups: np.ndarray,
    found: tuple[np.ndarray, np.ndarray],
    query_of: np.ndarray,
) -> None:
    values = query_values(first_of(*found, query_of, len(groups))) | set_measures(
        *found, query_of, len(groups)
    )
    queries.values |= {f"{name}/{measure}": each for measure, each in values.items()}
    queries.groups[name] = groups


def _mates(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 images and other images of their groups, sorted by image."""
    order = np.argsort(groups, kind="stable")
    _, starts, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    if int((sizes * (sizes - 1)).sum()) > MAX_PAIRS:
        return np.zeros(MAX_PAIRS + 1, np.int64), np.zeros(0, np.int64)
    members = [order[start : start + size] for start, size in zip(starts, sizes, strict=True) if size > 1]
    pairs = [np.array(np.meshgrid(each, each)).reshape(2, -1) for each in members]
    one, other = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), np.int64)
    one, other = one[one != other], other[one != other]
    at = np.lexsort((other, one))
    return one[at], other[at]


def differences(first: Queries, second: Queries) -> dict[str, list[float]]:
    """ "DIRECTION/NAME" -> [second - first, low, high, p], query by query; both on the same data."""
    found = {}
    for name in first.values.keys() & second.values.keys():
        direction, _, measure = name.partition("/")
        if measure in ("R@1", "R@10", "rank", "reciprocal_rank"):
            found[name] = list(
                paired_difference(first.values[name], second.values[name], second.groups[direction])
            )
    return dict(sorted(found.items()))


def table(result: dict, against: dict | None = None) -> str:
    """A result of `python -m eval retrieval` for people; beside it chance, and another result on the same
    data if given.
    """
    columns = [against, result] if against else [result]
    widths = [14, 11, *(max(24, len(column["model"]) + 2) for column in columns)]

    def line(*cells: str) -> str:
        return cells[0].ljust(widths[0]) + "".join(
            cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)
        )

    lines = [
        f"{result['n_images']} images, {result['n_texts']} distinct captions ({result['data']}); in brackets:"
        " 95 % intervals"
    ]
    lines.append(line("", "chance", *(column["model"] for column in columns)))
    galleries = {
        "image_to_text": result["n_texts"],
        "text_to_image": result["n_images"],
        "image_to_image": result["n_images"] - 1,
    }
    galleries["queries_to_image"] = result["n_images"]
    for direction, gallery in galleries.items():
        title = direction.replace("_", " ")
        for prefix, kind in (
            ("", f"any of the group, among {gallery}"),
            ("legacy_diagonal/", "its own only, as on model cards"),
        ):
            if f"{prefix}{direction}/R@1" not in result["metrics"]:
                continue
            clipped = f"; R@k beyond {gallery} is R@{gallery}" if gallery < max(KS) else ""
            lines.append(f"{title}, {kind}{clipped}")
            for name in SHOWN[:5] if prefix else SHOWN:
                guess = "" if prefix else _cell(result, f"chance/{direction}/{name}")
                lines.append(
                    line(
                        f"  {name.replace('_', ' ')}",
                        guess,
                        *(_cell(column, f"{prefix}{direction}/{name}") for column in columns),
                    )
                )
    if limit := result["metrics"].get("legacy_diagonal/ceiling_R@1"):
        lines.append(
            f"of its own only, a perfect model would reach R@1 {limit:.1%}: the others of a group look as"
            " right"
        )
    gaps = " and ".join(
        f"{result['metrics'][f'{direction}/R@1_gap']:.1%} of {direction}" for direction in DIRECTIONS
    )
    lines.append(
        f"ties are counted in expectation; R@1 would move by at most this, if all went one way: {gaps}"
    )
    if missing := result.get("queries_without_images"):
        shown = "; ".join(missing[:5]) + ("; ..." if len(missing) > 5 else "")
        lines.append(f"{len(missing)} queries without an image in this split are not scored: {shown}")
    for value, found in result.get("slices", {}).items():
        cells = (
            f"{name} {100 * found[name]:.1f} %"
            for name in ("image_to_text/R@1", "text_to_image/R@1")
            if name in found
        )
        lines.append(f"  {value}: {found['n_images']} images, {', '.join(cells)}")
    if "differences" in result:
        lines.append(f"changes to {against['model'] if against else 'the other'}, query by query:")
    for name, (value, low, high, p) in result.get("differences", {}).items():
        scale, unit = (1, "") if name.endswith("/rank") else (100, " points")
        title = (
            name.replace("_", " ")
            .replace("/", ", ")
            .replace("reciprocal rank", "MRR")
            .replace(", rank", ", mean rank")
        )
        lines.append(
            f"  {title}: {scale * value:+.1f}{unit} [{scale * low:+.1f}, {scale * high:+.1f}], p = {p:.2g}"
        )
    return "\n".join(lines)


def _cell(result: dict, name: str) -> str:
    value = result["metrics"].get(name)
    if value is None:
        return ""
    measure = name.rsplit("/", 1)[1]
    percent = measure.startswith(("R@", "recall@", "MRR", "mAP", "nDCG"))
    shown = [
        100 * value if percent else value,
        *(100 * each if percent else each for each in result.get("intervals", {}).get(name, ())),
    ]
    text = f"{shown[0]:.1f}{' %' if percent else ''}"
    return f"{text} [{shown[1]:.1f}, {shown[2]:.1f}]" if len(shown) > 1 else text


def write_json(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")


def queries_file(path: Path) -> Path:
    """What stands beside a result: what each query scored."""
    return path.with_suffix(".queries.npz")


def read_json(path: Path) -> dict:
    """A result that write_json wrote."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a result ({error}); make one with: python -m eval retrieval MODEL --data SHARDS"
            f" --json {path}"
        ) from None
    if not isinstance(result, dict) or not {"model", "metrics"} <= result.keys():
        raise UserError(f"{path}: not a result of python -m eval retrieval --json")
    return result
