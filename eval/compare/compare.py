"""A model beside the one that it was fine-tuned from: what got better, what got worse, what was forgotten.

each model -> embed -> evaluate_full   intervals, paired differences, calibration, drift, the largest changes
                    -> answer          its captions among others, heatmaps
           -> labelled images          zero-shot classification
WiSE-FT of the first and the last model -> R@1 on the data, and on a retention set
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from data_prep.atomic import atomic_folder, write_json
from data_prep.shards import Shards
from eval.classify.features import split_of
from eval.classify.labelled import Labelled, read_labelled
from eval.classify.templates import read_names
from eval.classify.zeroshot import Classified
from eval.classify.zeroshot import evaluate as classify
from eval.compare import confusion
from eval.compare.confusion import Questions, answer, questions, read_columns
from eval.compare.page import Change, comparison_markdown, write_comparison_page
from eval.compare.wise_ft import mix
from eval.embed import Embedded, embed, load_for_eval, open_shards
from eval.options import Inference, LabelledTable
from eval.retrieval.ranking import TIE, Relevance
from eval.retrieval.score import QueryScores, differences, evaluate, evaluate_full
from train.model.clip import Clip
from train.world import World

BINS, TILE_ROWS, MAX_CHANGES = 15, 256, 12
K, SEED = 9, 0  # of the captions that each image's own is compared with


@dataclass(frozen=True)
class Inputs:
    """What all models are evaluated on.

    Attributes:
        questions: each image's own caption against others.
        templates: of class names, for `labelled`.
    """

    shards: Shards
    retention: Shards | None
    labelled: Labelled | None
    questions: Questions
    templates: list[Callable[[str], str]]


@dataclass(frozen=True)
class Evaluated:
    """One model's figures and features.

    Attributes:
        result: with "model", as JSON has it.
        answers: of eval.compare.confusion.
        retention: the same model on the retention set.
    """

    result: dict
    queries: QueryScores
    embedded: Embedded
    answers: dict | None = None
    classified: Classified | None = None
    retention: "Evaluated | None" = None


def read_inputs(
    data: tuple[Path, str],
    retention: tuple[Path | None, str],
    labelled: tuple[str | None, str, LabelledTable],
    templates: list[Callable[[str], str]],
    world: World,
) -> Inputs:
    """Args:
    data, retention: folder of shards and split.
    labelled: data, split and how a table is read.
    """
    shards = open_shards(*data, world)
    place, split, table = labelled
    return Inputs(
        shards,
        open_shards(*retention, world) if retention[0] else None,
        read_labelled(place, split_of(place, split), **asdict(table)) if place else None,
        questions(shards, read_columns(shards, ("caption",)), K, SEED),
        templates,
    )


def evaluate_all(
    models: tuple[str, ...], inputs: Inputs, inference: Inference, world: World
) -> list[Evaluated]:
    """Load one model after another, and evaluate it on all inputs."""
    evaluated = []
    for name in models:
        clip = world.all_or_raise(lambda name=name: load_for_eval(name, inference, world))
        result, queries, embedded = evaluate_model(name, clip, inputs.shards, world, inference)
        classified = retention = None
        if labelled := inputs.labelled:
            names = read_names("", labelled.classes)
            classified = classify(clip, labelled, names, inputs.templates, world, inference)
        if inputs.retention:
            retention = Evaluated(*evaluate_model(name, clip, inputs.retention, world, inference))
        answers = _answers(name, clip, embedded, inputs.questions, world)
        evaluated.append(Evaluated(result, queries, embedded, answers, classified, retention))
    return evaluated


def evaluate_model(
    name: str, clip: Clip, shards: Shards, world: World, inference: Inference
) -> tuple[dict, QueryScores, Embedded]:
    """One model's figures on one split with its calibration, what its queries score, and its features."""
    embedded = embed(clip, shards, world, inference)
    figures, queries = evaluate_full(embedded, shards.groups, world)
    relevance = Relevance(shards.groups, embedded.captions.text_of, embedded.captions.group_of)
    logit_scale = clip.towers.model.logit_scale.exp().item()
    figures["metrics"]["calibration_error"] = calibration_error(embedded, relevance, logit_scale)
    return {"model": name, "weights_sha256": clip.fingerprint(), **figures}, queries, embedded


def _answers(name: str, clip: Clip, embedded: Embedded, asked: Questions, world: World) -> dict:
    """Those of eval.compare.confusion, from features that were computed already."""
    row_of = {text: row for row, text in enumerate(embedded.captions.texts)}
    texts = [embedded.text_features[[row_of[text] for text in column.texts]] for column in asked.columns]
    logit_scale = clip.towers.model.logit_scale.exp().item()
    return answer(name, embedded.image_features, texts, logit_scale, asked, world)


