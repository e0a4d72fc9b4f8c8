"""Zero-shot classification: metrics equal scikit-learn's; a collapsed model is at chance."""

import csv
import json
import re

import numpy as np
import open_clip
import pytest
import torch
from conftest import save_tiny
from labelled_formats import CLASSES, COUNTS, as_cars, as_csv, as_folder, as_parquet, labelled_images
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score, top_k_accuracy_score

from data_prep.cli import run_command
from data_prep.errors import NotFinite, UserError
from data_prep.images import check
from eval.classify.caption_match import probabilities
from eval.classify.command import zeroshot
from eval.classify.features import RULES
from eval.classify.labelled import read_labelled
from eval.classify.metrics import hierarchy, per_class, predict, read_parents, summarize
from eval.classify.templates import read_names, read_templates
from eval.classify.zeroshot import evaluate, text_features
from eval.options import Inference
from eval.retrieval.ranking import TIE
from train.data.decode import decode
from train.model.clip import load
from train.world import World


@pytest.fixture(scope="module")
def cars(tmp_path_factory):
    return as_folder(tmp_path_factory.mktemp("classes"), labelled_images())


def test_figures_equal_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 8, 400)
    labels[labels == 6] = 5  # a class without images
    scores = rng.normal(size=(400, 9)) + 1.2 * np.eye(9)[labels]
    scores[:, 8] -= 30  # a class that is never predicted, and has no images
    found = predict(torch.from_numpy(scores), labels, 1e-6)
    guesses, metrics = scores.argmax(1), summarize(found, np.arange(len(labels)))["metrics"]
    assert metrics["top1"] == pytest.approx(accuracy_score(labels, guesses), abs=1e-12)
    assert metrics["top5"] == pytest.approx(
        top_k_accuracy_score(labels, scores, k=5, labels=range(9)), abs=1e-12
    )
    assert metrics["mean_per_class"] == pytest.approx(
        recall_score(labels, guesses, labels=np.unique(labels), average="macro"), abs=1e-12
    )
    assert metrics["macro_f1"] == pytest.approx(
        f1_score(labels, guesses, average="macro", zero_division=0), abs=1e-12
    )
    assert metrics["weighted_f1"] == pytest.approx(
        f1_score(labels, guesses, average="weighted", zero_division=0), abs=1e-12
    )
    assert np.array_equal(found.confusion(), confusion_matrix(labels, guesses, labels=range(9)))
    each = f1_score(labels, guesses, average=None, labels=range(9), zero_division=0)
    assert [row["f1"] for row in per_class(found, list("abcdefghi")).values()] == pytest.approx(
        list(each), abs=1e-12
    )
    assert metrics["tie_rate"] == 0
    for name, (low, high) in summarize(found, np.arange(len(labels)))["intervals"].items():
        assert low < metrics[name] < high, name


def test_equal_scores_are_counted_in_expectation():
    labels = np.repeat(np.arange(10), 5)
    metrics = summarize(predict(torch.zeros(50, 10), labels, TIE), np.arange(50))["metrics"]
    assert [metrics[name] for name in ("top1", "mean_per_class", "macro_f1", "weighted_f1")] == pytest.approx(
        [0.1] * 4
    )
    assert metrics["top5"] == pytest.approx(0.5)
    assert metrics["tie_rate"] == 1
    scores = torch.tensor([[0.5, 0.5, 0.1, 0.5], [0.9, 0.2, 0.3, 0.3], [0.1, 0.1, 0.8, 0.2]])
    found = predict(scores, np.array([1, 0, 3]), TIE)
    assert found.correct.tolist() == pytest.approx([1 / 3, 1, 0])
    assert found.tie_rate == pytest.approx(1 / 3)
    assert found.confusion()[1] == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])


