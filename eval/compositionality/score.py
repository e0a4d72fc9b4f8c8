"""Compositionality: counting, binding of colors to shapes, spatial relations, and the order of words.

    counting    "six circles": the total area of all shapes is constant in half of the drawings, the area of
                each shape in the other half, so that ink cannot reveal the number in both
    binding     "a red circle and a blue square" against "a blue circle and a red square", with two drawings
    relations   "a circle above a square" against "a square above a circle", with two drawings
    swaps       the user's own captions against themselves with two words swapped

Nothing is downloaded. Captions of a pair have the same words, drawings of a pair the same ink, so a model
that ignores either is at chance. Strict scores of pairs are those of Winoground (Thrush et al. 2022,
arXiv:2204.03162), where a tie is wrong.
"""

from typing import NamedTuple

import numpy as np
import torch

from data_prep.shards import Shards
from eval.compositionality.drawings import Count, Pair, Shape, binding, counting, relations, render
from eval.compositionality.swaps import Swap
from eval.embed import batches, embed_images, embed_texts, fill
from eval.options import Inference
from eval.retrieval.intervals import mean_interval
from eval.retrieval.ranking import TIE, check_finite
from train.model.clip import Clip
from train.world import World


class Drawings(NamedTuple):
    """Attributes:
    pairs: "binding" and "relations".
    """

    counts: list[Count]
    pairs: dict[str, list[Pair]]


def draw(n: int, seed: int) -> Drawings:
    """20 n drawings to count, and 10 n pairs each of binding and relations."""
    return Drawings(
        counting(n, seed), {"binding": binding(10 * n, seed), "relations": relations(10 * n, seed)}
    )


def evaluate_drawings(clip: Clip, drawings: Drawings, world: World, inference: Inference) -> dict:
    """counting by what is constant; binding and relations by kind, and "all" where there are several."""
    counts = drawings.counts
    scores = cosines(
        clip,
        [count.scene for count in counts],
        [count.captions for count in counts],
        [count.captions[count.n - 1] for count in counts],
        world,
        inference,
    )
    result = {"counting": score_counting(scores, counts)}
    for name, pairs in drawings.pairs.items():
        scores = cosines(
            clip,
            [scene for pair in pairs for scene in pair.scenes],
            [pair.captions for pair in pairs for _ in pair.scenes],
            [caption for pair in pairs for caption in pair.captions],
            world,
            inference,
        ).reshape(-1, 2, 2)
        kind_of = np.array([pair.kind for pair in pairs])
        kinds = dict.fromkeys(kind_of.tolist())
        result[name] = {"all": score_pairs(scores)} if len(kinds) > 1 else {}
        result[name] |= {kind: score_pairs(scores[kind_of == kind]) for kind in kinds}
    return result


def score_counting(scores: np.ndarray, drawings: list[Count]) -> dict:
    """For each thing that is constant: accuracy, mean_absolute_error, and confusion float [10, 10], true
    number by predicted number, rows of sum 1.

    Args:
        scores: float [drawings, 10], of each drawing with its ten captions; m captions that tie for first
            count 1/m.
    """
    is_first = scores >= scores.max(1, keepdims=True) - TIE
    predicted = is_first / is_first.sum(1, keepdims=True)
    numbers, constants = (
        np.array([drawing.n for drawing in drawings]),
        [drawing.constant for drawing in drawings],
    )
    result = {}
    for constant in dict.fromkeys(constants):
        chosen = np.array(constants) == constant
        correct = predicted[chosen, numbers[chosen] - 1]
        error = (predicted[chosen] * abs(np.arange(1, 11) - numbers[chosen, None])).sum(1)
        groups = np.arange(chosen.sum())
        result[constant] = {
            "accuracy": mean_interval(correct, groups)._asdict(),
            "mean_absolute_error": mean_interval(error, groups)._asdict(),
            "confusion": [predicted[chosen & (numbers == n)].mean(0).tolist() for n in range(1, 11)],
        }
    return result


