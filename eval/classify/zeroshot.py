"""Zero-shot classification: the class whose sentence is nearest to the picture.

    class name -> sentences by templates -> text_features, normed -> mean, normed: [C, d], once
    logits [n, C] = exp(logit_scale) * image_features [n, d] @ text_features.T

Source: Radford et al. 2021 (arXiv:2103.00020), section 3.1.
"""

import hashlib
from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from data_prep.errors import UserError
from eval.classify.features import Features, image_features
from eval.classify.labelled import Labelled, read_labelled
from eval.classify.metrics import (
    Missed,
    Predicted,
    hierarchy,
    per_class,
    predict,
    read_parents,
    summarize,
    surest_mistakes,
    write_confusion_csv,
)
from eval.classify.show import shown, shown_table
from eval.classify.templates import read_names, read_templates
from eval.classify.zeroshot_page import table, write_page
from eval.embed import load_for_eval
from eval.options import INFERENCE, Inference
from eval.retrieval.intervals import Difference, paired_difference
from eval.retrieval.ranking import TIE, check_finite
from eval.retrieval.score import write_json
from train.model.clip import Clip
from train.world import World, joined_world


def zeroshot(
    models: Annotated[tuple[str, ...], tyro.conf.Positional],
    data: Path | None = None,
    split: str = "",
    image_column: str = "image",
    label_column: str = "label",
    names: str = "",
    templates: str = "simple",
    parents: Path | None = None,
    show: Path | None = None,
    captions: tuple[str, ...] = (),
    json: Path | None = None,
    out: Path | None = None,
    inference: Inference = INFERENCE,
) -> None:
    """Classifies pictures by sentences about their class names, or with --show compares one picture with
    captions.

    Args:
        models: One or several: NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder; they are printed
            side by side.
        data: A folder per class, a CSV, a Parquet file or folder of the hub's kind, shards, Stanford Cars or
            imagenette.
        split: Which one, where the data has several.
        image_column: Of a CSV or Parquet: file names relative to its folder, or the pictures themselves.
        label_column: Of a CSV, Parquet or shards.
        names: What the classes are called in sentences: a text file with a name per line, in the order of the
            classes; a JSON file {class: name}; or imagenet, for its 1000 classes. By default the names that
            come with the data.
        templates: openai (80), simple (7 of them), plain, icons, products, cars, or a text file of lines with
            {} in them.
        parents: JSON file {child: parent} of classes that overlap (siamese: cat), to be scored at both
            levels.
        show: A picture to compare with --captions, instead of --data.
        captions: Sentences for --show.
        json: File to write the results to.
        out: Folder to write a page, results, and the confusion matrix as CSV and PNG to, named by a hash of
            weights and data.
        inference: How models are run.
    """
    if not models:
        raise UserError(
            "no MODEL was given; NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder is wanted"
        )
    if (data is None) == (show is None) or bool(captions) != bool(show):
        raise UserError("either --data, or --show IMAGE with --captions, is wanted")
    with joined_world() as world:
        if show:
            result = shown(show, captions, (load_for_eval(name, inference, world) for name in models))
            if world.is_first:
                print(shown_table(result))
                if json:
                    write_json(json, result)
            return

        def prepare() -> tuple:
            found = read_labelled(data, split, image_column, label_column)
            tree = read_parents(parents, found.classes) if parents else None
            return found, read_names(names, found.classes), read_templates(templates), tree

        labelled, titles, patterns, tree = world.all_or_raise(prepare)
        results, stems, first = [], [], None
        for name in models:
            clip = world.all_or_raise(lambda name=name: load_for_eval(name, inference, world))
            found = evaluate(clip, labelled, titles, patterns, world, inference, tree)
            first = first or found
            results.append({"model": name, "templates": templates, **found.result})
            if found is not first:
                results[-1]["difference"] = list(found.difference(first))
            if world.is_first and out:
                stem = out / f"zeroshot-{found.result['id']}"
                stems.append(f"{stem}.html")
                write_json(stem.with_suffix(".json"), results[-1])
                write_confusion_csv(stem.with_suffix(".csv"), found.predicted.confusion(), labelled.classes)
                write_page(
                    stem.with_suffix(".html"),
                    results[-1],
                    found.predicted.confusion(),
                    found.missed,
                    labelled,
                )
        if world.is_first:
            print(table(results))
            if json:
                write_json(json, {"models": results})
            if out:
                print(
                    f"look at {', '.join(stems)}; beside it .json, and the confusion matrix as .csv and .png"
                )


