"""Does an image tell its own caption from others: against k random ones, on a heatmap, and which captions steal images.

    accuracy            share of images whose caption beats k others, drawn by (seed, key), so alike for every model
    over all draws      its mean over every possible draw, from how many of the others score above it
    stolen              images of other groups that rank a caption first

Scores within eval.metrics.TIE are tied, and a tie of m counts as 1/m: a collapsed model has exactly 1/(k+1).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from data_prep.errors import UserError
from data_prep.shards import Shards
from eval.confusion_page import table, write_page
from eval.embed import embed_images, embed_texts
from eval.intervals import mean_interval
from eval.metrics import TIE
from eval.retrieval import write_json
from train.model import Clip, load
from train.order import random_bits
from train.world import World, joined_world

THIEVES, VICTIMS, DRAWN_FLOATS = 10, 8, 1 << 24


@dataclass(frozen=True)
class Column:
    """One column of texts of a split.

    Attributes:
        texts: the distinct texts, sorted, so that a draw does not depend on the order of samples.
        first: int64 [n_images], the text that is each image's first one; -1 where it has none.
        own: for each image the texts of its group, int64, sorted; they are never drawn against it.
    """

    name: str
    texts: list[str]
    first: np.ndarray
    own: list[np.ndarray]

    @property
    def wrong(self) -> np.ndarray:
        """int64 [n_images], texts of other groups only; 0 where the image has no text to compare with."""
        return np.array([len(self.texts) - len(own) if first >= 0 else 0 for first, own in zip(self.first, self.own, strict=True)])


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
            texts.append([text for text in (cell if isinstance(cell, list) else [cell]) if isinstance(text, str) and text.strip()])
    for name, texts in said.items():
        if not any(texts):
            raise UserError(f"{shards.folder}: no text in column {name!r} of {shards.split}; --columns takes {', '.join(sorted(known))}")
    return [column_of(name, texts, shards.groups) for name, texts in said.items()]


def column_of(name: str, texts_of: list[list[str]], groups: np.ndarray) -> Column:
    """A Column from the texts of each image and groups int64 [n_images]."""
    texts = sorted({text for texts in texts_of for text in texts})
    number = {text: at for at, text in enumerate(texts)}
    of_group: dict[int, set[int]] = {}
    for group, mine in zip(groups.tolist(), texts_of, strict=True):
        of_group.setdefault(group, set()).update(number[text] for text in mine)
    arrays = {group: np.array(sorted(members), dtype=np.int64) for group, members in of_group.items()}
    first = np.array([number[mine[0]] if mine else -1 for mine in texts_of])
    return Column(name, texts, first, [arrays[group] for group in groups.tolist()])


def draw(column: Column, keys: list[str], k: int, seed: int) -> np.ndarray:
    """k distinct texts of other groups for each image: int64 [n_images, k], -1 where there are fewer than k.

    Drawn by (seed, key, the set of texts) alone.
    Source: Floyd's sampling without replacement, Bentley and Floyd 1987 (doi:10.1145/30401.315746).
    """
    drawn = np.full((len(keys), k), -1, dtype=np.int64)
    for at, (key, wrong) in enumerate(zip(keys, column.wrong.tolist(), strict=True)):
        wanted = min(k, wrong)
        if not wanted:
            continue
        entropy = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big")
        chosen: dict[int, None] = {}
        for bits, last in zip(random_bits(wanted, seed, entropy).tolist(), range(wrong - wanted, wrong), strict=True):
            place = bits % (last + 1)
            chosen[last if place in chosen else place] = None
        places, own = np.array(list(chosen)), column.own[at]
        drawn[at, :wanted] = places + np.searchsorted(own - np.arange(len(own)), places, side="right")  # steps over the own ones
    return drawn


def drawn_accuracy(image_features: torch.Tensor, text_features: torch.Tensor, first: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """For each image 1 where its text beats the drawn ones, 1/m where it shares the lead with m - 1, else 0.

    Args:
        image_features: fp32 [n, d], L2-normed; text_features [n_texts, d] likewise.
        first: int64 [n]; drawn: int64 [n, k], -1 for none.
    """
    right, others = torch.from_numpy(first).to(text_features.device), torch.from_numpy(drawn).to(text_features.device)
    values = []
    for rows in torch.arange(len(first)).split(max(1, DRAWN_FLOATS // (drawn.shape[1] * image_features.shape[1]))):
        images = image_features[rows]
        ours = (images * text_features[right[rows]]).sum(1, keepdim=True)
        lead = (images[:, None] * text_features[others[rows].clamp(min=0)]).sum(2) - ours
        lead[others[rows] < 0] = -torch.inf
        values.append((lead <= TIE).all(1) / (1.0 + (lead.abs() <= TIE).sum(1).double()))
    return torch.cat(values).cpu().numpy()


@dataclass(frozen=True)
class Found:
    """Every image against every text of other groups.

    Attributes:
        above, tied: int64 [n_images], texts of other groups that score above the image's own, and that tie with it.
        best: int64 [n_images], the text that scores highest, own ones included.
        stolen: float [n_texts], images of other groups that rank the text first; m texts that tie share the image, and images
            without a text are left out.
    """

    above: np.ndarray
    tied: np.ndarray
    best: np.ndarray
    stolen: np.ndarray


def find(image_features: torch.Tensor, text_features: torch.Tensor, column: Column, world: World, tile: int = 256) -> Found:
    """Counts over all texts, `tile` images at once; the ranks share the tiles."""
    n, device = len(image_features), image_features.device
    counts, stolen = (
        torch.zeros(3, n, dtype=torch.int64, device=device),
        torch.zeros(len(text_features), dtype=torch.float64, device=device),
    )
    for start in range(0, n, tile)[world.rank :: world.world_size]:
        rows = range(start, min(start + tile, n))
        row = torch.tensor(np.repeat(np.arange(len(rows)), [len(column.own[at]) for at in rows]), device=device)
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


def expected_accuracy(above: np.ndarray, tied: np.ndarray, wrong: np.ndarray, k: int) -> np.ndarray:
    """drawn_accuracy's mean over all draws of k (of all, where fewer are wrong), exactly: float [n].

    With R of N above, none of them is drawn with probability q(R) = C(N-R, k) / C(N, k). A tie of E is R = G to G + E,
    each as likely, and the sum over these has a closed form as well: sum_R C(N-R, k) = C(N-G+1, k+1) - C(N-G-E, k+1).

    Args:
        above, tied, wrong: int64 [n]: G, E and N.
    """
    k_of = np.minimum(k, wrong)

    def none_drawn(above: np.ndarray) -> np.ndarray:
        chance = np.ones(len(above))
        for at in range(int(k_of.max(initial=0))):  # factors within 0 and 1: nothing overflows
            chance *= np.where(at < k_of, np.clip(wrong - above - at, 0, None) / np.maximum(wrong - at, 1), 1)
        return chance

    high = (wrong - above + 1) * none_drawn(above)
    low = np.clip(wrong - above - tied - k_of, 0, None) * none_drawn(above + tied)
    return (high - low) / ((k_of + 1) * (tied + 1))


def heatmap_samples(column: Column, keys: list[str], groups: np.ndarray, seed: int, n: int = 12) -> list[int]:
    """Up to n images with a text, by (seed, key) alone, no two of one group or with one text."""
    order = sorted(np.flatnonzero(column.first >= 0).tolist(), key=lambda at: hashlib.sha256(f"{seed} {keys[at]}".encode()).digest())
    chosen: list[int] = []
    for at in order:
        if len(chosen) < n and groups[at] not in groups[chosen] and not set(column.first[chosen].tolist()) & set(column.own[at].tolist()):
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
                f"{shards.folder}: every {column.name} of {shards.split} is of one group, so there is none to draw; use a larger split"
            )
    if k < 1:
        raise UserError(f"--k {k}: one wrong caption or more is wanted")
    return Questions(
        shards, columns, [draw(column, keys, k, seed) for column in columns], heatmap_samples(columns[0], keys, shards.groups, seed)
    )


def answer(model: str, image_features: torch.Tensor, texts: list[torch.Tensor], scale: float, asked: Questions, world: World) -> dict:
    """One model's part of the result.

    Args:
        image_features: fp32 [n_images, d], L2-normed; texts: for each column [n_texts, d] likewise.
        scale: exp(logit_scale).

    Returns:
        model, logit_scale (exponentiated), columns -> accuracy and over_all_draws, each (value, low, high), and of the first
        column the heatmap, and thieves: caption, how many images it has stolen, and the numbers of some that rank it first.
    """
    scores, thieves, shards = {}, [], asked.shards
    for column, text_features, drawn in zip(asked.columns, texts, asked.drawn, strict=True):
        scored = np.flatnonzero(column.wrong)
        found = find(image_features, text_features, column, world)
        values = drawn_accuracy(image_features[torch.from_numpy(scored)], text_features, column.first[scored], drawn[scored])
        means = expected_accuracy(found.above[scored], found.tied[scored], column.wrong[scored], drawn.shape[1])
        intervals = {
            "accuracy": mean_interval(values, shards.groups[scored]),
            "over_all_draws": mean_interval(means, shards.groups[scored]),
        }
        scores[column.name] = {name: interval._asdict() for name, interval in intervals.items()}
        if column is asked.columns[0]:
            for text in np.argsort(-found.stolen, kind="stable")[:THIEVES].tolist():
                victims = [at for at in np.flatnonzero((found.best == text) & (column.first >= 0)).tolist() if text not in column.own[at]]
                if found.stolen[text] > 0:
                    thieves.append({"caption": column.texts[text], "stolen": float(found.stolen[text]), "images": victims[:VICTIMS]})
    chosen = torch.from_numpy(asked.columns[0].first[asked.shown])
    cells = heatmap(image_features[asked.shown], texts[0][chosen], scale)
    return {"model": model, "logit_scale": scale, "columns": scores, "heatmap": cells.tolist(), "thieves": thieves}


def confusion(
    models: Annotated[tuple[str, ...], tyro.conf.Positional],
    data: Path,
    split: str = "val",
    k: int = 9,
    columns: tuple[str, ...] = ("caption",),
    seed: int = 0,
    json: Path | None = None,
    page: Path | None = None,
    batch: int = 64,
    workers: int = 2,
    precision: Literal["bf16", "fp32"] = "fp32",
) -> None:
    """Accuracy of each image's caption against k random captions of other groups, and the captions that steal most images.

    Args:
        models: Each NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder.
        data: Folder of shards.
        split: train, val or test.
        k: Wrong captions for each image.
        columns: Columns to take the texts from: caption, or another column of the data that was kept by data_prep.
        seed: Of the draw, which is the same for all models.
        json: File to write the result to.
        page: HTML file to write: the table, softmax heatmaps on one scale, and the images that captions steal.
        batch: Images embedded at once.
        workers: Processes that read images; 0 reads them in this one.
        precision: Of the models; the features are compared in fp32 always.
    """

    def prepare() -> tuple[Questions, list[Clip]]:
        if not models:
            raise UserError("python -m eval confusion: no MODEL given; name one or more")
        shards = Shards(data, split)
        shards.verify(world.rank, world.world_size)
        return questions(shards, read_columns(shards, columns), k, seed), [load(model) for model in models]

    with joined_world() as world:
        asked, clips = world.together(prepare)
        answers = []
        for model, clip in zip(models, clips, strict=True):
            clip.towers.bf16 = precision == "bf16"
            clip.towers.to(world.device)
            image_features = embed_images(clip, asked.shards, world, batch, workers)
            texts = [embed_texts(clip, column.texts, world, batch) for column in asked.columns]
            found = answer(model, image_features, texts, clip.towers.model.logit_scale.exp().item(), asked, world)
            answers.append({"weights_sha256": clip.fingerprint(), **found})
            clip.towers.cpu()
        result = result_of(answers, asked, f"{data}, {split}", k, seed)
        if world.is_first:
            print(table(result))
            if json:
                write_json(json, result)
            if page:
                write_page(page, result, asked.shards)
                print(f"heatmaps, and images that captions steal: {page}")


def result_of(answers: list[dict], asked: Questions, data: str, k: int, seed: int) -> dict:
    """The whole result, with chance and counts for each column: n_scored of n_images, and clipped (fewer than k others)."""
    columns = {}
    for column in asked.columns:
        wrong = column.wrong[column.wrong > 0]
        chance, clipped = float((1 / (np.minimum(k, wrong) + 1)).mean()), int((wrong < k).sum())
        columns[column.name] = {"n_texts": len(column.texts), "n_scored": len(wrong), "clipped": clipped, "chance": chance}
    shown = {"images": asked.shown, "captions": [asked.columns[0].texts[asked.columns[0].first[at]] for at in asked.shown]}
    common = {"data": data, "data_sha256": asked.shards.fingerprint, "n_images": len(asked.shards), "k": k, "seed": seed}
    return {**common, "columns": columns, "heatmap": shown, "models": answers}