def test_a_collapsed_model_is_at_chance(cars, tmp_path):
    save_tiny(tmp_path)
    weights = load_file(tmp_path / "open_clip_model.safetensors")
    data = read_labelled(cars)
    for tower in ("visual.proj", "text_projection"):
        changed = {**weights, tower: torch.zeros_like(weights[tower])}
        if tower == "visual.proj":  # every image has the same features, which are not zero
            changed["visual.proj"] = torch.ones_like(weights[tower])
            changed |= {"visual.ln_post.weight": torch.zeros(32), "visual.ln_post.bias": torch.ones(32)}
        save_file(changed, tmp_path / "open_clip_model.safetensors")
        result = evaluate(
            load(f"local-dir:{tmp_path}"), data, data.classes, read_templates("plain"), World()
        ).result
        assert result["metrics"]["mean_per_class"] == pytest.approx(1 / 3)
        assert result["metrics"]["top1"] in [
            pytest.approx(share) for share in (*(count / sum(COUNTS) for count in COUNTS), 1 / 3)
        ]
        assert result["metrics"]["macro_f1"] <= 1 / 3 + 1e-9
        assert result["metrics"]["chance/top1"] == pytest.approx(1 / 3)


def test_text_features_are_those_by_hand(tiny_model):
    model, _, _ = open_clip.create_model_and_transforms(tiny_model)
    tokenizer = open_clip.get_tokenizer(tiny_model)
    templates = read_templates("simple")
    assert len(templates) == 7
    assert len(read_templates("openai")) == 80
    sentences = [[template(name) for template in templates] for name in CLASSES]
    expected = []
    with torch.no_grad():
        for each in sentences:
            features = model.eval().encode_text(tokenizer(each))
            mean = (features / features.norm(dim=-1, keepdim=True)).mean(0)
            expected.append(mean / mean.norm())
    torch.testing.assert_close(
        text_features(load(tiny_model), sentences, World(), Inference(3, 0)), torch.stack(expected)
    )


def test_logits_are_open_clips_and_every_format_gives_the_same_result(tiny_model, cars, tmp_path):
    found, clip = labelled_images(), load(tiny_model)
    places = [
        cars,
        as_csv(tmp_path / "csv", found),
        as_parquet(tmp_path / "a.parquet", found),
        as_cars(tmp_path / "mat", found),
    ]
    results = []
    for place in places:
        data = read_labelled(place)
        result, predicted, *_ = evaluate(
            clip, data, data.classes, read_templates("cars"), World(), Inference(6, 0)
        )
        confusion = predicted.confusion()
        result.pop("data")
        results.append((json.dumps(result), confusion.tolist()))
    assert all(result == results[0] for result in results)
    texts = text_features(
        clip, [[template(name) for template in read_templates("cars")] for name in CLASSES], World()
    )
    guesses = []
    for number in range(len(found)):
        with torch.no_grad():
            image = clip.preprocess(decode_on_white(data.read(number)))
            feature = clip.towers.model.encode_image(image[None], normalize=True)
        guesses.append(int((feature @ texts.T).argmax()))
    assert result["metrics"]["top1"] == pytest.approx(accuracy_score(data.labels, guesses))
    assert np.array_equal(confusion, confusion_matrix(data.labels, guesses, labels=range(3)))


def decode_on_white(data: bytes) -> Image.Image:
    """By the path of the build: checked, stored, and decoded as in training."""
    return decode(check(data, RULES).data or data)


def test_intervals_are_over_groups():
    """Copies of an image in its group change no interval; as separate images they would shrink it."""
    rng = np.random.default_rng(0)
    scores, labels = torch.from_numpy(rng.normal(size=(60, 8))), rng.integers(0, 8, 60)
    one = summarize(predict(scores, labels, TIE), np.arange(60))
    copied = predict(scores.repeat(3, 1), np.tile(labels, 3), TIE)
    three, alone = summarize(copied, np.tile(np.arange(60), 3)), summarize(copied, np.arange(180))
    for name, (low, high) in one["intervals"].items():
        assert three["intervals"][name] == pytest.approx([low, high], abs=0.005)
        assert np.diff(alone["intervals"][name]) < 0.75 * (high - low)


