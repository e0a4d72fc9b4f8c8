"""How well classes can be learned from a model's frozen image features, compared with zero-shot.

train, val, test -> image_features (cached by content) -> linear head, MLP (eval.classify.heads) -> metrics
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_prep.errors import UserError
from eval.classify.features import Features, has_splits, image_features, split_of
from eval.classify.heads import Head, Split, fit_linear, fit_mlp, validation_split
from eval.classify.labelled import Labelled, read_labelled, selected
from eval.classify.metrics import predict, summarize
from eval.classify.templates import read_names, read_templates
from eval.classify.zeroshot import text_features
from eval.embed import load_for_eval, precision_of
from eval.options import Inference, LabelledTable
from eval.retrieval.ranking import TIE
from train.model.clip import Clip
from train.world import World

SHOWN_CLASSES = 5


class Task(NamedTuple):
    """Data of a linear probe; `val` is None where a part of `train` is held out."""

    train: Labelled
    val: Labelled | None
    test: Labelled
    sentences: list[list[str]]

    def read(self) -> list[Labelled]:
        """All that was read."""
        return [data for data in (self.train, self.val, self.test) if data]


def read_task(
    data: str, splits: tuple[str, str, str], test_data: str, table: LabelledTable, names: str, templates: str
) -> Task:
    """The options of the command, read and checked; see eval.classify.command.linear_probe.

    Args:
        splits: For training, validation ("" holds out a part of the training images) and test.

    Raises:
        UserError: The data has no splits, and there is no other to test on.
    """
    if test_data == data and not has_splits(data):
        folder = Path(data)
        folders = f", or divide it into {folder / 'train'} and {folder / 'test'}" if folder.is_dir() else ""
        raise UserError(
            f"{data}: has no splits, and heads are tested on other images than they are trained on; pass"
            f" --test-data DATA with those{folders}"
        )
    train_split, val_split, test_split = splits

    def read(place: str, split: str) -> Labelled:
        return read_labelled(place, split_of(place, split), **dataclasses.asdict(table))

    train = read(data, train_split)
    test = with_classes_of(train, read(test_data, test_split))
    val = None
    if val_split:
        val = with_classes_of(train, read_labelled(data, val_split, **dataclasses.asdict(table)))
    patterns, class_names = read_templates(templates), read_names(names, train.classes)
    return Task(train, val, test, [[pattern(name) for pattern in patterns] for name in class_names])


def evaluate_heads(
    model: str, task: Task, inference: Inference, world: World, cache: Path
) -> tuple[dict, list[Head]]:
    """The result of the command, and the heads that were trained."""
    clip = world.all_or_raise(lambda: load_for_eval(model, inference, world))
    texts = text_features(clip, task.sentences, world, inference).cpu()
    train, test = (image_features(clip, data, world, inference, cache) for data in (task.train, task.test))
    if task.val:
        split, train = concatenated(train, image_features(clip, task.val, world, inference, cache))
    else:
        split = validation_split(train.labels, train.groups)
    weights, logit_scale = clip.fingerprint(), clip.towers.model.logit_scale.exp().item()
    linear, linear_history = fit_linear(train, task.train.classes, split, weights)
    mlp, mlp_history = fit_mlp(train, texts, logit_scale, task.train.classes, split, weights)
    features = test.image_features.cpu()
    scores = {
        "zero-shot": (features @ texts.T, TIE),
        "linear": (linear.logits(features), 0.0),
        "mlp": (mlp.logits(features), 0.0),
    }
    result = {
        **identity(model, clip, task),
        "n_images": len(test.labels),
        "n_train": [len(split.fit), len(split.val)],
        "n_classes": len(task.train.classes),
        "unreadable": train.unreadable + test.unreadable,
        "unlabelled": [image for data in task.read() for image in data.unlabelled],
        "duplicates": sum(data.duplicates for data in task.read()),
        "heads": {
            name: summarize(predict(logits, test.labels, tie), test.groups)
            for name, (logits, tie) in scores.items()
        },
        "history": {"linear": linear_history, "mlp": mlp_history},
    }
    return result, [linear, mlp]


def identity(model: str, clip: Clip, task: Task) -> dict:
    """What the result is of: an id, the model and the data."""
    weights = clip.fingerprint()
    settings = [weights, clip.config, task.train.sha256, task.test.sha256, precision_of(clip), task.sentences]
    return {
        "id": hashlib.sha256(dumps(settings, sort_keys=True).encode()).hexdigest()[:12],
        "model": model,
        "weights_sha256": weights,
        "train": {"data": task.train.place, "sha256": task.train.sha256},
        "test": {"data": task.test.place, "sha256": task.test.sha256},
    }


def concatenated(fit: Features, val: Features) -> tuple[Split, Features]:
    """Both in one, and the positions of each."""
    features = torch.cat([fit.image_features, val.image_features])
    labels, groups, numbers = (np.concatenate(pair) for pair in zip(fit[1:4], val[1:4], strict=True))
    split = Split(np.arange(len(fit.labels)), np.arange(len(fit.labels), len(features)))
    return split, Features(features, labels, groups, numbers, fit.unreadable + val.unreadable)


def with_classes_of(train: Labelled, data: Labelled) -> Labelled:
    """`data` with its labels numbered by the classes of `train`; images of other classes are unlabelled.

    Raises:
        UserError: It has no image of these classes, or the same images as `train`.
    """
    numbers = {name: number for number, name in enumerate(train.classes)}
    labels = np.array([numbers.get(name, -1) for name in data.classes])[data.labels]
    other = [
        (data.names[number], f"class {data.classes[data.labels[number]]!r} is not in the training data")
        for number in np.flatnonzero(labels < 0)
    ]
    if len(other) == len(data):
        raise UserError(
            f"{data.place}: none of its {len(data)} images is of a class of {train.place}; its classes are"
            f" {shortened(data.classes)}, those of the training data {shortened(train.classes)}"
        )
    data = dataclasses.replace(
        data, classes=train.classes, labels=labels, unlabelled=[*data.unlabelled, *other]
    )
    data = selected(data, np.flatnonzero(labels >= 0))
    if data.sha256 == train.sha256:
        raise UserError(f"{data.place}: the same images as the training data; pass others with --test-data")
    return data


def shortened(classes: Sequence[str]) -> str:
    return ", ".join(classes[:SHOWN_CLASSES]) + ", ..." * (len(classes) > SHOWN_CLASSES)
