"""Drawn probes of what a model understands: counting, which color on which shape, where, and the order of
words.

    counting    "six circles": half of the pictures hold the area of all shapes together constant, half that of each, so that
                no amount of ink gives the number away in both
    binding     "a red circle and a blue square" against "a blue circle and a red square", and the two pictures
    relations   "a circle above a square" against "a square above a circle", and the two pictures
    swaps       the user's own captions against themselves with two words swapped

Nothing is downloaded. Captions of a pair have the same words, pictures of a pair the same ink: who is blind
in either tower is at chance. Strict scores of pairs are those of Winoground (Thrush et al. 2022,
arXiv:2204.03162), where ties are wrong."""

import hashlib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from data_prep.errors import UserError
from data_prep.shards import Shards
from eval.compositionality.drawings import Count, Shape, binding, counting, relations, render
from eval.compositionality.page import table, write_page
from eval.embed import batches, embed_images, embed_texts, fill, load_for_eval
from eval.options import INFERENCE, Inference
from eval.retrieval.intervals import mean_interval
from eval.retrieval.ranking import TIE, check_finite
from eval.retrieval.score import write_json
from train.model.clip import Clip
from train.world import World, joined_world

_SMALL = (
    "a an and are as at by for from has have in into is it its of off on onto or over that the this to under"
    " up was with"
)
FUNCTION_WORDS = set(_SMALL.split())


def swapped(caption: str, taken: set[str], entropy: bytes) -> str | None:
    """The caption with two neighboring content words exchanged, drawn by `entropy`; None where that gives no
    new caption.

    Args:
        taken: captions that are right for the image, in any case; no swap may be one of them.
    """
    words = [
        word
        for word in re.finditer(r"[^\W_]+(?:['’-][^\W_]+)*", caption)
        if word.group().lower() not in FUNCTION_WORDS
    ]
    swaps = []
    for left, right in itertools.pairwise(words):
        between = caption[left.end() : right.start()]
        swap = caption[: left.start()] + right.group() + between + left.group() + caption[right.end() :]
        if swap.lower() not in {other.lower() for other in taken | {caption}}:
            swaps.append(swap)
    return swaps[int.from_bytes(hashlib.sha256(entropy).digest()[:8], "big") % len(swaps)] if swaps else None


def score_counting(scores: np.ndarray, pictures: list[Count]) -> dict:
    """For each thing held: accuracy, mean absolute error, and the confusion float [10, 10], number by guess,
    rows of sum 1.

    Args:
        scores: float [pictures, 10], of each picture with its ten captions. m captions that lead together
            count 1/m each.
    """
    lead = scores >= scores.max(1, keepdims=True) - TIE
    guesses = lead / lead.sum(1, keepdims=True)
    numbers, result = np.array([picture.n for picture in pictures]), {}
    for held in dict.fromkeys(picture.held for picture in pictures):
        mine = np.array([picture.held == held for picture in pictures])
        right = guesses[mine, numbers[mine] - 1]
        off = (guesses[mine] * abs(np.arange(1, 11) - numbers[mine, None])).sum(1)
        table = [guesses[mine & (numbers == n)].mean(0).tolist() for n in range(1, 11)]
        alone = np.arange(mine.sum())
        errors = mean_interval(off, alone)._asdict()
        result[held] = {
            "accuracy": mean_interval(right, alone)._asdict(),
            "mean_absolute_error": errors,
            "confusion": table,
        }
    return result


def score_pairs(scores: np.ndarray) -> dict:
    """Shares of pairs, each with its interval: text, image and group as Winoground has them, and single
    comparisons, ties half.

    Args:
        scores: float [pairs, 2, 2], of picture i with caption j.
    """
    over_text = np.stack([scores[:, 0, 0] - scores[:, 0, 1], scores[:, 1, 1] - scores[:, 1, 0]], 1)
    over_image = np.stack([scores[:, 0, 0] - scores[:, 1, 0], scores[:, 1, 1] - scores[:, 0, 1]], 1)
    text, image = ((lead > TIE).all(1) for lead in (over_text, over_image))
    values = {"text": text, "image": image, "group": text & image}
    values |= {
        f"{name}_ties_half": half(lead).mean(1) for name, lead in (("text", over_text), ("image", over_image))
    }
    return {name: mean_interval(value, np.arange(len(scores)))._asdict() for name, value in values.items()}


def half(lead: np.ndarray) -> np.ndarray:
    """1 for a lead, 0.5 for a tie, 0 else."""
    return np.where(abs(lead) <= TIE, 0.5, lead > 0)


@dataclass(frozen=True)
class Swap:
    """An image, by number, its own caption, and the same with two words swapped."""

    number: int
    caption: str
    swapped: str


def swaps(shards: Shards, seed: int) -> list[Swap]:
    """One swap for the first caption of every image that has one to give.

    Raises:
        UserError: there is none.
    """
    taken: dict[int, set[str]] = {}
    for number, group in enumerate(shards.groups.tolist()):
        taken.setdefault(group, set()).update(shards.captions(number))
    found = []
    for number, group in enumerate(shards.groups.tolist()):
        for caption in shards.captions(number)[:1]:
            if swap := swapped(caption, taken[group], f"{seed} {shards.key(number)}".encode()):
                found.append(Swap(number, caption, swap))
    if not found:
        raise UserError(
            f"{shards.folder}: no caption of {shards.split} has two words to swap; leave out --data, or use"
            " longer captions"
        )
    return found


