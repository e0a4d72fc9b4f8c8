"""Zero-shot classification: the class whose sentence is nearest to the picture.

    class name -> sentences by templates -> text_features, normed -> mean, normed: [C, d], once
    logits [n, C] = exp(logit_scale) * image_features [n, d] @ text_features.T

Source: Radford et al. 2021 (arXiv:2103.00020), section 3.1.
"""

import hashlib
from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from data_prep.errors import UserError
from eval.classification import TOP, hierarchy, per_class, predict, read_parents, summarize, write_confusion_csv, write_confusion_png
from eval.labelled import Labelled, read_labelled
from eval.labelled_features import Features, image_features
from eval.metrics import TIE, check_finite
from eval.retrieval import write_json
from eval.show import shown, shown_table
from eval.templates import read_names, read_templates
from train.model import Clip, load
from train.world import World, joined_world

NAMES = {
    "top1": "top-1",
    f"top{TOP}": f"top-{TOP}",
    "mean_per_class": "mean per class",
    "macro_f1": "macro F1",
    "weighted_f1": "weighted F1",
}


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
    batch: int = 64,
    workers: int = 2,
    precision: Literal["bf16", "fp32"] = "fp32",
) -> None:
    """Classifies pictures by sentences about their class names, or with --show compares one picture with captions.

    Args:
        models: One or several: NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder; they are printed side by side.
        data: A folder per class, a CSV, a Parquet file or folder of the hub's kind, shards, Stanford Cars or imagenette.
        split: Which one, where the data has several.
        image_column: Of a CSV or Parquet: file names relative to its folder, or the pictures themselves.
        label_column: Of a CSV, Parquet or shards.
        names: What the classes are called in sentences: a text file with a name per line, in the order of the classes; a
            JSON file {class: name}; or imagenet, for its 1000 classes. By default the names that come with the data.
        templates: openai (80), simple (7 of them), plain, icons, products, cars, or a text file of lines with {} in them.
        parents: JSON file {child: parent} of classes that overlap (siamese: cat), to be scored at both levels.
        show: A picture to compare with --captions, instead of --data.
        captions: Sentences for --show.
        json: File to write the results to.
        out: Folder to write results, confusion matrix as CSV and as PNG to, named by a hash of weights and data.
        batch: Pictures embedded at once.
        workers: Processes that read pictures; 0 reads them in this one.
        precision: Of the models; the features are compared in fp32 always.
    """
    if not models:
        raise UserError("no MODEL was given; NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder is wanted")
    if (data is None) == (show is None) or bool(captions) != bool(show):
        raise UserError("either --data, or --show IMAGE with --captions, is wanted")
    with joined_world() as world:
        if show:
            result = shown(show, captions, (_loaded(name, precision, world) for name in models))
            if world.is_first:
                print(shown_table(result))
                if json:
                    write_json(json, result)
            return

        def prepare() -> tuple:
            found = read_labelled(data, split, image_column, label_column)
            tree = read_parents(parents, found.classes) if parents else None
            return found, read_names(names, found.classes), read_templates(templates), tree

        labelled, titles, patterns, tree = world.together(prepare)
        results, stems = [], []
        for name in models:
            clip = world.together(lambda name=name: _loaded(name, precision, world))
            result, found = evaluate(clip, labelled, titles, patterns, world, batch, workers, tree)
            results.append({"model": name, "templates": templates, **result})
            if world.is_first and out:
                stem = f"zeroshot-{result['id']}"
                stems.append(str(out / stem))
                out.mkdir(parents=True, exist_ok=True)
                write_json(out / f"{stem}.json", results[-1])
                write_confusion_csv(out / f"{stem}.csv", found, labelled.classes)
                write_confusion_png(out / f"{stem}.png", found, labelled.classes)
        if world.is_first:
            print(table(results))
            if json:
                write_json(json, {"models": results})
            if out:
                print(f"results and confusion matrices (.json, .csv, .png): {', '.join(stems)}")


def _loaded(name: str, precision: str, world: World) -> Clip:
    clip = load(name)
    clip.towers.bf16 = precision == "bf16"
    clip.towers.to(world.device).eval()
    return clip


def evaluate(
    clip: Clip,
    data: Labelled,
    titles: list[str],
    templates: list[Callable[[str], str]],
    world: World,
    batch: int = 64,
    workers: int = 0,
    tree: dict[str, str] | None = None,
) -> tuple[dict, np.ndarray]:
    """Classify `data` by `titles`, a name for each of its classes.

    Returns:
        The result (id, weights_sha256, data_sha256, counts, metrics, intervals, classes and, with `tree`, parent and child), and the
        expected confusion matrix [C, C].

    Raises:
        NotFinite: a feature is not finite; the picture or class is named.
    """
    sentences = [[template(title) for template in templates] for title in titles]
    texts = text_features(clip, sentences, world, batch)
    found = image_features(clip, data, world, batch, workers)
    return score(clip, data, found, texts, sentences, tree)


