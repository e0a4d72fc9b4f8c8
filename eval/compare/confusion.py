"""Can a model tell each image's own caption from others: against k random ones, as a heatmap, and hub
captions.

accuracy         share of images whose caption beats k others, drawn by (seed, key): the same for every model
over_all_draws   its expectation over every possible draw, from the number of others that score above it
hubs             captions that rank first for many images of other groups (hubness, Radovanović et al. 2010)
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from data_prep.errors import UserError
from data_prep.shards import Shards
from eval.compare.draws import Column, column_of, draw, drawn_accuracy, expected_accuracy
from eval.embed import embed_images, embed_texts, load_for_eval
from eval.options import Inference
from eval.retrieval.intervals import mean_interval
from eval.retrieval.ranking import TIE
from train.world import World

MAX_HUBS, MAX_HUB_IMAGES = 10, 8
HEATMAP_IMAGES = 12


def read_columns(shards: Shards, names: tuple[str, ...]) -> list[Column]:
    """The captions ("caption") and other columns of a split.

    Raises:
        UserError: a column is in no sample.
    """
    texts_of: dict[str, list[list[str]]] = {name: [] for name in names}
    known = {"caption"}
    for number in range(len(shards)):
        meta = shards.meta(number)
        columns = meta.get("columns", {})
        known |= columns.keys()
        for name, texts in texts_of.items():
            cell = meta["captions"] if name == "caption" else columns.get(name)
            cells = cell if isinstance(cell, list) else [cell]
            texts.append([text for text in cells if isinstance(text, str) and text.strip()])
    for name, texts in texts_of.items():
        if not any(texts):
            raise UserError(
                f"--columns {name}: no text in this column of {shards.folder}, {shards.split}; it can be"
                f" {', '.join(sorted(known))}"
            )
    return [column_of(name, texts, shards.groups) for name, texts in texts_of.items()]


@dataclass(frozen=True)
class Counts:
    """Every image against every text of other groups.

    Attributes:
        above, tied: int64 [n_images], texts of other groups that score above the image's own text, and that
            tie with it.
        best: int64 [n_images], the text that scores highest, own ones included.
        wrong_firsts: float [n_texts], images of other groups that rank the text first; m texts that tie share
            the image, and images without a text are left out.
    """

    above: np.ndarray
    tied: np.ndarray
    best: np.ndarray
    wrong_firsts: np.ndarray


def count(
    image_features: torch.Tensor, text_features: torch.Tensor, column: Column, world: World, tile: int = 256
) -> Counts:
    """Counts over all texts, `tile` images at once; the ranks share the tiles."""
    n, device = len(image_features), image_features.device
    counts = torch.zeros(3, n, dtype=torch.int64, device=device)
    wrong_firsts = torch.zeros(len(text_features), dtype=torch.float64, device=device)
    for start in range(0, n, tile)[world.rank :: world.world_size]:
        rows = slice(start, min(start + tile, n))
        own_of = column.own[rows]
        row = torch.from_numpy(np.repeat(np.arange(len(own_of)), [len(own) for own in own_of])).to(device)
        own = torch.from_numpy(np.concatenate(own_of)).to(device)
        first = torch.from_numpy(column.first[rows]).to(device)
        scores = image_features[rows] @ text_features.T
        own_scores = scores.gather(1, first.clamp(min=0)[:, None])
        best = scores.max(1, keepdim=True)
        is_first = scores >= best.values - TIE
        shares = is_first / is_first.sum(1, keepdim=True).double()
        shares[row, own] = 0
        shares[first < 0] = 0
        wrong_firsts += shares.sum(0)
        scores[row, own] = -torch.inf
        counts[0, rows] = (scores > own_scores + TIE).sum(1)
        counts[1, rows] = ((scores - own_scores).abs() <= TIE).sum(1)
        counts[2, rows] = best.indices[:, 0]
    return Counts(*world.sum(counts).cpu().numpy(), world.sum(wrong_firsts).cpu().numpy())


def heatmap_samples(
    column: Column, keys: list[str], groups: np.ndarray, seed: int, n: int = HEATMAP_IMAGES
) -> list[int]:
    """Up to n images with a text, by (seed, key) alone, no two of one group or with one text."""
    order = sorted(
        np.flatnonzero(column.first >= 0).tolist(),
        key=lambda number: hashlib.sha256(f"{seed} {keys[number]}".encode()).digest(),
    )
    chosen: list[int] = []
    for number in order:
        is_new_group = groups[number] not in groups[chosen]
        is_new_text = not set(column.first[chosen].tolist()) & set(column.own[number].tolist())
        if len(chosen) < n and is_new_group and is_new_text:
            chosen.append(number)
    return chosen


def heatmap(image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: float) -> np.ndarray:
    """Softmax over the texts for each image: float64 [n_images, n_texts].

    Args:
        logit_scale: exponentiated.
    """
    return (logit_scale * (image_features.double() @ text_features.double().T)).softmax(1).cpu().numpy()


@dataclass(frozen=True)
class Questions:
    """What every model is asked, the same for all.

    Attributes:
        drawn: for each column, of draw().
        heatmap_images: numbers; their texts are those of the first column.
    """

    shards: Shards
    columns: list[Column]
    drawn: list[np.ndarray]
    heatmap_images: list[int]


def questions(shards: Shards, columns: list[Column], k: int, seed: int) -> Questions:
    """Draw k wrong texts of each column for each image.

    Raises:
        UserError: there is nothing to draw from.
    """
    if k < 1:
        raise UserError(f"--k {k}: must be at least 1")
    keys = [shards.key(number) for number in range(len(shards))]
    for column in columns:
        if not column.n_wrong.any():
            raise UserError(
                f"{shards.folder}, {shards.split}: every {column.name} belongs to one group, so there"
                " is no wrong one to draw; use a larger split"
            )
    drawn = [draw(column, keys, k, seed) for column in columns]
    return Questions(shards, columns, drawn, heatmap_samples(columns[0], keys, shards.groups, seed))


def ask(model: str, asked: Questions, inference: Inference, world: World) -> dict:
    """Load a model, and answer with it; see answer()."""
    clip = world.all_or_raise(lambda: load_for_eval(model, inference, world))
    image_features = embed_images(clip, asked.shards, world, inference)
    texts = [embed_texts(clip, column.texts, world, inference) for column in asked.columns]
    logit_scale = clip.towers.model.logit_scale.exp().item()
    answers = answer(model, image_features, texts, logit_scale, asked, world)
    return {"weights_sha256": clip.fingerprint(), **answers}


def answer(
    model: str,
    image_features: torch.Tensor,
    texts: list[torch.Tensor],
    logit_scale: float,
    asked: Questions,
    world: World,
) -> dict:
    """One model's part of the result.

    Args:
        image_features: fp32 [n_images, d], L2-normed.
        texts: for each column fp32 [n_texts, d], L2-normed.
        logit_scale: exponentiated.

    Returns:
        model, logit_scale, columns -> accuracy and over_all_draws, each (value, low, high), and of the first
        column heatmap and hubs.
    """
    columns, hubs, groups = {}, [], asked.shards.groups
    for column, text_features, drawn in zip(asked.columns, texts, asked.drawn, strict=True):
        scored = np.flatnonzero(column.n_wrong)
        counts = count(image_features, text_features, column, world)
        accuracy = drawn_accuracy(
            image_features[torch.from_numpy(scored)], text_features, column.first[scored], drawn[scored]
        )
        expected = expected_accuracy(
            counts.above[scored], counts.tied[scored], column.n_wrong[scored], drawn.shape[1]
        )
        columns[column.name] = {
            "accuracy": mean_interval(accuracy, groups[scored])._asdict(),
            "over_all_draws": mean_interval(expected, groups[scored])._asdict(),
        }
        if column is asked.columns[0]:
            hubs = hubs_of(counts, column)
    chosen = torch.from_numpy(asked.columns[0].first[asked.heatmap_images])
    cells = heatmap(image_features[asked.heatmap_images], texts[0][chosen], logit_scale)
    return {
        "model": model,
        "logit_scale": logit_scale,
        "columns": columns,
        "heatmap": cells.tolist(),
        "hubs": hubs,
    }


def hubs_of(counts: Counts, column: Column) -> list[dict]:
    """The texts that rank first for most images of other groups: caption, wrong_firsts, and numbers of some
    images.
    """
    hubs = []
    for text in np.argsort(-counts.wrong_firsts, kind="stable")[:MAX_HUBS].tolist():
        if counts.wrong_firsts[text] > 0:
            candidates = np.flatnonzero((counts.best == text) & (column.first >= 0)).tolist()
            images = [number for number in candidates if text not in column.own[number]]
            hubs.append(
                {
                    "caption": column.texts[text],
                    "wrong_firsts": float(counts.wrong_firsts[text]),
                    "images": images[:MAX_HUB_IMAGES],
                }
            )
    return hubs


def result_of(answers: list[dict], asked: Questions, data: str, k: int, seed: int) -> dict:
    """The result of all models as JSON. Of each column: chance, n_scored images, clipped (images with fewer
    than k wrong texts), and the keys of images without_text, which are not scored.
    """
    columns = {}
    for column in asked.columns:
        n_wrong = column.n_wrong[column.n_wrong > 0]
        columns[column.name] = {
            "n_texts": len(column.texts),
            "n_scored": len(n_wrong),
            "clipped": int((n_wrong < k).sum()),
            "without_text": [
                asked.shards.key(number) for number in np.flatnonzero(column.first < 0).tolist()
            ],
            "chance": float((1 / (np.minimum(k, n_wrong) + 1)).mean()),
        }
    first = asked.columns[0]
    return {
        "data": data,
        "data_sha256": asked.shards.fingerprint,
        "n_images": len(asked.shards),
        "k": k,
        "seed": seed,
        "columns": columns,
        "heatmap": {
            "images": asked.heatmap_images,
            "captions": [first.texts[first.first[number]] for number in asked.heatmap_images],
        },
        "models": answers,
    }
