"""Heads on a frozen model: equal to scikit-learn's, the same when loaded again, tested on other images."""

import json

import numpy as np
import pytest
import torch
from labelled_formats import CLASSES, as_csv, as_folder, labelled_images
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score

from data_prep.cli import run_command
from data_prep.errors import UserError
from eval.classify.command import linear_probe
from eval.classify.features import Features, image_features
from eval.classify.heads import C_VALUES, fit_linear, fit_mlp, load_head, validation_split
from eval.classify.labelled import read_labelled
from eval.options import Inference
from train.model.clip import load
from train.world import World


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """FOLDER/train and FOLDER/val, of classes that differ in color."""
    folder = tmp_path_factory.mktemp("halves")
    as_folder(folder, [*labelled_images(1), *labelled_images(2), *labelled_images(3)], split="train")
    return as_folder(folder, [*labelled_images(4), *labelled_images(5)], split="val")


def drawn(n: int = 240, d: int = 12, classes: int = 4) -> Features:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, n)
    features = torch.from_numpy(rng.normal(size=(n, d)) + 1.5 * np.eye(classes, d)[labels]).float()
    return Features(torch.nn.functional.normalize(features, dim=1), labels, np.arange(n), np.arange(n), [])


@pytest.mark.parametrize("classes", [2, 4])
def test_the_linear_head_is_scikit_learns_at_the_strength_that_validation_chose(classes):
    found = drawn(classes=classes)
    split = validation_split(found.labels, found.groups)
    assert sorted([*split.fit, *split.val]) == list(range(240))
    assert np.bincount(found.labels[split.val]).tolist() == (np.bincount(found.labels) // 5).tolist()
    head, history = fit_linear(found, [str(number) for number in range(classes)], split, "")
    features = found.image_features.double().numpy()
    accuracies = []
    for strength in C_VALUES:
        fitted = LogisticRegression(C=strength, max_iter=1000).fit(
            features[split.fit], found.labels[split.fit]
        )
        accuracies.append(fitted.score(features[split.val], found.labels[split.val]))
    assert [row["val_accuracy"] for row in history] == pytest.approx(accuracies)
    (best,) = (at for at, row in enumerate(history) if row["chosen"])
    assert best == int(np.argmax(accuracies))  # the first of the best, so the strongest
    whole = LogisticRegression(C=C_VALUES[best], max_iter=1000).fit(features, found.labels)
    np.testing.assert_allclose(
        head.logits(found.image_features).softmax(1).numpy(), whole.predict_proba(features), atol=1e-5
    )


def test_a_class_without_training_images_is_never_predicted():
    found = drawn()
    labels = np.where(found.labels >= 2, found.labels + 1, found.labels)  # nothing is of class 2
    head, _ = fit_linear(
        found._replace(labels=labels), list("abcde"), validation_split(labels, found.groups), ""
    )
    logits = head.logits(found.image_features)
    assert not (logits.argmax(1) == 2).any()
    assert (logits.argmax(1).numpy() == labels).mean() > 0.5


def test_the_mlp_has_the_tutorials_layers_and_is_the_same_every_time():
    found = drawn()
    texts = torch.nn.functional.normalize(torch.eye(4, 12), dim=1)
    split = validation_split(found.labels, found.groups)
    before = torch.random.get_rng_state()
    heads, histories = zip(
        *(fit_mlp(found, texts, 20.0, list("abcd"), split, "") for _ in range(2)), strict=True
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [tuple(layer.weight.shape) for layer in heads[0].layers if isinstance(layer, torch.nn.Linear)] == [
        (980, 4),
        (980, 980),
        (4, 980),
    ]
    assert [layer.p for layer in heads[0].layers if isinstance(layer, torch.nn.Dropout)] == [0.25, 0.3]
    assert sum(isinstance(layer, torch.nn.BatchNorm1d) for layer in heads[0].layers) == 2
    assert histories[0] == histories[1]
    assert torch.equal(heads[0].logits(found.image_features), heads[1].logits(found.image_features))
    assert [row["epoch"] for row in histories[0]] == [1, 2, 3, 4, 5, 6]
    logits = heads[0].logits(found.image_features[torch.from_numpy(split.val)])
    labels = torch.from_numpy(found.labels[split.val])
    assert histories[0][-1]["val_accuracy"] == pytest.approx(
        (logits.argmax(1) == labels).double().mean().item()
    )
    assert histories[0][-1]["val_accuracy"] > 0.5
    assert histories[0][-1]["loss"] < histories[0][0]["loss"]


def run_probe(*arguments) -> None:
    run_command(linear_probe, "python -m eval linear-probe", [str(argument) for argument in arguments])


def test_the_command_and_the_heads_that_it_saves(tiny_model, halves, tmp_path, capsys, monkeypatch):
    def run(name: str) -> dict:
        options = [
            "--data",
            halves,
            "--cache",
            tmp_path / "cache",
            "--out",
            tmp_path / "heads",
            "--json",
            tmp_path / name,
            "--workers",
            0,
        ]
        run_probe(tiny_model, *options, "--split", "val")
        return json.loads((tmp_path / name).read_text())

    result = run("a.json")
    printed = capsys.readouterr().out
    for word in (
        "trained on 49 images, 11 for validation",
        "tested on 40 images of 3 classes",
        "zero-shot",
        "linear: C =",
        "by epoch",
    ):
        assert word in printed
    clip, test = load(tiny_model), read_labelled(halves, "val")
    found = image_features(clip, test, World(), Inference(64, 0))
    for kind in ("linear", "mlp"):
        head = load_head(tmp_path / "heads" / f"{kind}.json")
        assert head.about["classes"] == CLASSES
        assert head.about["weights_sha256"] == result["weights_sha256"] == load(tiny_model).fingerprint()
        guesses, metrics = (
            head.logits(found.image_features).argmax(1).numpy(),
            result["heads"][kind]["metrics"],
        )
        assert metrics["top1"] == pytest.approx(accuracy_score(found.labels, guesses))
        assert metrics["macro_f1"] == pytest.approx(
            f1_score(found.labels, guesses, average="macro", zero_division=0)
        )
        low, high = result["heads"][kind]["intervals"]["top1"]
        assert low <= metrics["top1"] <= high
        assert load_file(tmp_path / "heads" / f"{kind}.safetensors").keys() == head.state_dict().keys()
    assert result["heads"]["linear"]["metrics"]["top1"] > 0.8  # even random weights see colors
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr("eval.classify.features.embed_rows", None)  # would be called
    assert run("b.json") == result


def test_a_validation_split(tiny_model, halves, tmp_path):
    as_folder(tmp_path / "three", [*labelled_images(1), *labelled_images(2)], split="train")
    as_folder(tmp_path / "three", labelled_images(3), split="val")
    as_folder(tmp_path / "three", labelled_images(4), split="test")
    options = [
        "--data",
        tmp_path / "three",
        "--val-split",
        "val",
        "--cache",
        tmp_path / "cache",
        "--workers",
        0,
    ]
    options += ["--json", tmp_path / "a.json", "--page", tmp_path / "a.html"]
    run_probe(tiny_model, *options)
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["n_train"] == [40, 20]
    clip = load(tiny_model)
    fit, val = (
        image_features(clip, read_labelled(tmp_path / "three", name), World(), Inference(64, 0))
        for name in ("train", "val")
    )
    for row in result["history"]["linear"]:
        fitted = LogisticRegression(C=row["C"], max_iter=1000).fit(fit.image_features.double(), fit.labels)
        assert row["val_accuracy"] == pytest.approx(fitted.score(val.image_features.double(), val.labels))
    assert "<svg" in (tmp_path / "a.html").read_text()
    assert min(Image.open(tmp_path / "a.png").size) > 300


def test_images_of_other_classes_and_empty_folders_are_left_out(tiny_model, halves, tmp_path, capsys):
    """The result is that of the same data without them."""
    results = []
    for classes in (CLASSES, [*CLASSES, "Trabant"]):
        test = tmp_path / str(len(classes))
        as_folder(test, labelled_images(4))
        as_folder(test, [(3, data) for _, data in labelled_images(9)[:2]] * (len(classes) - 3), classes)
        (test / "empty").mkdir()
        path = test.with_suffix(".json")
        options = ["--cache", tmp_path / "cache", "--json", path, "--workers", 0]
        run_probe(tiny_model, "--data", halves / "train", "--test-data", test, *options)
        results.append(json.loads(path.read_text()))
    printed = capsys.readouterr().out
    assert printed.count("folders without an image are not counted as classes: 1 (empty)") == 2
    assert (
        "2 images without a usable label are not used: Trabant/00000.png: class 'Trabant' is not" in printed
    )
    names = [name for name, _ in results[1].pop("unlabelled")]
    assert names == ["Trabant/00000.png", "Trabant/00001.png"]
    assert results[0].pop("unlabelled") == []
    assert results[1].pop("test") != results[0].pop("test")  # their places
    assert results[0] == results[1]


def test_a_group_is_on_one_side():
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 3, 200), rng.integers(0, 60, 200)
    split = validation_split(labels, groups)
    assert sorted([*split.fit, *split.val]) == list(range(200))
    assert not set(groups[split.fit]) & set(groups[split.val])
    assert set(labels[split.val]) == set(labels[split.fit]) == {0, 1, 2}


def test_mistakes_get_messages(tiny_model, halves, tmp_path):
    other = as_folder(tmp_path / "other", labelled_images(), classes=["Acura Integra", "BMW M3", "Trabant"])
    (tmp_path / "linear.json").write_text('{"kind": "linear"}')
    same = halves / "train"
    table = as_csv(tmp_path / "table", labelled_images())
    for data in (other, table):
        with pytest.raises(UserError, match=r"has no splits.*; pass --test-data DATA") as error:
            run_probe(tiny_model, "--data", data)
        assert (f"{data}/train and {data}/test" in str(error.value)) == data.is_dir()
    foreign = as_folder(tmp_path / "foreign", labelled_images(), classes=["Trabant", "Lada", "Tatra"])
    for options, words in (
        (["--test-data", foreign], "none of its 20 images is of a class of .* its classes are Lada, Tatra, "),
        (["--test-data", same], "the same images as the training data; pass others with --test-data"),
        (["--split", "test"], "no split 'test'; pass one of train, val as its split"),
    ):
        with pytest.raises(UserError, match=words):
            run_probe(tiny_model, "--data", halves, *options)
    with pytest.raises(UserError, match="make a head"):
        load_head(tmp_path / "linear.json")
    with pytest.raises(UserError, match="at least two groups"):
        validation_split(np.arange(5), np.arange(5))
    found = drawn()._replace(labels=np.zeros(240, np.int64))
    with pytest.raises(UserError, match="fewer than two classes"):
        fit_linear(found, ["a", "b"], validation_split(found.labels, found.groups), "")