def score(
    clip: Clip, data: Labelled, found: Features, texts: torch.Tensor, sentences: list[list[str]], tree: dict[str, str] | None = None
) -> tuple[dict, np.ndarray]:
    """evaluate's result from features; `texts` are text_features() of the `sentences`."""
    scores = found.image_features @ texts.T  # a positive logit_scale moves no order and no tie
    predicted = predict(scores, found.labels, TIE)
    weights = clip.fingerprint()
    result = {
        "id": hashlib.sha256(
            dumps([weights, clip.config, data.sha256, clip.towers.bf16, sentences, tree], sort_keys=True).encode()
        ).hexdigest()[:12],
        "weights_sha256": weights,
        "data": data.place,
        "data_sha256": data.sha256,
        "n_images": len(found.labels),
        "n_classes": len(data.classes),
        "unreadable": found.unreadable,
        "unlabelled": data.unlabelled,
        **summarize(predicted),
        "classes": per_class(predicted, data.classes),
    }
    if tree:
        result |= hierarchy(scores, found.labels, data.classes, tree, TIE)
    return result, predicted.confusion()


def text_features(clip: Clip, sentences: list[list[str]], world: World | None = None, batch: int = 64) -> torch.Tensor:
    """fp32 [C, d], L2-normed: of each class, the mean of its sentences' L2-normed features.

    Raises:
        NotFinite: one is not finite; its class is named by its first sentence.
    """
    world = world or World()
    clip.towers.eval()
    parts = {}
    with torch.inference_mode():
        for number in range(len(sentences))[world.rank :: world.world_size]:
            tokens = clip.tokenizer(sentences[number])
            each = torch.cat([clip.towers.text_features(part.to(world.device)) for part in tokens.split(batch)])
            parts[number] = F.normalize(each.mean(0), dim=0)
    width = world.max(torch.tensor([max(map(len, parts.values()), default=0)])).item()
    features = torch.zeros(len(sentences), int(width), device=world.device)
    for number, part in parts.items():
        features[number] = part
    features = world.sum(features)
    check_finite(features, "text_features", lambda row: f"class {sentences[row][0]!r}")
    return features


def table(results: list[dict]) -> str:
    """Results on the same data for people, side by side."""
    width = max(24, *(len(result["model"]) + 2 for result in results))
    first = results[0]
    lines = [f"{first['n_images']} images, {first['n_classes']} classes ({first['data']}); templates: {first['templates']}"]
    for kind in ("unreadable", "unlabelled"):
        if first[kind]:
            listed = "; ".join(f"{name}: {reason}" for name, reason in first[kind][:5])
            lines.append(f"{len(first[kind])} {kind} images are not scored: {listed}{'; ...' if len(first[kind]) > 5 else ''}")
    lines.append("".ljust(18) + "chance".rjust(9) + "".join(result["model"].rjust(width) for result in results))
    for level in ("", "parent", "child"):
        found = [result[level] if level else result for result in results if not level or level in result]
        if not found:
            continue
        if level:
            lines.append(f"{level} level, {found[0]['n_images']} images, {found[0]['n_classes']} classes")
        n_classes = found[0]["n_classes"]
        for name, title in NAMES.items():
            if name in found[0]["metrics"]:
                guess = found[0]["metrics"].get(f"chance/{name}")
                lines.append(f"  {title}".ljust(18) + (f"{100 * guess:.1f} %" if guess else "").rjust(9) + _cells(found, name, width))
        if n_classes < TOP and f"top{TOP}" in found[0]["metrics"]:
            lines.append(f"  (top-{TOP} of {n_classes} classes is top-{n_classes}: always right)")
    lines.append("  ".join([f"largest class: {first['metrics']['largest_class']:.1%} of the images", "[95 % interval]"]))
    if any(result["metrics"]["tied"] for result in results):
        lines.append("tied for the first place, and counted in expectation: " + ", ".join(f"{r['metrics']['tied']:.1%}" for r in results))
    return "\n".join([*lines, "weights: " + ", ".join(r["weights_sha256"][:12] for r in results) + f"  data: {first['data_sha256'][:12]}"])


def _cells(found: list[dict], name: str, width: int) -> str:
    cells = ((result["metrics"][name], *result["intervals"][name]) for result in found)
    return "".join(f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]".rjust(width) for value, low, high in cells)