def calibration_error(embedded: Embedded, relevance: Relevance, logit_scale: float) -> float:
    """Expected calibration error (ECE) of image_to_text, in [0, 1], over 15 equal bins.

    The confidence is the softmax of logit_scale * cosine over the texts, at the first text; it is correct if
    that text is relevant. Texts that tie for the first rank share the hit.

    Source: Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599.
    """
    confidences, hits = [], []
    for start in range(0, len(embedded.image_features), TILE_ROWS):
        scores = embedded.image_features[start : start + TILE_ROWS] @ embedded.text_features.T
        is_first = scores >= scores.max(1, keepdim=True).values - TIE
        rows, columns = (index.to(scores.device) for index in relevance.pairs(start, start + len(scores)))
        is_relevant = torch.zeros_like(scores)
        is_relevant[rows, columns] = 1
        confidences.append((logit_scale * scores).softmax(1).max(1).values.cpu())
        hits.append(((is_relevant * is_first).sum(1) / is_first.sum(1)).cpu())
    confidence, hit = torch.cat(confidences).double().numpy(), torch.cat(hits).double().numpy()
    bin_of = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.abs(np.bincount(bin_of, confidence, BINS) - np.bincount(bin_of, hit, BINS))
    return float(gaps.sum() / len(confidence))


def result_of(evaluated: list[Evaluated], inputs: Inputs, templates: str) -> dict:
    """The comparison as JSON: of each model its figures, and its differences from the first.

    Args:
        templates: their name.
    """
    result = _side_by_side(evaluated, inputs.shards)
    result["templates"] = templates
    answers = [model.answers for model in evaluated]
    result["confusion"] = confusion.result_of(answers, inputs.questions, result["data"], K, SEED)
    for model, answers_of_model in zip(result["models"], answers, strict=True):
        model["own_caption"] = answers_of_model["columns"]["caption"]["over_all_draws"]
    if inputs.retention:
        result["retention"] = _side_by_side([model.retention for model in evaluated], inputs.retention)
    return result


def _side_by_side(evaluated: list[Evaluated], shards: Shards) -> dict:
    """The models' results on one split, each with its differences from the first, and the drift of its
    features.
    """
    base, models = evaluated[0], []
    for model in evaluated:
        result = dict(model.result)
        if model.classified:
            result["zeroshot"] = dict(model.classified.result)
        if model is not base:
            if model.classified:
                result["zeroshot"]["difference"] = list(model.classified.difference(base.classified))
            result["differences"] = differences(base.queries, model.queries)
            result["drift"] = drift(base.embedded, model.embedded)
        models.append(result)
    return {
        "data": f"{shards.folder}, {shards.split}",
        "data_sha256": shards.fingerprint,
        "n_images": base.result["n_images"],
        "n_texts": base.result["n_texts"],
        "models": models,
    }


def drift(first: Embedded, second: Embedded) -> dict[str, float] | None:
    """Mean cosine of each image's and each text's features in two models; None where the widths differ."""
    if first.image_features.shape != second.image_features.shape:
        return None
    return {
        "image_cosine": float((first.image_features * second.image_features).sum(1).mean()),
        "text_cosine": float((first.text_features * second.text_features).sum(1).mean()),
    }


def add_wise_ft(
    result: dict,
    models: tuple[str, str],
    alphas: tuple[float, ...],
    save_alpha: float | None,
    folder: Path,
    inputs: Inputs,
    inference: Inference,
    world: World,
) -> None:
    """Evaluate WiSE-FT mixtures of two models into result["wise_ft"], and save the one with `save_alpha`."""
    ends = [world.all_or_raise(lambda name=name: load_for_eval(name, inference, world)) for name in models]

    def mean_recall(clip: Clip, shards: Shards) -> float:
        return evaluate(clip, shards, world, inference)["metrics"]["mean/R@1"]

    points = []
    for alpha in alphas:
        clip = mix(*ends, alpha)
        point = {"alpha": alpha, "mean/R@1": mean_recall(clip, inputs.shards)}
        if inputs.retention:
            point["retention/mean/R@1"] = mean_recall(clip, inputs.retention)
        points.append(point)
    if points:
        result["wise_ft"] = points
    if save_alpha is not None:
        result["saved"] = f"local-dir:{folder}"
        result["saved_alpha"] = save_alpha
        if world.is_first:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(folder, "model") as partial:
                mix(*ends, save_alpha).save(partial)


def write_comparison(out: Path, result: dict, evaluated: list[Evaluated], shards: Shards) -> str:
    """Write compare.json, compare.md and the page to a folder; the Markdown."""
    markdown = comparison_markdown(result)
    write_json(out / "compare.json", result)
    (out / "compare.md").write_text(markdown, encoding="utf-8")
    write_comparison_page(out / "compare.html", result, largest_changes(evaluated[0], evaluated[-1]), shards)
    return markdown


def largest_changes(first: Evaluated, second: Evaluated) -> tuple[list[Change], list[Change]]:
    """The captions whose first relevant image moved most, by the logarithm of its rank: better, and worse."""
    name = "text_to_image/mean_rank"
    before, after = (model.queries.values.get(name) for model in (first, second))
    if before is None or after is None:
        return [], []
    captions = first.embedded.captions
    relevant_image = captions.first_image()
    gain = np.log(before) - np.log(after)
    order = np.argsort(-gain, kind="stable")

    def first_image(embedded: Embedded, text: int) -> int:
        return int((embedded.image_features @ embedded.text_features[text]).argmax())

    def changes(texts: np.ndarray) -> list[Change]:
        return [
            Change(
                captions.texts[text],
                int(relevant_image[text]),
                first_image(first.embedded, text),
                first_image(second.embedded, text),
                float(before[text]),
                float(after[text]),
            )
            for text in texts.tolist()
        ]

    best, worst = order[:MAX_CHANGES], order[::-1][:MAX_CHANGES]
    return changes(best[gain[best] > 0]), changes(worst[gain[worst] < 0])