def score_swaps(
    image_features: torch.Tensor, own: torch.Tensor, other: torch.Tensor, groups: np.ndarray
) -> dict:
    """How often an image prefers its own caption, ties as half, with its interval, and the share that ties.

    Args:
        image_features, own, other: fp32 [n, d], L2-normed; groups: int64 [n].
    """
    lead = ((image_features * own).sum(1) - (image_features * other).sum(1)).cpu().numpy()
    return {
        "n": len(lead),
        "accuracy": mean_interval(half(lead), groups)._asdict(),
        "tied": float((abs(lead) <= TIE).mean()),
    }


def embed_scenes(
    clip: Clip, scenes: list[list[Shape]], names: list[str], world: World, inference: Inference
) -> torch.Tensor:
    """image_features [n, d] of drawings: fp32, L2-normed, all of them on every rank.

    Raises:
        NotFinite: a feature is not finite; the first such drawing is named.
    """
    clip.towers.eval()
    mine, transform = (
        batches(len(scenes), inference.batch_size)[world.rank :: world.world_size],
        clip.eval_transform,
    )
    with torch.inference_mode():
        images = (torch.stack([transform(render(scenes[at])) for at in rows]) for rows in mine)
        features = fill(len(scenes), mine, images, clip.towers.image_features, world, "drawings")
    check_finite(features, "image_features", lambda row: f"the drawing of {names[row]!r}")
    return features


def scores_of(
    clip: Clip,
    scenes: list[list[Shape]],
    captions: list[list[str]],
    names: list[str],
    world: World,
    inference: Inference,
) -> np.ndarray:
    """Cosines float32 [scenes, captions of each]."""
    texts = sorted({caption for row in captions for caption in row})
    number = {text: at for at, text in enumerate(texts)}
    image_features, text_features = (
        embed_scenes(clip, scenes, names, world, inference),
        embed_texts(clip, texts, world, inference),
    )
    columns = torch.tensor([[number[caption] for caption in row] for row in captions])
    return (image_features[:, None] * text_features[columns.to(text_features.device)]).sum(2).cpu().numpy()


def probes(
    model: Annotated[str, tyro.conf.Positional],
    data: Path | None = None,
    split: str = "val",
    n: int = 10,
    seed: int = 0,
    json: Path | None = None,
    page: Path | None = None,
    inference: Inference = INFERENCE,
) -> None:
    """Counting, color-shape binding and relations on drawings that are made here, and swapped words in your
    own captions.

    Args:
        model: NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder.
        data: Folder of shards, for the swapped words; left out without it.
        split: train, val or test.
        n: Drawings of each number at constant total area, and at constant shape area; 10 n pairs of binding,
            and of relations.
        seed: Of the drawings and of the swaps.
        json: File to write the result to.
        page: HTML file to write: the table, and examples of the drawings.
        inference: How models are run.
    """

    def prepare() -> tuple[Shards | None, list[Swap], Clip]:
        if n < 1:
            raise UserError(f"--n {n}: one drawing or more is wanted")
        shards = Shards(data, split) if data else None
        if shards:
            shards.verify(world.rank, world.world_size)
        return shards, swaps(shards, seed) if shards else [], load_for_eval(model, inference, world)

    with joined_world() as world:
        shards, found, clip = world.all_or_raise(prepare)
        source = {"data": f"{data}, {split}", "data_sha256": shards.fingerprint} if shards else {}
        result = {"model": model, "weights_sha256": clip.fingerprint(), **source, "seed": seed, "n": n}
        pictures, pairs = (
            counting(n, seed),
            {"binding": binding(10 * n, seed), "relations": relations(10 * n, seed)},
        )
        captions = [picture.captions for picture in pictures]
        names = [picture.captions[picture.n - 1] for picture in pictures]
        result["counting"] = score_counting(
            scores_of(clip, [picture.scene for picture in pictures], captions, names, world, inference),
            pictures,
        )
        for name, those in pairs.items():
            scenes, names = (
                [item for pair in those for item in getattr(pair, what)] for what in ("scenes", "captions")
            )
            scores = scores_of(
                clip, scenes, [pair.captions for pair in those for _ in range(2)], names, world, inference
            ).reshape(-1, 2, 2)
            kinds = np.array([pair.kind for pair in those])
            result[name] = {
                kind: score_pairs(scores[kinds == kind]) for kind in dict.fromkeys(kinds.tolist())
            }
            if len(result[name]) > 1:
                result[name] = {"all": score_pairs(scores), **result[name]}
        if shards:
            image_features = embed_images(clip, shards, world, inference)[[swap.number for swap in found]]
            own, other = (
                embed_texts(clip, [getattr(swap, of) for swap in found], world, inference)
                for of in ("caption", "swapped")
            )
            groups = shards.groups[[swap.number for swap in found]]
            result["swaps"] = {"n_images": len(shards), **score_swaps(image_features, own, other, groups)}
        if world.is_first:
            print(table(result))
            if json:
                write_json(json, result)
            if page:
                write_page(page, result, pictures, pairs, found)
                print(f"examples of the drawings: {page}")
