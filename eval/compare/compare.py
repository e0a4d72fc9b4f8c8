"""A model beside the one it came from: what got better, what got worse, and what was forgotten.

each model -> embed -> examine   -> intervals, paired differences, calibration, drift, the largest moves
                    -> answer    -> its captions among others, heatmaps
           -> labelled pictures  -> zero-shot classification
mixtures of the first and the last model's weights -> R@1 on the data, and on a control set
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from data_prep.atomic import atomic_folder
from data_prep.errors import UserError
from data_prep.shards import Shards
from eval.classify.labelled import Labelled, read_labelled
from eval.classify.templates import read_templates
from eval.classify.zeroshot import Classified, evaluate
from eval.compare.confusion import Questions, answer, questions, read_columns, result_of
from eval.compare.page import markdown, write_page
from eval.compare.wise_ft import mix
from eval.embed import Embedded, embed, load_for_eval
from eval.options import INFERENCE, Inference
from eval.retrieval.ranking import TIE, Relevance
from eval.retrieval.score import Queries, differences, examine, score, write_json
from train.model.clip import Clip
from train.world import World, joined_world

BINS, TILE_ROWS, MOVES = 15, 256, 12
K, SEED = 9, 0  # of the captions that each image's own is asked against


@dataclass(frozen=True)
class Judged:
    """One model on one split."""

    name: str
    result: dict
    queries: Queries
    embedded: Embedded
    classified: Classified | None = None


def compare(
    models: Annotated[tuple[str, ...], tyro.conf.Positional],
    data: Path,
    split: str = "test",
    control: Path | None = None,
    control_split: str = "test",
    labelled: Path | None = None,
    labelled_split: str = "",
    label_column: str = "label",
    templates: str = "simple",
    interpolate: tuple[float, ...] = (),
    save: float | None = None,
    out: Path = Path("comparison"),
    inference: Inference = INFERENCE,
) -> None:
    """Several models on the same data: a page, a Markdown table, JSON and pictures; differences are to the
    first model.

    Args:
        models: The base model first, then those that were tuned from it: as in retrieval.
        data: Folder of shards.
        split: train, val or test.
        control: Shards of something general, to see what was forgotten.
        control_split: Of the control set.
        labelled: Pictures with labels to classify as well, of any kind that zeroshot reads.
        labelled_split: Of the pictures with labels, where they have splits.
        label_column: Of a CSV, Parquet or shards.
        templates: Sentences on class names, as in zeroshot.
        interpolate: Shares of the last model's weights in mixtures with the first's, like 0 0.2 0.4 0.6 0.8 1
            (WiSE-FT).
        save: Write the mixture with this share as a model, to OUT/mixture; it loads as local-dir:OUT/mixture.
        out: Folder for compare.html, compare.md, compare.json, and the page's drawings as PNG.
        inference: How models are run.
    """
    if len(models) < 2:
        raise UserError("two models or more are wanted: the base first, then those that were tuned from it")
    if any(not 0 <= share <= 1 for share in (*interpolate, 0 if save is None else save)):
        raise UserError("--interpolate and --save take shares from 0 to 1")
    with joined_world() as world:

        def prepare() -> tuple[Shards, Shards | None, Questions, Labelled | None]:
            found = [Shards(data, split), Shards(control, control_split) if control else None]
            for shards in filter(None, found):
                shards.verify(world.rank, world.world_size)
            asked = questions(found[0], read_columns(found[0], ("caption",)), K, SEED)
            return (
                found[0],
                found[1],
                asked,
                read_labelled(labelled, labelled_split, label_column=label_column) if labelled else None,
            )

        shards, others, asked, pictures = world.all_or_raise(prepare)
        judged, forgotten, answers = [], [], []
        for name in models:
            clip = world.all_or_raise(lambda name=name: load_for_eval(name, inference, world))
            one = judge(name, clip, shards, world, inference)
            answers.append(_answer(one, clip, asked, world))
            if pictures:
                found = evaluate(
                    clip, pictures, pictures.classes, read_templates(templates), world, inference
                )
                one = dataclasses.replace(one, classified=found)
            judged.append(one)
            if others:
                forgotten.append(judge(name, clip, others, world, inference))
        result = {"data": f"{data}, {split}", "data_sha256": shards.fingerprint, **beside(judged)}
        result["templates"] = templates
        result["confusion"] = result_of(answers, asked, f"{data}, {split}", K, SEED)
        for model, found in zip(result["models"], answers, strict=True):
            model["own_caption"] = found["columns"]["caption"]["over_all_draws"]
        if others:
            result["control"] = {
                "data": f"{control}, {control_split}",
                "data_sha256": others.fingerprint,
                **beside(forgotten),
            }
        if interpolate or save is not None:
            ends = [
                world.all_or_raise(lambda name=name: load_for_eval(name, inference, world))
                for name in (models[0], models[-1])
            ]
            result["mixtures"] = [
                _mixture(mix(*ends, share), share, shards, others, world, inference) for share in interpolate
            ]
        if world.is_first:
            out.mkdir(parents=True, exist_ok=True)
            if save is not None:
                with atomic_folder(out / "mixture") as folder:
                    mix(*ends, save).save(folder)
                result["saved"] = f"local-dir:{out / 'mixture'}"
            write_json(out / "compare.json", result)
            (out / "compare.md").write_text(markdown(result), encoding="utf-8")
            write_page(out / "compare.html", result, moves(judged[0], judged[-1]), shards)
            print(markdown(result))
            print(f"look at {out / 'compare.html'}")


def judge(name: str, clip: Clip, shards: Shards, world: World, inference: Inference) -> Judged:
    """One model's figures on one split, with its calibration."""
    embedded = embed(clip, shards, world, inference)
    found, queries = examine(embedded, shards.groups, world)
    relevance = Relevance(shards.groups, embedded.captions.text_of, embedded.captions.group_of)
    found["metrics"]["calibration_error"] = calibration_error(
        embedded, relevance, clip.towers.model.logit_scale.exp().item()
    )
    return Judged(name, {"model": name, "weights_sha256": clip.fingerprint(), **found}, queries, embedded)


