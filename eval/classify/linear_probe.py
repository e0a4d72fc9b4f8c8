"""What a frozen model's image features know of the classes, beside what it says of them without training; see
eval.classify.heads.

Features are computed once and cached by content.
"""

import dataclasses
import hashlib
from json import dumps
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from data_prep.errors import UserError
from eval.classify.features import Features, image_features
from eval.classify.heads import Split, fit_linear, fit_mlp, validation_split
from eval.classify.labelled import Labelled, read_labelled
from eval.classify.linear_probe_page import table, write_page
from eval.classify.metrics import predict, summarize
from eval.classify.templates import read_names, read_templates
from eval.classify.zeroshot import text_features
from eval.embed import load_for_eval
from eval.options import INFERENCE, Inference
from eval.retrieval.ranking import TIE
from eval.retrieval.score import write_json
from train.world import joined_world


def probe(
    model: Annotated[str, tyro.conf.Positional],
    data: Path,
    split: str = "train",
    val_split: str = "",
    test_data: Path | None = None,
    test_split: str = "val",
    image_column: str = "image",
    label_column: str = "label",
    names: str = "",
    templates: str = "simple",
    cache: Path = Path("runs/features"),
    save: Path | None = None,
    json: Path | None = None,
    page: Path | None = None,
    inference: Inference = INFERENCE,
) -> None:
    """Trains a linear probe, and an MLP on the zero-shot logits, on a frozen model; accuracy and F1 beside
    zero-shot.

    Args:
        model: NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder.
        data: Pictures with labels to train on, of any kind that zeroshot reads.
        split: Of --data, where it has splits.
        val_split: Of --data, to choose by; by default a fifth of the training pictures is, whole groups of
            shards.
        test_data: Pictures with labels to test on; by default those of --data in --test-split.
        test_split: Of the pictures to test on, where they have splits.
        image_column: Of a CSV or Parquet: file names relative to its folder, or the pictures themselves.
        label_column: Of a CSV, Parquet or shards.
        names: What the classes are called in sentences; see zeroshot.
        templates: openai (80), simple (7 of them), plain, icons, products, cars, or a text file of lines with
            {} in them.
        cache: Folder that keeps features, named by a hash of weights and pictures.
        save: Folder to write the heads to, which eval.classify.heads.load_head reads.
        json: File to write results and history to.
        page: HTML file to write: the table, and the validation's curves, which are a PNG beside it too.
        inference: How models are run.
    """
    with joined_world() as world:

        def prepare() -> tuple:
            train = read_labelled(data, "" if data.is_file() else split, image_column, label_column)
            place = test_data or data
            test = aligned(
                read_labelled(place, "" if place.is_file() else test_split, image_column, label_column), train
            )
            val = (
                aligned(read_labelled(data, val_split, image_column, label_column), train)
                if val_split
                else None
            )
            clip = load_for_eval(model, inference, world)
            return (
                train,
                val,
                test,
                [
                    [pattern(name) for pattern in read_templates(templates)]
                    for name in read_names(names, train.classes)
                ],
                clip,
            )

        train, val, test, sentences, clip = world.all_or_raise(prepare)
        texts = text_features(clip, sentences, world, inference).cpu()
        found, tested = (image_features(clip, part, world, inference, cache) for part in (train, test))
        weights, logit_scale = clip.fingerprint(), clip.towers.model.logit_scale.exp().item()
        features = tested.image_features.cpu()
        if val:
            parts, found = joined(found, image_features(clip, val, world, inference, cache))
        else:
            parts = validation_split(found.labels, found.groups)
        linear, swept = fit_linear(found, train.classes, parts, weights)
        mlp, epochs = fit_mlp(found, texts, logit_scale, train.classes, parts, weights)
        scores = {
            "zero-shot": (features @ texts.T, TIE),
            "linear": (linear.logits(features), 0.0),
            "mlp": (mlp.logits(features), 0.0),
        }
        result = {
            "id": hashlib.sha256(
                dumps(
                    [weights, clip.config, train.sha256, test.sha256, inference.precision, sentences],
                    sort_keys=True,
                ).encode()
            ).hexdigest()[:12],
            "model": model,
            "weights_sha256": weights,
            **{
                name: {"data": part.place, "sha256": part.sha256}
                for name, part in (("train", train), ("test", test))
            },
            "n_images": len(tested.labels),
            "n_train": [len(parts.fit), len(parts.val)],
            "n_classes": len(train.classes),
            "unreadable": found.unreadable + tested.unreadable,
            "unlabelled": train.unlabelled + test.unlabelled,
            "heads": {
                name: summarize(predict(logits, tested.labels, tie), tested.groups)
                for name, (logits, tie) in scores.items()
            },
            "history": {"linear": swept, "mlp": epochs},
        }
        if world.is_first:
            print(table(result))
            if save:
                linear.save(save)
                mlp.save(save)
                print(f"heads: {save / 'linear.json'}, {save / 'mlp.json'}")
            if json:
                write_json(json, result)
            if page:
                write_page(page, result)
                print(f"curves: {page}")


def joined(fit: Features, val: Features) -> tuple[Split, Features]:
    """Both together, and which of them is which."""
    features = torch.cat([fit.image_features, val.image_features])
    n, ends = len(fit.labels), (np.concatenate(pair) for pair in zip(fit[1:4], val[1:4], strict=True))
    return Split(np.arange(n), np.arange(n, len(features))), Features(
        features, *ends, fit.unreadable + val.unreadable
    )


def aligned(test: Labelled, train: Labelled) -> Labelled:
    """`test` with its labels numbered by the classes of `train`.

    Raises:
        UserError: it has pictures of other classes, or they are the very training pictures.
    """
    numbers = {name: number for number, name in enumerate(train.classes)}
    used = [test.classes[label] for label in np.unique(test.labels)]
    if unknown := [name for name in used if name not in numbers]:
        raise UserError(
            f"{test.place}: class {unknown[0]!r} ({len(unknown)} such) is none of {train.place}; test on the"
            " classes of training"
        )
    if test.sha256 == train.sha256:
        raise UserError(
            f"{test.place}: the very pictures of training; pass others to test on, with --test-data or"
            " --test-split"
        )
    labels = np.array([numbers.get(name, -1) for name in test.classes])[test.labels]
    return dataclasses.replace(test, classes=train.classes, labels=labels)