class Classified(NamedTuple):
    """One model on labelled pictures.

    Attributes:
        result: id, weights_sha256, data_sha256, counts, metrics, intervals, classes and, where classes
            overlap, parent and child.
        groups: int64 [n], of the pictures that could be read.
    """

    result: dict
    predicted: Predicted
    groups: np.ndarray
    missed: list[Missed]

    def difference(self, first: "Classified") -> Difference:
        """Of top-1 to another model's on the same pictures, picture by picture."""
        return paired_difference(first.predicted.right, self.predicted.right, self.groups)


def evaluate(
    clip: Clip,
    data: Labelled,
    titles: list[str],
    templates: list[Callable[[str], str]],
    world: World,
    inference: Inference = INFERENCE,
    tree: dict[str, str] | None = None,
) -> Classified:
    """Classify `data` by `titles`, a name for each of its classes.

    Raises:
        NotFinite: a feature is not finite; the picture or class is named.
    """
    sentences = [[template(title) for template in templates] for title in titles]
    texts = text_features(clip, sentences, world, inference)
    found = image_features(clip, data, world, inference)
    return score(clip, data, found, texts, sentences, tree)


def score(
    clip: Clip,
    data: Labelled,
    found: Features,
    texts: torch.Tensor,
    sentences: list[list[str]],
    tree: dict[str, str] | None = None,
) -> Classified:
    """evaluate's result from features; `texts` are text_features() of the `sentences`."""
    scores = found.image_features @ texts.T  # a positive logit_scale moves no order and no tie
    predicted = predict(scores, found.labels, TIE)
    weights = clip.fingerprint()
    result = {
        "id": (
            hashlib.sha256(
                dumps(
                    [weights, clip.config, data.sha256, clip.towers.bf16, sentences, tree], sort_keys=True
                ).encode()
            ).hexdigest()[:12]
        ),
        "weights_sha256": weights,
        "data": data.place,
        "data_sha256": data.sha256,
        "n_images": len(found.labels),
        "n_classes": len(data.classes),
        "unreadable": found.unreadable,
        "unlabelled": data.unlabelled,
        **summarize(predicted, found.groups),
        "classes": per_class(predicted, data.classes),
    }
    if tree:
        result |= hierarchy(scores, found.labels, found.groups, data.classes, tree, TIE)
    return Classified(result, predicted, found.groups, surest_mistakes(scores, found.labels, found.numbers))


def text_features(
    clip: Clip, sentences: list[list[str]], world: World, inference: Inference = INFERENCE
) -> torch.Tensor:
    """fp32 [C, d], L2-normed: of each class, the mean of its sentences' L2-normed features.

    Raises:
        NotFinite: one is not finite; its class is named by its first sentence.
    """
    clip.towers.eval()
    parts = {}
    with torch.inference_mode():
        for number in range(len(sentences))[world.rank :: world.world_size]:
            tokens = clip.tokenize(sentences[number])
            each = torch.cat(
                [
                    clip.towers.text_features(part.to(world.device))
                    for part in tokens.split(inference.batch_size)
                ]
            )
            parts[number] = F.normalize(each.mean(0), dim=0)
    width = world.max(torch.tensor([max(map(len, parts.values()), default=0)])).item()
    features = torch.zeros(len(sentences), int(width), device=world.device)
    for number, part in parts.items():
        features[number] = part
    features = world.sum(features)
    check_finite(features, "text_features", lambda row: f"class {sentences[row][0]!r}")
    return features