def test_overlapping_classes_at_both_levels(tmp_path):
    classes = ["bulldog", "cat", "dog", "siamese"]
    tree = {"siamese": "cat", "bulldog": "dog"}
    guesses = ["siamese", "cat", "dog", "cat", "siamese", "bulldog"]
    truths = ["cat", "siamese", "siamese", "cat", "siamese", "bulldog"]
    scores = torch.eye(4)[[classes.index(guess) for guess in guesses]]
    scores[1, 3] = 0.9  # predicted as cat; among the children, siamese
    scores[2, 0] = 0.8  # predicted as dog; among the children, bulldog
    labels = np.array([classes.index(truth) for truth in truths])
    levels = hierarchy(scores, labels, np.arange(len(labels)), classes, tree, TIE)
    assert levels["parent"]["metrics"]["top1"] == pytest.approx(5 / 6)
    parents = [[tree.get(name, name) for name in names] for names in (truths, guesses)]
    assert levels["parent"]["metrics"]["macro_f1"] == pytest.approx(f1_score(*parents, average="macro"))
    assert levels["parent"]["metrics"]["chance/top1"] == pytest.approx(0.5)
    assert levels["child"]["n_images"] == 4
    assert levels["child"]["metrics"]["top1"] == pytest.approx(3 / 4)
    collapsed = hierarchy(torch.zeros(6, 4), labels, np.arange(6), classes, tree, TIE)
    assert (
        collapsed["parent"]["metrics"]["top1"] == collapsed["child"]["metrics"]["top1"] == pytest.approx(0.5)
    )
    for text, words in (
        ('{"siamise": "cat"}', "did you mean 'siamese'"),
        ('{"siamese": "cat", "cat": "dog"}', "is itself a child"),
        ("[1]", "not an object of texts"),
    ):
        (tmp_path / "tree.json").write_text(text)
        with pytest.raises(UserError, match=words):
            read_parents(tmp_path / "tree.json", classes)


def test_probabilities_keep_their_digits():
    cosines = torch.tensor([0.6, 0.115, 0.1, 0.6])
    found = probabilities(cosines, 100.0)
    assert found.sum().item() == pytest.approx(1, abs=1e-15)
    assert found[1].item() == pytest.approx(
        np.exp(100 * (float(cosines[1]) - float(cosines[0]))) / 2, rel=1e-9
    )
    assert 1e-22 < found[1] < 1e-20
    assert f"{found[1]:.3g}".endswith("e-22")


def test_the_command(tiny_model, cars, tmp_path, capsys):
    (tmp_path / "tree.json").write_text(json.dumps({"BMW M3": "german", "Acura Integra": "other"}))
    (tmp_path / "templates.txt").write_text("a {} on the road\n\na drawing of a {}, a {}\n")
    options = [
        "--templates",
        tmp_path / "templates.txt",
        "--parents",
        tmp_path / "tree.json",
        "--batch-size",
        8,
        "--workers",
        0,
    ]
    options += ["--json", tmp_path / "a.json", "--out", tmp_path / "out"]
    run(tiny_model, "demo-vit:none", "--data", cars, *options)
    printed = capsys.readouterr().out
    for word in (
        "20 images, 3 classes",
        "top-1",
        "top-5 of 3 classes is top-3",
        "macro F1",
        "parent level",
        "child level, 11 images",
    ):
        assert word in printed
    results = json.loads((tmp_path / "a.json").read_text())["models"]
    assert [result["model"] for result in results] == [tiny_model, "demo-vit:none"]
    for result in results:
        stem = tmp_path / "out" / f"zeroshot-{result['id']}"
        assert json.loads(stem.with_suffix(".json").read_text()) == result
        with open(stem.with_suffix(".csv"), newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["true class", *CLASSES]
        assert [sum(map(float, row[1:])) for row in rows] == list(COUNTS)
        assert sum(float(row[1 + at]) for at, row in enumerate(rows)) / sum(COUNTS) == pytest.approx(
            result["metrics"]["top1"]
        )
        assert min(Image.open(stem.with_suffix(".png")).size) > 300
        page = stem.with_suffix(".html").read_text()
        wrong = sum(COUNTS) * (1 - result["metrics"]["top1"])
        assert page.count("<figure>") == round(wrong)
        assert not re.search(r"(src|href)=\"(?!data:|#)|url\((?!#)|@import|<script", page)
        assert all(
            re.search(rf'<th scope="row"[^>]*><span[^>]*>{name}</span></th>', page) for name in CLASSES
        )
    first, second = (result["metrics"]["top1"] for result in results)
    assert results[1]["difference"][0] == pytest.approx(second - first)
    assert f"in points: {100 * (second - first):+.1f} [" in printed


def test_a_csv_in_one_folder_and_its_images_in_another(tiny_model, tmp_path):
    """A file has no splits, so the default of --split does not apply."""
    beside = as_csv(tmp_path / "images", labelled_images())
    (tmp_path / "elsewhere.csv").write_bytes(beside.read_bytes())
    results = []
    for name, options in (("beside", ()), ("elsewhere", ("--images", tmp_path / "images"))):
        data = beside if name == "beside" else tmp_path / "elsewhere.csv"
        out = ("--json", tmp_path / f"{name}.json", "--workers", 0)
        run(tiny_model, "--data", data, "--templates", "plain", *options, *out)
        results.append(json.loads((tmp_path / f"{name}.json").read_text())["models"][0])
    assert results[0]["id"] == results[1]["id"]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[1]["unreadable"] == []


def run(*arguments) -> None:
    run_command(zeroshot, "python -m eval zeroshot", [str(argument) for argument in arguments])


def test_one_image_against_captions(tiny_model, tmp_path, capsys):
    label, data = labelled_images()[0]
    (tmp_path / "a.png").write_bytes(data)
    captions = ["a cat", "two cats", CLASSES[label]]
    run(
        tiny_model,
        "demo-vit:none",
        "--image",
        tmp_path / "a.png",
        "--captions",
        *captions,
        "--json",
        tmp_path / "a.json",
    )
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "a.json").read_text())
    model, _, preprocess = open_clip.create_model_and_transforms(tiny_model)
    with torch.no_grad():
        images, texts, scale = model.eval()(
            preprocess(decode(data))[None], open_clip.get_tokenizer(tiny_model)(captions)
        )
    ours = result["models"][0]
    assert ours["cosine"] == pytest.approx((texts @ images[0]).tolist(), abs=1e-6)
    assert ours["probability"] == pytest.approx((scale * images @ texts.T).softmax(-1)[0].tolist(), rel=1e-4)
    for caption, cosine, probability in zip(captions, ours["cosine"], ours["probability"], strict=True):
        (line,) = (line for line in printed.splitlines() if line.startswith(f"| {caption} "))
        assert f"{cosine:.4f}" in line
        assert f"{probability:.3g}" in line