def _answer(one: Judged, clip: Clip, asked: Questions, world: World) -> dict:
    """eval.compare.confusion's, from features that are there already."""
    number = {text: at for at, text in enumerate(one.embedded.captions.texts)}
    texts = [one.embedded.text_features[[number[text] for text in column.texts]] for column in asked.columns]
    return answer(
        one.name, one.embedded.image_features, texts, clip.towers.model.logit_scale.exp().item(), asked, world
    )


def calibration_error(embedded: Embedded, relevance: Relevance, logit_scale: float) -> float:
    """Expected calibration error of image_to_text, in [0, 1]: how far the model's own probability of its
    first text is from its being right, over 15 equal bins (Naeini et al. 2015, Guo et al. 2017,
    arXiv:1706.04599).

    The probability is softmax(logit_scale * cosine) over the texts; texts that tie for the first place share
    the hit."""
    confidence, right = [], []
    for start in range(0, len(embedded.image_features), TILE_ROWS):
        scores = embedded.image_features[start : start + TILE_ROWS] @ embedded.text_features.T
        first = scores >= scores.max(1, keepdim=True).values - TIE
        rows, columns = relevance.pairs(start, start + len(scores))
        hits = torch.zeros_like(scores).index_put_(
            (rows.to(scores.device), columns.to(scores.device)), torch.ones(()).to(scores.device)
        )
        confidence.append((logit_scale * scores).softmax(1).max(1).values.cpu())
        right.append(((hits * first).sum(1) / first.sum(1)).cpu())
    sure, hit = torch.cat(confidence).double().numpy(), torch.cat(right).double().numpy()
    at = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = np.abs(np.bincount(at, sure, BINS) - np.bincount(at, hit, BINS))
    return float(gaps.sum() / len(sure))


def beside(judged: list[Judged]) -> dict:
    """The models' results, each with its differences to the first, and how far its features moved."""
    base, models = judged[0], []
    for one in judged:
        more = {}
        if one.classified:
            more["zeroshot"] = one.classified.result
        if one.classified and one is not base:
            more["zeroshot"] = {
                **one.classified.result,
                "difference": list(one.classified.difference(base.classified)),
            }
        if one is not base:
            more["differences"] = differences(base.queries, one.queries)
            more["drift"] = drift(base.embedded, one.embedded)
        models.append({**one.result, **more})
    return {"n_images": base.result["n_images"], "n_texts": base.result["n_texts"], "models": models}


def drift(first: Embedded, second: Embedded) -> dict[str, float] | None:
    """Mean cosine of each image's (text's) features in the two models; None where their widths differ, and it
    means nothing.
    """
    if first.image_features.shape != second.image_features.shape:
        return None
    pairs = {
        "image": (first.image_features, second.image_features),
        "text": (first.text_features, second.text_features),
    }
    return {f"{name}_cosine": float((a * b).sum(1).mean()) for name, (a, b) in pairs.items()}


def _mixture(
    clip: Clip, share: float, shards: Shards, others: Shards | None, world: World, inference: Inference
) -> dict:
    found = {
        "alpha": share,
        "mean/R@1": score(embed(clip, shards, world, inference), shards.groups, world)["metrics"]["mean/R@1"],
    }
    if others:
        found["retention/mean/R@1"] = score(embed(clip, others, world, inference), others.groups, world)[
            "metrics"
        ]["mean/R@1"]
    return found


def moves(first: Judged, second: Judged) -> dict[str, list[dict]]:
    """ "better" and "worse" -> the captions whose first right picture moved most, by the logarithm of its
    rank.
    """
    before, after = (one.queries.values.get("text_to_image/rank") for one in (first, second))
    if before is None or after is None:
        return {"better": [], "worse": []}
    captions = first.embedded.captions
    right = captions.first_image()
    gain = np.log(before) - np.log(after)
    order = np.argsort(-gain, kind="stable")
    found = {}
    for name, chosen in (("better", order[:MOVES]), ("worse", order[::-1][:MOVES])):
        found[name] = [
            {
                "caption": captions.texts[text],
                "image": int(right[text]),
                "found": int((second.embedded.image_features @ second.embedded.text_features[text]).argmax()),
                "before": float(before[text]),
                "after": float(after[text]),
            }
            for text in chosen.tolist()
            if (gain[text] > 0) == (name == "better") and gain[text] != 0
        ]
    return found