def score_pairs(scores: np.ndarray) -> dict:
    """Shares of pairs, each with its interval: text, image and group as in Winoground, and text_accuracy and
    image_accuracy of single comparisons, where a tie counts 1/2.

    Args:
        scores: float [pairs, 2, 2], of drawing i with caption j.
    """
    over_text = np.stack([scores[:, 0, 0] - scores[:, 0, 1], scores[:, 1, 1] - scores[:, 1, 0]], 1)
    over_image = np.stack([scores[:, 0, 0] - scores[:, 1, 0], scores[:, 1, 1] - scores[:, 0, 1]], 1)
    text, image = ((margins > TIE).all(1) for margins in (over_text, over_image))
    values = {
        "text": text,
        "image": image,
        "group": text & image,
        "text_accuracy": wins(over_text).mean(1),
        "image_accuracy": wins(over_image).mean(1),
    }
    return {name: mean_interval(value, np.arange(len(scores)))._asdict() for name, value in values.items()}


def wins(margins: np.ndarray) -> np.ndarray:
    """1 for a positive margin, 1/2 for a tie, 0 for a negative one."""
    return np.where(abs(margins) <= TIE, 0.5, margins > 0)


def evaluate_swaps(clip: Clip, shards: Shards, swaps: list[Swap], world: World, inference: Inference) -> dict:
    """How often an image prefers its own caption to the swapped one; see score_swaps()."""
    numbers = [swap.number for swap in swaps]
    images = embed_images(clip, shards, world, inference)[numbers]
    own = embed_texts(clip, [swap.caption for swap in swaps], world, inference)
    swapped = embed_texts(clip, [swap.swapped for swap in swaps], world, inference)
    return {"n_images": len(shards), **score_swaps(images, own, swapped, shards.groups[numbers])}


def score_swaps(
    image_features: torch.Tensor, own: torch.Tensor, swapped: torch.Tensor, groups: np.ndarray
) -> dict:
    """n, accuracy (how often an image prefers its own caption, a tie as 1/2) with its interval, and tie_rate.

    Args:
        image_features, own, swapped: fp32 [n, d], L2-normed.
        groups: int64 [n].
    """
    margins = ((image_features * own).sum(1) - (image_features * swapped).sum(1)).cpu().numpy()
    return {
        "n": len(margins),
        "accuracy": mean_interval(wins(margins), groups)._asdict(),
        "tie_rate": float((abs(margins) <= TIE).mean()),
    }


def cosines(
    clip: Clip,
    scenes: list[list[Shape]],
    captions: list[list[str]],
    names: list[str],
    world: World,
    inference: Inference,
) -> np.ndarray:
    """Cosines of each drawing with each of its captions: float32 [scenes, captions].

    Args:
        names: the correct caption of each scene, for errors.
    """
    texts = sorted({caption for row in captions for caption in row})
    row_of = {text: row for row, text in enumerate(texts)}
    image_features = embed_scenes(clip, scenes, names, world, inference)
    text_features = embed_texts(clip, texts, world, inference)
    columns = torch.tensor([[row_of[caption] for caption in row] for row in captions])
    return (image_features[:, None] * text_features[columns.to(text_features.device)]).sum(2).cpu().numpy()


def embed_scenes(
    clip: Clip, scenes: list[list[Shape]], names: list[str], world: World, inference: Inference
) -> torch.Tensor:
    """image_features [n, d] of drawings: fp32, L2-normed, all of them on every rank.

    Raises:
        NotFinite: a feature is not finite; the first such drawing is named.
    """
    clip.towers.eval()
    own_batches = batches(len(scenes), inference.batch_size)[world.rank :: world.world_size]
    with torch.inference_mode():
        images = (
            torch.stack([clip.eval_transform(render(scenes[row])) for row in rows]) for rows in own_batches
        )
        features = fill(len(scenes), own_batches, images, clip.towers.image_features, world, "drawings")
    check_finite(features, "image_features", lambda row: f"the drawing of {names[row]!r}")
    return features