def test_features_that_are_not_finite_name_a_class_or_an_image(cars, tmp_path):
    save_tiny(tmp_path)
    weights, data = load_file(tmp_path / "open_clip_model.safetensors"), read_labelled(cars)
    for tensor, words in (
        ("ln_final.weight", "class 'Acura Integra'"),
        ("visual.ln_post.weight", "image Acura Integra/00000.png"),
    ):
        save_file(
            {**weights, tensor: torch.full_like(weights[tensor], 3e38)},
            tmp_path / "open_clip_model.safetensors",
        )
        with pytest.raises(NotFinite, match=words):
            evaluate(load(f"local-dir:{tmp_path}"), data, data.classes, read_templates("plain"), World())


def test_names_and_mistakes(tiny_model, cars, tmp_path):
    assert read_names("", ["golden_retriever"]) == ["golden retriever"]
    (tmp_path / "names.txt").write_text("an Acura\na BMW\na Fiat\n")
    assert read_names(str(tmp_path / "names.txt"), CLASSES) == ["an Acura", "a BMW", "a Fiat"]
    (tmp_path / "names.json").write_text(json.dumps({name: name.lower() for name in reversed(CLASSES)}))
    assert read_names(str(tmp_path / "names.json"), CLASSES) == [name.lower() for name in CLASSES]
    (tmp_path / "bad.txt").write_text("a {}\na photo\n")
    (tmp_path / "text.png").write_bytes(b"no image")
    for arguments, words in (
        ([tiny_model], "either --data DATA, or --image IMAGE with --captions"),
        (["--data", cars], "no MODEL given"),
        ([tiny_model, "--data", cars, "--templates", "icon"], "did you mean icons"),
        (
            [tiny_model, "--data", cars, "--templates", tmp_path / "bad.txt"],
            r"bad.txt:2: 'a photo' has no \{\}",
        ),
        ([tiny_model, "--data", cars, "--names", "imagenet"], "1000 names for 3 classes"),
        ([tiny_model, "--image", tmp_path / "none.png", "--captions", "a"], "cannot be read"),
        ([tiny_model, "--image", tmp_path / "text.png", "--captions", "a"], "not an image"),
    ):
        with pytest.raises(UserError, match=words):
            run(*arguments)
