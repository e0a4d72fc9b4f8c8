"""How well captions find their pictures, and pictures their captions: the same function in training and after."""

import json
from pathlib import Path

import numpy as np
import torch

from data_prep.atomic import atomic_file
from data_prep.errors import UserError
from data_prep.shards import Shards
from eval.embed import Embedded, embed
from eval.metrics import KS, Ranks, Relevance, chance, ranks, summarize
from train.model import Clip
from train.world import World

DIRECTIONS = ("image_to_text", "text_to_image")


def evaluate(clip: Clip, shards: Shards, world: World, batch: int = 64, workers: int = 0) -> dict:
    """Retrieval in both directions over one split; see score()."""
    return score(embed(clip, shards, world, batch, workers), shards.groups, world)


def score(embedded: Embedded, groups: np.ndarray, world: World) -> dict:
    """Retrieval in both directions.

    Args:
        groups: int64 [n_images], the group of each image.

    Returns:
        n_images, n_texts, and metrics: DIRECTION/R@1 and so on by group, mean/R@1 of both directions,
        legacy_diagonal/DIRECTION/R@1 by instance (each image with its first caption), chance/DIRECTION/R@1.
    """
    image_features, text_features, captions = embedded.image_features, embedded.text_features, embedded.captions
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


def _legacy(found: Ranks) -> dict[str, float]:
    """As model cards have it: open_clip rounds the median down."""
    values = summarize(found)
    return values | {"median_rank": float(np.floor(values["median_rank"]))}


def table(result: dict, against: dict | None = None) -> str:
    """A result of `python -m eval retrieval` for people; beside it chance, and another result on the same data if given."""
    columns = [against, result] if against else [result]
    widths = [14, 11, *(max(11, len(column["model"]) + 2) for column in columns)]

    def line(*cells: str) -> str:
        return cells[0].ljust(widths[0]) + "".join(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))

    lines = [f"{result['n_images']} images, {result['n_texts']} distinct captions ({result['data']})"]
    lines.append(line("", "chance", *(column["model"] for column in columns)))
    for direction, gallery in zip(DIRECTIONS, ("n_texts", "n_images"), strict=True):
        title = direction.replace("_", " ")
        for prefix, kind in (("", f"any of the group, among {result[gallery]}"), ("legacy_diagonal/", "its own only, as on model cards")):
            lines.append(f"{title}, {kind}")
            for name in (*(f"R@{k}" for k in KS), "mean_rank", "median_rank"):
                guess = "" if prefix else _cell(name, result["metrics"].get(f"chance/{direction}/{name}"))
                values = (_cell(name, column["metrics"].get(f"{prefix}{direction}/{name}")) for column in columns)
                lines.append(line(f"  {name.replace('_', ' ')}", guess, *values))
    ties = " and ".join(f"{result['metrics'][f'{direction}/tied']:.1%} of {direction}" for direction in DIRECTIONS)
    return "\n".join([*lines, f"queries tied with an irrelevant item, which counts against them: {ties}"])


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if name.startswith("R@") else f"{value:.1f}"


def write_json(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")


def read_json(path: Path) -> dict:
    """A result that write_json wrote."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a result ({error}); make one with: python -m eval retrieval MODEL --data SHARDS --json {path}"
        ) from None
    if not isinstance(result, dict) or not {"model", "metrics"} <= result.keys():
        raise UserError(f"{path}: not a result of python -m eval retrieval --json")
    return result
