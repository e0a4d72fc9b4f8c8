"""Zero-shot classification: an image gets the class whose sentences are nearest to it.

    class name -> sentences by templates -> text_features, normed -> mean, normed: [C, d], once
    logits [n, C] = exp(logit_scale) * image_features [n, d] @ text_features.T

Source: Radford et al. 2021 (arXiv:2103.00020), section 3.1.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data_prep.atomic import write_json
from data_prep.terminal import say
from eval.classify.features import Features, image_features, split_of
from eval.classify.labelled import Labelled, read_labelled
from eval.classify.metrics import (
    Mistake,
    Predictions,
    confident_mistakes,
    hierarchy,
    per_class,
    predict,
    read_parents,
    summarize,
    write_confusion_csv,
)
from eval.classify.templates import read_names, read_templates
from eval.classify.zeroshot_page import write_page
from eval.embed import load_for_eval
from eval.options import INFERENCE, Inference, LabelledTable
from eval.retrieval.intervals import Difference, paired_difference
from eval.retrieval.ranking import TIE, check_finite
from train.model.clip import Clip
from train.world import World


class Task(NamedTuple):
    """What models are evaluated on.

    Attributes:
        class_names: Of each class of the data, as used in sentences.
        templates: From a class name to a sentence.
        template_set: Name or file of the templates.
        parents: {child: parent} of overlapping classes, or None.
    """

    data: Labelled
    class_names: list[str]
    templates: list[Callable[[str], str]]
    template_set: str
    parents: dict[str, str] | None


def read_task(
    data: str, split: str, table: LabelledTable, names: str, templates: str, parents: Path | None
) -> Task:
    """The options of the command, read and checked; see eval.classify.command.zeroshot."""
    labelled = read_labelled(data, split_of(data, split), **asdict(table))
    return Task(
        labelled,
        read_names(names, labelled.classes),
        read_templates(templates),
        templates,
        read_parents(parents, labelled.classes) if parents else None,
    )


def evaluate_models(
    models: Sequence[str], task: Task, inference: Inference, world: World, out: Path | None
) -> list[dict]:
    """Results of each model; those after the first have "difference", paired with the first.

    Args:
        out: Folder for a page, JSON, confusion matrix and its figure of each model.
    """
    results, first = [], None
    for name in models:
        clip = world.all_or_raise(lambda name=name: load_for_eval(name, inference, world))
        classified = evaluate(
            clip, task.data, task.class_names, task.templates, world, inference, task.parents
        )
        results.append({"model": name, "templates": task.template_set, **classified.result})
        if first:
            results[-1]["difference"] = list(classified.difference(first))
        first = first or classified
        if world.is_first and out:
            write_files(out, results[-1], classified, task.data)
    return results


def write_files(out: Path, result: dict, classified: "Classified", data: Labelled) -> None:
    path, confusion = out / f"zeroshot-{result['id']}.html", classified.predictions.confusion()
    write_json(path.with_suffix(".json"), result)
    write_confusion_csv(path.with_suffix(".csv"), confusion, data.classes)
    write_page(path, result, confusion, classified.mistakes, data)
    say(f"page: {path}; beside it the result as .json, the confusion matrix as .csv and .png")


class Classified(NamedTuple):
    """One model on labelled images.

    Attributes:
        result: id, weights_sha256, data_sha256, counts, metrics, intervals, classes and, where classes
            overlap, parent and child.
        groups: int64 [n], of the readable images.
    """

    result: dict
    predictions: Predictions
    groups: np.ndarray
    mistakes: list[Mistake]

    def difference(self, baseline: "Classified") -> Difference:
        """Of top-1 from another model's, paired by image."""
        return paired_difference(baseline.predictions.correct, self.predictions.correct, self.groups)


def evaluate(
    clip: Clip,
    data: Labelled,
    class_names: list[str],
    templates: list[Callable[[str], str]],
    world: World,
    inference: Inference = INFERENCE,
    parents: dict[str, str] | None = None,
) -> Classified:
    """Classify the images of `data`.

    Args:
        class_names: A name for each of its classes.

    Raises:
        NotFinite: A feature is not finite; the image or class is named.
    """
    sentences = [[template(name) for template in templates] for name in class_names]
    texts = text_features(clip, sentences, world, inference)
    features = image_features(clip, data, world, inference)
    return score(clip, data, features, texts, sentences, parents)


def score(
    clip: Clip,
    data: Labelled,
    features: Features,
    texts: torch.Tensor,
    sentences: list[list[str]],
    parents: dict[str, str] | None = None,
) -> Classified:
    """The result of evaluate() from features; `texts` are the text_features() of `sentences`."""
    scores = features.image_features @ texts.T  # a positive logit_scale changes no order and no tie
    predictions = predict(scores, features.labels, TIE)
    weights = clip.fingerprint()
    settings = [weights, clip.config, data.sha256, clip.towers.bf16, sentences, parents]
    result = {
        "id": hashlib.sha256(dumps(settings, sort_keys=True).encode()).hexdigest()[:12],
        "weights_sha256": weights,
        "data": data.place,
        "data_sha256": data.sha256,
        "n_images": len(features.labels),
        "n_classes": len(data.classes),
        "unreadable": features.unreadable,
        "unlabelled": data.unlabelled,
        "duplicates": data.duplicates,
        **summarize(predictions, features.groups),
        "classes": per_class(predictions, data.classes),
    }
    if parents:
        result |= hierarchy(scores, features.labels, features.groups, data.classes, parents, TIE)
    mistakes = confident_mistakes(scores, features.labels, features.numbers)
    return Classified(result, predictions, features.groups, mistakes)


def text_features(
    clip: Clip, sentences: list[list[str]], world: World, inference: Inference = INFERENCE
) -> torch.Tensor:
    """fp32 [C, d], L2-normed: for each class, the mean of its sentences' L2-normed features.

    Raises:
        NotFinite: A feature is not finite; its class is named by its first sentence.
    """
    clip.towers.eval()
    own = {}
    with torch.inference_mode():
        for number in range(len(sentences))[world.rank :: world.world_size]:
            batches = clip.tokenize(sentences[number]).split(inference.batch_size)
            of_class = torch.cat([clip.towers.text_features(batch.to(world.device)) for batch in batches])
            own[number] = F.normalize(of_class.mean(0), dim=0)
    width = world.max(torch.tensor([max(map(len, own.values()), default=0)])).item()
    features = torch.zeros(len(sentences), int(width), device=world.device)
    for number, mean in own.items():
        features[number] = mean
    features = world.sum(features)
    check_finite(features, "text_features", lambda row: f"class {sentences[row][0]!r}")
    return features
