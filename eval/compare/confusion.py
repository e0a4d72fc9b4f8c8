"""Does an image tell its own caption from others: against k random ones, on a heatmap, and which captions
steal images.

accuracy            share of images whose caption beats k others, drawn by (seed, key), so alike for every model
over all draws      its mean over every possible draw, from how many of the others score above it
stolen              images of other groups that rank a caption first
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from data_prep.errors import UserError
from data_prep.shards import Shards
from eval.compare.confusion_page import table, write_page
from eval.compare.draws import Column, column_of, draw, drawn_accuracy, expected_accuracy
from eval.embed import embed_images, embed_texts, load_for_eval
from eval.options import INFERENCE, Inference
from eval.retrieval.intervals import mean_interval
from eval.retrieval.ranking import TIE
from eval.retrieval.score import write_json
from train.world import World, joined_world

THIEVES, VICTIMS = 10, 8


def read_columns(shards: Shards, names: tuple[str, ...]) -> list[Column]:
    """The captions ("caption") and other columns of a split.

    Raises:
        UserError: a column is in no sample.
    """
    said: dict[str, list[list[str]]] = {name: [] for name in names}
    known = {"caption"}
    for number in range(len(shards)):
        meta = shards.meta(number)
        columns = meta.get("columns", {})
        known |= columns.keys()
        for name, texts in said.items():
            cell = meta["captions"] if name == "caption" else columns.get(name)
            texts.append(
                [
                    text
                    for text in (cell if isinstance(cell, list) else [cell])
                    if isinstance(text, str) and text.strip()
                ]
            )
    for name, texts in said.items():
        if not any(texts):
            raise UserError(
                f"{shards.folder}: no text in column {name!r} of {shards.split}; --columns takes"
                f" {', '.join(sorted(known))}"
            )
    return [column_of(name, texts, shards.groups) for name, texts in said.items()]


@dataclass(frozen=True)
class Found:
    """Every image against every text of other groups.

    Attributes:
        above, tied: int64 [n_images], texts of other groups that score above the image's own, and that tie
            with it.
        best: int64 [n_images], the text that scores highest, own ones included.
        stolen: float [n_texts], images of other groups that rank the text first; m texts that tie share the
            image, and images without a text are left out.
    """

    above: np.ndarray
    tied: np.ndarray
    best: np.ndarray
    stolen: np.ndarray


def find(
    image_features: torch.Tensor, text_features: torch.Tensor, column: Column, world: World, tile: int = 256
) -> Found:
    """Counts over all texts, `tile` images at once; the ranks share the tiles."""
    n, device = len(image_features), image_features.device
    counts, stolen = (
        torch.zeros(3, n, dtype=torch.int64, device=device),
        torch.zeros(len(text_features), dtype=torch.float64, device=device),
    )
    for start in range(0, n, tile)[world.rank :: world.world_size]:
        rows = range(start, min(start + tile, n))
        row = torch.tensor(
            np.repeat(np.arange(len(rows)), [len(column.own[at]) for at in rows]), device=device
        )
        own = torch.from_numpy(np.concatenate([column.own[at] for at in rows])).to(device)
        first = torch.from_numpy(column.first[rows.start : rows.stop]).clamp(min=0).to(device)
        scores = image_features[rows.start : rows.stop] @ text_features.T
        ours, top = scores.gather(1, first[:, None]), scores.max(1, keepdim=True)
        leads = scores >= top.values - TIE
        shares = leads / leads.sum(1, keepdim=True).double()
        shares[row, own] = 0
        shares[torch.from_numpy(column.first[rows.start : rows.stop] < 0).to(device)] = 0
        stolen += shares.sum(0)
        scores[row, own] = -torch.inf
        counts[0, rows.start : rows.stop] = (scores > ours + TIE).sum(1)
        counts[1, rows.start : rows.stop] = ((scores - ours).abs() <= TIE).sum(1)
        counts[2, rows.start : rows.stop] = top.indices[:, 0]
    return Found(*world.sum(counts).cpu().numpy(), world.sum(stolen).cpu().numpy())


def heatmap_samples(column: Column, keys: list[str], groups: np.ndarray, seed: int, n: int = 12) -> list[int]:
    """Up to n images with a text, by (seed, key) alone, no two of one group or with one text."""
    order = sorted(
        np.flatnonzero(column.first >= 0).tolist(),
        key=lambda at: hashlib.sha256(f"{seed} {keys[at]}".encode()).digest(),
    )
    chosen: list[int] = []
    for at in order:
        if (
            len(chosen) < n
            and groups[at] not in groups[chosen]
            and not set(column.first[chosen].tolist()) & set(column.own[at].tolist())
        ):
            chosen.append(at)
    return chosen


def heatmap(image_features: torch.Tensor, text_features: torch.Tensor, scale: float) -> np.ndarray:
    """Softmax over the texts for each image: float64 [n_images, n_texts]; `scale` is exp(logit_scale)."""
    return (scale * (image_features.double() @ text_features.double().T)).softmax(1).cpu().numpy()


@dataclass(frozen=True)
class Questions:
    """What every model is asked, the same for all.

    Attributes:
        drawn: for each column, of draw().
        shown: images of the heatmap, with the first column's texts.
    """

    shards: Shards
    columns: list[Column]
    drawn: list[np.ndarray]
    shown: list[int]


def questions(shards: Shards, columns: list[Column], k: int, seed: int) -> Questions:
    """Raises UserError where there is nothing to draw from."""
    keys = [shards.key(at) for at in range(len(shards))]
    for column in columns:
        if not column.wrong.any():
            raise UserError(
                f"{shards.folder}: every {column.name} of {shards.split} is of one group, so there is none to"
                " draw; use a larger split"
            )
    if k < 1:
        raise UserError(f"--k {k}: one wrong caption or more is wanted")
    return Questions(
        shards,
        columns,
        [draw(column, keys, k, seed) for column in columns],
        heatmap_samples(columns[0], keys, shards.groups, seed),
    )


def answer(
    model: str,
    image_features: torch.Tensor,
    texts: list[torch.Tensor],
    scale: float,
    asked: Questions,
    world: World,
) -> dict:
    """One model's part of the result.

    Args:
        image_features: fp32 [n_images, d], L2-normed; texts: for each column [n_texts, d] likewise.
        scale: exp(logit_scale).

    Returns:
        model, logit_scale (exponentiated), columns -> accuracy and over_all_draws, each (value, low, high),
        and of the first
        column the heatmap, and thieves: caption, how many images it has stolen, and the numbers of some that
            rank it first.
    """
    scores, thieves, shards = {}, [], asked.shards
    for column, text_features, drawn in zip(asked.columns, texts, asked.drawn, strict=True):
        scored = np.flatnonzero(column.wrong)
        found = find(image_features, text_features, column, world)
        values = drawn_accuracy(
            image_features[torch.from_numpy(scored)], text_features, column.first[scored], drawn[scored]
        )
        means = expected_accuracy(
            found.above[scored], found.tied[scored], column.wrong[scored], drawn.shape[1]
        )
        intervals = {
            "accuracy": mean_interval(values, shards.groups[scored]),
            "over_all_draws": mean_interval(means, shards.groups[scored]),
        }
        scores[column.name] = {name: interval._asdict() for name, interval in intervals.items()}
        if column is asked.columns[0]:
            for text in np.argsort(-found.stolen, kind="stable")[:THIEVES].tolist():
                victims = [
                    at
                    for at in np.flatnonzero((found.best == text) & (column.first >= 0)).tolist()
                    if text not in column.own[at]
                ]
                if found.stolen[text] > 0:
                    thieves.append(
                        {
                            "caption": column.texts[text],
                            "stolen": float(found.stolen[text]),
                            "images": victims[:VICTIMS],
                        }
                    )
    chosen = torch.from_numpy(asked.columns[0].first[asked.shown])
    cells = heatmap(image_features[asked.shown], texts[0][chosen], scale)
    return {
        "model": model,
        "logit_scale": scale,
        "columns": scores,
        "heatmap": cells.tolist(),
        "thieves": thieves,
    }


def confusion(
    models: Annotated[tuple[str, ...], tyro.conf.Positional],
    data: Path,
    split: str = "val",
    k: int = 9,
    columns: tuple[str, ...] = ("caption",),
    seed: int = 0,
    json: Path | None = None,
    page: Path | None = None,
    inference: Inference = INFERENCE,
) -> None:
    """Accuracy of each image's caption against k random captions of other groups, and the captions that steal
    most images.

    Args:
        models: Each NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder.
        data: Folder of shards.
        split: train, val or test.
        k: Wrong captions for each image.
        columns: Columns to take the texts from: caption, or another column of the data that was kept by
            data_prep.
        seed: Of the draw, which is the same for all models.
        json: File to write the result to.
        page: HTML file to write: the table, softmax heatmaps on one scale, and the images that captions
            steal.
        inference: How models are run.
    """

    def prepare() -> Questions:
        if not models:
            raise UserError("python -m eval confusion: no MODEL given; name one or more")
        shards = Shards(data, split)
        shards.verify(world.rank, world.world_size)
        return questions(shards, read_columns(shards, columns), k, seed)

    with joined_world() as world:
        asked = world.all_or_raise(prepare)
        answers = []
        for model in models:
            clip = world.all_or_raise(lambda model=model: load_for_eval(model, inference, world))
            image_features = embed_images(clip, asked.shards, world, inference)
            texts = [embed_texts(clip, column.texts, world, inference) for column in asked.columns]
            found = answer(
                model, image_features, texts, clip.towers.model.logit_scale.exp().item(), asked, world
            )
            answers.append({"weights_sha256": clip.fingerprint(), **found})
        result = result_of(answers, asked, f"{data}, {split}", k, seed)
        if world.is_first:
            print(table(result))
            if json:
                write_json(json, result)
            if page:
                write_page(page, result, asked.shards)
                print(f"heatmaps, and images that captions steal: {page}")


def result_of(answers: list[dict], asked: Questions, data: str, k: int, seed: int) -> dict:
    """The whole result, with chance and counts for each column: n_scored of n_images, clipped (fewer than k
    others), and the keys of images without_text, which are not scored."""
    columns = {}
    for column in asked.columns:
        wrong = column.wrong[column.wrong > 0]
        chance, clipped = float((1 / (np.minimum(k, wrong) + 1)).mean()), int((wrong < k).sum())
        without = [asked.shards.key(at) for at in np.flatnonzero(column.first < 0).tolist()]
        counts = {
            "n_texts": len(column.texts),
            "n_scored": len(wrong),
            "clipped": clipped,
            "without_text": without,
        }
        columns[column.name] = {**counts, "chance": chance}
    shown = {
        "images": asked.shown,
        "captions": [asked.columns[0].texts[asked.columns[0].first[at]] for at in asked.shown],
    }
    common = {
        "data": data,
        "data_sha256": asked.shards.fingerprint,
        "n_images": len(asked.shards),
        "k": k,
        "seed": seed,
    }
    return {**common, "columns": columns, "heatmap": shown, "models": answers}
