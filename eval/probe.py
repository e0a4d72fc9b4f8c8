"""What a frozen model's image features know of the classes, beside what it says of them without training; see eval.heads.

Features are computed once and cached by content.
"""

import hashlib
from json import dumps
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from data_prep.errors import UserError
from eval.classification import TOP, predict, summarize
from eval.heads import fit_linear, fit_mlp, validation_split
from eval.labelled import Labelled, read_labelled
from eval.labelled_features import image_features
from eval.metrics import TIE
from eval.retrieval import write_json
from eval.templates import read_names, read_templates
from eval.zeroshot import NAMES, text_features
from train.model import load
from train.world import joined_world


def probe(
    model: Annotated[str, tyro.conf.Positional],
    data: Path,
    split: str = "train",
    test_data: Path | None = None,
    test_split: str = "val",
    image_column: str = "image",
    label_column: str = "label",
    names: str = "",
    templates: str = "simple",
    cache: Path = Path("runs/features"),
    save: Path | None = None,
    json: Path | None = None,
    batch: int = 64,
    workers: int = 2,
    precision: Literal["bf16", "fp32"] = "fp32",
) -> None:
    """Trains a linear probe, and an MLP on the zero-shot logits, on a frozen model; accuracy and F1 beside zero-shot.

    Args:
        model: NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder.
        data: Pictures with labels to train on, of any kind that zeroshot reads; a fifth of them is for validation.
        split: Of --data, where it has splits.
        test_data: Pictures with labels to test on; by default those of --data in --test-split.
        test_split: Of the pictures to test on, where they have splits.
        image_column: Of a CSV or Parquet: file names relative to its folder, or the pictures themselves.
        label_column: Of a CSV, Parquet or shards.
        names: What the classes are called in sentences; see zeroshot.
        templates: openai (80), simple (7 of them), plain, icons, products, cars, or a text file of lines with {} in them.
        cache: Folder that keeps features, named by a hash of weights and pictures.
        save: Folder to write the heads to, which eval.heads.load_head reads.
        json: File to write results and history to.
        batch: Pictures embedded at once.
        workers: Processes that read pictures; 0 reads them in this one.
        precision: Of the model; heads are trained in fp32 always.
    """
    with joined_world() as world:

        def prepare() -> tuple:
            train = read_labelled(data, "" if data.is_file() else split, image_column, label_column)
            place = test_data or data
            test = aligned(read_labelled(place, "" if place.is_file() else test_split, image_column, label_column), train)
            clip = load(model)
            clip.towers.bf16 = precision == "bf16"
            clip.towers.to(world.device).eval()
            return (
                train,
                test,
                [[pattern(name) for pattern in read_templates(templates)] for name in read_names(names, train.classes)],
                clip,
            )

        train, test, sentences, clip = world.together(prepare)
        texts = text_features(clip, sentences, world, batch).cpu()
        found, tested = (image_features(clip, part, world, batch, workers, cache) for part in (train, test))
        weights, logit_scale = clip.fingerprint(), clip.towers.model.logit_scale.exp().item()
        parts, features = validation_split(found.labels), tested.image_features.cpu()
        linear, swept = fit_linear(found, train.classes, parts, weights)
        mlp, epochs = fit_mlp(found, texts, logit_scale, train.classes, parts, weights)
        scores = {"zero-shot": (features @ texts.T, TIE), "linear": (linear.logits(features), 0.0), "mlp": (mlp.logits(features), 0.0)}
        result = {
            "id": hashlib.sha256(
                dumps([weights, clip.config, train.sha256, test.sha256, precision, sentences], sort_keys=True).encode()
            ).hexdigest()[:12],
            "model": model,
            "weights_sha256": weights,
            **{name: {"data": part.place, "sha256": part.sha256} for name, part in (("train", train), ("test", test))},
            "n_images": len(tested.labels),
            "n_train": [len(parts.fit), len(parts.val)],
            "n_classes": len(train.classes),
            "unreadable": found.unreadable + tested.unreadable,
            "unlabelled": train.unlabelled + test.unlabelled,
            "heads": {name: summarize(predict(logits, tested.labels, tie)) for name, (logits, tie) in scores.items()},
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


def aligned(test: Labelled, train: Labelled) -> Labelled:
    """`test` with its labels numbered by the classes of `train`.

    Raises:
        UserError: it has pictures of other classes, or they are the very training pictures.
    """
    numbers = {name: number for number, name in enumerate(train.classes)}
    used = [test.classes[label] for label in np.unique(test.labels)]
    if unknown := [name for name in used if name not in numbers]:
        raise UserError(
            f"{test.place}: class {unknown[0]!r} ({len(unknown)} such) is none of {train.place}; test on the classes of training"
        )
    if test.sha256 == train.sha256:
        raise UserError(f"{test.place}: the very pictures of training; pass others to test on, with --test-data or --test-split")
    labels = np.array([numbers.get(name, -1) for name in test.classes])[test.labels]
    return Labelled(test.place, train.classes, labels, test.names, test.read, test.unlabelled)


def table(result: dict) -> str:
    """A result for people: heads side by side, and what was tried."""
    heads, (fit, val) = result["heads"], result["n_train"]
    lines = [f"{result['model']}: trained on {fit} images, {val} for validation ({result['train']['data']})"]
    lines.append(f"tested on {result['n_images']} images of {result['n_classes']} classes ({result['test']['data']})")
    for kind in ("unreadable", "unlabelled"):
        if result[kind]:
            listed = "; ".join(f"{name}: {reason}" for name, reason in result[kind][:5])
            lines.append(f"{len(result[kind])} {kind} images are not used: {listed}{'; ...' if len(result[kind]) > 5 else ''}")
    lines.append(" " * 18 + "chance".rjust(9) + "".join(name.rjust(24) for name in heads))
    for name, title in NAMES.items():
        guess = heads["linear"]["metrics"].get(f"chance/{name}")
        cells = ((head["metrics"][name], *head["intervals"][name]) for head in heads.values())
        shown = "".join(f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]".rjust(24) for value, low, high in cells)
        lines.append(f"  {title}".ljust(18) + (f"{100 * guess:.1f} %" if guess else "").rjust(9) + shown)
    if result["n_classes"] < TOP:
        lines.append(f"  (top-{TOP} of {result['n_classes']} classes is top-{result['n_classes']}: always right)")
    best = next(row for row in result["history"]["linear"] if row["chosen"])
    lines.append(f"linear: C = {best['C']:g} of {len(result['history']['linear'])} tried, validation accuracy {best['val_accuracy']:.1%}")
    accuracies = ", ".join(f"{row['val_accuracy']:.1%}" for row in result["history"]["mlp"])
    return "\n".join([*lines, f"MLP: validation accuracy by epoch {accuracies}", "[95 % interval]"])
